"""How far bfloat16 is from float32, on the embedded model and data.

  python -m benchmarks.precision

Relative differences of each row's loss, and of each row's mean over layers per projection of
nuclear norm and effective rank: the median and the largest over all rows.
"""

import numpy as np

import gradjax
from gradjax.cli.app import start
from gradjax.data.word_problems import DEMO_GROUPS, demo_rows
from gradjax.structs import ATTENTION


def numbers(dtype: str) -> dict[str, np.ndarray]:
    """Each measure by name, one value per row of the embedded groups."""
    model = gradjax.load_model("demo", dtype=dtype)
    rows = [row for group in DEMO_GROUPS for row in demo_rows(group)]
    results = sorted(
        gradjax.gradient_spectra(model, rows, similarity="none"),
        key=lambda result: result.tokenized.example.example_id,
    )
    found = {"loss": np.array([result.loss for result in results])}
    for measure in ("nuclear_norm", "effective_rank"):
        for p in ATTENTION:
            found[f"{measure} {p}"] = np.array(
                [
                    np.mean([getattr(s, measure) for s in result.spectra if s.projection == p])
                    for result in results
                ]
            )
    return found


def main(_: list[str]) -> None:
    """Prints the table."""
    exact, rounded = numbers("float32"), numbers("bfloat16")
    print(f"{'':18}{'median':>9}{'largest':>9}{'mean, float32':>15}{'mean, bfloat16':>16}")
    for name, values in exact.items():
        relative = np.abs(rounded[name] / values - 1)
        print(
            f"{name:18}{np.median(relative):9.2%}{relative.max():9.1%}"
            f"{values.mean():15.5g}{rounded[name].mean():16.5g}"
        )


if __name__ == "__main__":
    start(main)
