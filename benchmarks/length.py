"""How often the report's verdict is right: groups simulated with known truth.

  python -m benchmarks.length

Prints, for each relation of a statistic to response length, noise of its logarithm and AUROC of
length, the share of simulated comparisons that say "yes": with length alone at work, and with an
effect of half a standard deviation of the noise besides.
"""

import numpy as np
from absl import flags
from scipy.stats import norm

from gradjax.cli.app import start
from gradjax.report.length import Lengths, match, matched_effect

DATA_SETS, ROWS = 300, 200
AUROCS = (0.6, 0.75, 0.9, 0.95)
NOISES = (0.6, 0.2, 0.05)
RELATIONS = {"power law": lambda t: t**0.7, "saturating": lambda t: t / (t + 150)}

flags.DEFINE_integer("data_sets", DATA_SETS, "simulated per cell")


def draw_lengths(rng: np.random.Generator, auroc: float) -> tuple[Lengths, Lengths]:
    """Lognormal lengths of `ROWS` rows of high and of low, whose AUROC is the one given."""
    shift = np.sqrt(2) * norm.ppf(auroc) / 2
    logs = 5 + 0.7 * rng.standard_normal((2, ROWS)) + 0.7 * np.array([[shift], [-shift]])
    target = np.maximum(np.exp(logs), 1).astype(int)
    prompt = rng.integers(5, 150, (2, ROWS))
    return Lengths(target[0], prompt[0]), Lengths(target[1], prompt[1])


def share_of_yes(
    auroc: float, noise: float, relation: str, effect: float, data_sets: int = DATA_SETS
) -> float:
    """Of simulated data sets; `effect` is in standard deviations of the noise."""
    rng = np.random.default_rng(int(1000 * auroc + 100 * noise))
    yes = 0
    for _ in range(data_sets):
        lengths = draw_lengths(rng, auroc)
        high, low = (
            RELATIONS[relation](side.target) * np.exp(noise * rng.standard_normal(ROWS))
            for side in lengths
        )
        high = high * np.exp(effect * noise)
        logs = lengths[0].logs, lengths[1].logs
        found = matched_effect(high, low, *logs, match(*lengths))
        yes += found is not None and found.verdict == "yes"
    return yes / data_sets


def main(_: list[str]) -> None:
    """Prints one row per relation and noise."""
    data_sets = flags.FLAGS.data_sets
    columns = [(0.0, auroc) for auroc in AUROCS] + [(0.5, auroc) for auroc in AUROCS[:2]]
    print(f"{'yes, of':17}{'length alone, AUROC':32}effect of 0.5, AUROC")
    print(f"{data_sets:<3}{'noise':>12}" + "".join(f"{auroc:8}" for _, auroc in columns))
    for relation in RELATIONS:
        for noise in NOISES:
            cells = [
                f"{share_of_yes(auroc, noise, relation, effect, data_sets):8.1%}"
                for effect, auroc in columns
            ]
            print(f"{relation:10}{noise:5}" + "".join(cells), flush=True)


if __name__ == "__main__":
    start(main)
