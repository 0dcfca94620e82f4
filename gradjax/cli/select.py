"""The best rows of a data set, the worst, as many at random: chosen by scores or by gradients.

Writes to --output_dir: high, low, range and random, whichever are asked for, each as .jsonl (the
rows as they stand in their source, for gradjax.main --data) and .parquet (with their numbers);
rejected.parquet, every other row with the reason; summary.json, which is printed.

  python -m gradjax.select --scores=scores/wizardlm --by=ifd --top=200 --bottom=200
  python -m gradjax.select --scores=runs/mine --by=effective_rank --top=10% --random=10%
  python -m gradjax.select --scores=scores/mine --scores=runs/mine --by=reward,effective_rank*0.5 \\
      --top=500 --match_length
  python -m gradjax.select --data=wizardlm.json --by=instag --top=200 --bottom=200 --seed=1

Not usable are rows whose status is not ok or that have no number of a metric of --by, an ifd
outside 0 to 1, or a perplexity over 10000 (as most have by a weak model).
"""

from absl import flags

from gradjax.select.rule import MATCHING, Rule, parse_amount, parse_range, parse_terms
from gradjax.structs import PROJECTIONS

SCORES = """a directory written by gradjax.score, or by gradjax.main (its gradient statistics),
repeatable: their rows must be the same"""
DATA = """[GROUP=]SOURCE, repeatable: where the rows are (default: where they were when scored).
Without --scores the numbers are fields of the rows"""
BY = """METRIC, the higher the better, or several, METRIC*WEIGHT,...: then each counts by its
percentile among the usable rows, times its weight. Names are of the scores, else of the rows"""
TOP = "the N highest rows, or a share of the usable ones, as in 10%"
BOTTOM = "likewise the lowest; ties at either cutoff are drawn by --seed"
RANGE = """LOW:HIGH, ends included, either may be left out: choose among the rows whose value by
--by lies within; without --top and --bottom, all of them"""
RANDOM = """N of the usable rows at random, or a share of them, within --range if that is given,
whether or not they are in high or low"""
LAYERS = """over which the statistics of a run among --scores are averaged: all, or numbers and
ranges from 0"""
OUTPUT_DIR = "where to write (default: selections/{by})"

flags.DEFINE_multi_string("scores", [], SCORES)
flags.DEFINE_multi_string("data", [], DATA)
flags.DEFINE_string("by", None, BY, required=True)
flags.DEFINE_string("top", None, TOP)
flags.DEFINE_string("bottom", None, BOTTOM)
flags.DEFINE_string("range", None, RANGE)
flags.DEFINE_string("random", None, RANDOM)
flags.DEFINE_boolean("match_length", False, MATCHING)
flags.DEFINE_string("layers", "all", LAYERS)
flags.DEFINE_list("projections", list(PROJECTIONS), "likewise, some of q,k,v,o")
flags.DEFINE_integer("seed", 0, "of ties, of the random rows and of the order of matching")
flags.DEFINE_string("output_dir", None, OUTPUT_DIR)
flags.DEFINE_boolean("overwrite", False, "replace a selection with other settings")


def main(_: list[str]) -> None:
    """Selects, then prints the summary and where the files are."""
    values = flags.FLAGS
    from gradjax.select.write import SelectConfig, write_selection

    rule = Rule(
        by=parse_terms(values.by),
        top=parse_amount("top", values.top),
        bottom=parse_amount("bottom", values.bottom),
        range=parse_range(values.range),
        random=parse_amount("random", values.random),
        match_length=values.match_length,
        seed=values.seed,
    )
    written = write_selection(
        SelectConfig(
            rule,
            scores=tuple(values.scores),
            data=tuple(values.data),
            layers=values.layers,
            projections=tuple(values.projections),
            output_dir=values.output_dir,
            overwrite=values.overwrite,
        )
    )
    print(f"{written.text}\n\nThe selection is in {written.directory}")
