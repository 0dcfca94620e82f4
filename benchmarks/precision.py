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
from gradjax.structs import ATTENTION, ExampleResult, TokenizedExample

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


def differences(
    result: ExampleResult, loss: float, gradients: dict[tuple[int, str], np.ndarray]
) -> Iterator[tuple[str, float]]:
    """By measure, how far each number of a row is from that of the true loss and gradients."""
    from tests.oracle import cosine, effective_rank

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


def torch_differences(
    model: Any, row: TokenizedExample, loss: float, gradients: dict[tuple[int, str], np.ndarray]
) -> Iterator[tuple[str, float]]:
    """The same of PyTorch's own float32, without singular values."""
    import torch

    from tests.oracle import linear_layer

    model.zero_grad()
    ids = torch.tensor(row.tokens, dtype=torch.int64)[None]
    labels = torch.where(torch.tensor(row.targets), ids[0], -100)
    found = torch.nn.functional.cross_entropy(model(ids).logits[0, :-1], labels[1:])
    found.backward()
    yield "loss", abs(found.item() - loss) / max(1, loss)
    for layer, block in enumerate(model.model.layers):
        for projection in ATTENTION:
            gradient = gradients[layer, projection]
            layer_of: Any = linear_layer(block, projection)
            own = layer_of.weight.grad.double().numpy()
            norm = np.linalg.norm(gradient)
            yield "frobenius_norm", float(abs(np.linalg.norm(own) / norm - 1))
            for name in ("mean", "max", "min"):
                difference = abs(getattr(own, name)() - getattr(gradient, name)())
                yield "entries / largest", difference / np.abs(gradient).max()


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

    from tests.oracle import torch_loss_and_gradients

    directory = resolve(flags.FLAGS.model).directory
    exact, rounded = (
        AutoModelForCausalLM.from_pretrained(directory, dtype=dtype)
        for dtype in (torch.float64, torch.float32)
    )
    ours: dict[str, list[float]] = {name: [] for name in _ALLOWED}
    theirs: dict[str, list[float]] = {name: [] for name in _ALLOWED}
    for number, result in enumerate(found):
        row = result.tokenized
        true = torch_loss_and_gradients(exact, row.tokens, row.targets)
        for name, difference in differences(result, *true):
            ours[name].append(difference)
        for name, difference in torch_differences(rounded, row, *true):
            theirs[name].append(difference)
        print(f"{number + 1} of {len(found)} rows", end="\r", flush=True)
    for title, found_of in (("float32", ours), ("PyTorch's float32", theirs)):
        print(f"{title:28}{'median':>10}{'largest':>10}{'allowed':>10}{'above':>16}")
        for name, values in found_of.items():
            if values:
                allowed, most = _ALLOWED[name], max(values)
                above = f"{sum(v > allowed for v in values):,} of {len(values):,}"
                print(f"{name:28}{np.median(values):10.1e}{most:10.1e}{allowed:10.0e}{above:>16}")


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
