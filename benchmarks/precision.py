"""How far bfloat16 is from float32, and float32 from float64 PyTorch, row by row.

  python -m benchmarks.precision
  python -m benchmarks.precision --oracle --model=DIR --data=high.json --data=low.json --limit=4

The first table has relative differences of each row's loss, and of each row's mean over layers per
projection of nuclear norm and effective rank: the median and the largest over all rows. The second
is of single matrices and cosines against PyTorch's autograd and LAPACK's whole SVD in float64,
and takes up to a minute a row.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
from absl import flags

import gradjax
from gradjax.checkpoints.resolve import resolve
from gradjax.cli.app import start
from gradjax.data.sources import parse_data_flags, read_rows
from gradjax.structs import ATTENTION, ExampleResult

flags.DEFINE_string("model", "demo", "whose gradients")
flags.DEFINE_multi_string("data", ["demo"], "as of gradjax spectra")
flags.DEFINE_integer("limit", None, "rows per group")
flags.DEFINE_integer("max_length", 1024, "tokens per row")
flags.DEFINE_boolean("oracle", False, "compare with PyTorch too")
# Largest differences that tests allow on random models.
_ALLOWED = {
    "loss": 1e-6,
    "singular values / largest": 1e-5,
    "nuclear_norm": 1e-5,
    "frobenius_norm": 1e-5,
    "effective_rank": 1e-4,
    "entries / largest": 1e-5,
    "cosine": 1e-5,
}


def results(model: gradjax.Model) -> list[ExampleResult]:
    """What gradjax finds for the rows, unusable ones left out."""
    values = flags.FLAGS
    sources = parse_data_flags(values.data)
    rows = [row for source in sources for row in read_rows(source, values.limit)]
    found = gradjax.gradient_spectra(model, rows, max_length=values.max_length)
    return [result for result in found if result.status == "ok"]


def numbers(found: list[ExampleResult]) -> dict[str, np.ndarray]:
    """Each measure by name, one value per row."""
    measures = {"loss": np.array([result.loss for result in found])}
    for measure in ("nuclear_norm", "effective_rank"):
        for p in ATTENTION:
            measures[f"{measure} {p}"] = np.array(
                [
                    np.mean([getattr(s, measure) for s in result.spectra if s.projection == p])
                    for result in found
                ]
            )
    return measures


def differences(result: ExampleResult, torch_model: Any) -> Iterator[tuple[str, float]]:
    """By measure, how far each number of a row is from what it should be."""
    from tests.oracle import cosine, effective_rank, torch_loss_and_gradients

    row = result.tokenized
    loss, gradients = torch_loss_and_gradients(torch_model, row.tokens, row.targets)
    assert result.loss is not None  # of a usable row
    yield "loss", abs(result.loss - loss) / max(1, loss)
    for spectrum in result.spectra:
        gradient = gradients[spectrum.layer, spectrum.projection]
        values = np.linalg.svd(gradient, compute_uv=False)
        own = np.zeros_like(values)
        own[: len(spectrum.singular_values)] = spectrum.singular_values
        yield "singular values / largest", np.abs(own - values).max() / values[0]
        yield "nuclear_norm", abs(spectrum.nuclear_norm / values.sum() - 1)
        norm = float(np.linalg.norm(gradient))
        yield "frobenius_norm", abs(spectrum.frobenius_norm / norm - 1)
        if spectrum.effective_rank is not None:  # of a gradient that is zero
            yield "effective_rank", abs(spectrum.effective_rank / effective_rank(values) - 1)
        largest = np.abs(gradient).max()
        for name in ("mean", "max", "min"):
            expected = getattr(gradient, name)()
            yield "entries / largest", abs(getattr(spectrum, name) - expected) / largest
    for pair in result.similarity:
        first, _, second = pair.projection.partition("-")
        a = gradients[pair.layer_a, first]
        b = gradients[pair.layer_b, second or first]
        if pair.cosine is not None:
            yield "cosine", abs(pair.cosine - cosine(a, b))


def compare_dtypes(found: list[ExampleResult], rounded: list[ExampleResult]) -> None:
    """Prints the first table."""
    exact, other = numbers(found), numbers(rounded)
    print(f"{'':18}{'median':>9}{'largest':>9}{'mean, float32':>15}{'mean, bfloat16':>16}")
    for name, values in exact.items():
        relative = np.abs(other[name] / values - 1)
        print(
            f"{name:18}{np.median(relative):9.2%}{relative.max():9.1%}"
            f"{values.mean():15.5g}{other[name].mean():16.5g}",
            flush=True,
        )


def compare_oracle(found: list[ExampleResult]) -> None:
    """Prints the second table."""
    import torch
    from transformers import AutoModelForCausalLM

    directory = resolve(flags.FLAGS.model).directory
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float64)
    all_of: dict[str, list[float]] = {name: [] for name in _ALLOWED}
    for number, result in enumerate(found):
        for name, difference in differences(result, model):
            all_of[name].append(difference)
        print(f"{number + 1} of {len(found)} rows", end="\r", flush=True)
    print(f"{'float32':28}{'median':>10}{'largest':>10}{'allowed':>10}{'above':>16}")
    for name, allowed in _ALLOWED.items():
        values = np.array(all_of[name])
        above = f"{(values > allowed).sum():,} of {len(values):,}"
        print(f"{name:28}{np.median(values):10.1e}{values.max():10.1e}{allowed:10.0e}{above:>16}")


def main(_: list[str]) -> None:
    """Prints the tables."""
    values = flags.FLAGS
    found = results(gradjax.load_model(values.model))
    print(f"{len(found)} rows")
    compare_dtypes(found, results(gradjax.load_model(values.model, dtype="bfloat16")))
    if values.oracle:
        compare_oracle(found)


if __name__ == "__main__":
    start(main)
