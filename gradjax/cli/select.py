"""`gradjax select`: the best rows of a data set, the worst, as many at random."""

from absl import flags

from gradjax.cli.command import Command
from gradjax.cli.data import PUSH, define_data_flags
from gradjax.select.rule import MATCHING
from gradjax.structs import ATTENTION

FLAGS = flags.FlagValues()
SCORES = """a directory written by gradjax score, or by gradjax spectra (its gradient statistics),
repeatable: their rows must be the same"""
DATA = """[GROUP=]SOURCE, repeatable: where the rows are (default: where they were when scored).
Without --scores the numbers are fields of the rows"""
BY = """METRIC, the higher the better, or several, METRIC*WEIGHT,...: then each counts by its
percentile among the usable rows, times its weight. A METRIC is a column of --scores, else a number
that the rows have"""
TOP = "the N highest rows, or a share of the usable ones, as in 10%"
BOTTOM = "the same for the lowest rows; --seed decides between equal values at a cutoff"
RANGE = """LOW:HIGH, ends included, either may be left out: choose among the rows whose value by
--by lies within; without --top and --bottom, all of them"""
RANDOM = """N of the usable rows at random, or a share of them, within --range if that is given,
whether or not they are in high or low"""
SEED = "seed of ties and of the random rows"
LAYERS = """layers over which the statistics of a run among --scores are averaged: all, or numbers
and ranges from 0, as in 0-5,8"""
OUTPUT_DIR = "where to write (default: selections/{by})"
OVERWRITE = "replace a selection with other settings"
GROUPS = {
    "Scores and rows": [
        flags.DEFINE_multi_string("scores", [], SCORES, FLAGS),
        *define_data_flags(FLAGS, [], DATA, limit=None),
        flags.DEFINE_string("layers", "all", LAYERS, FLAGS),
        flags.DEFINE_list(
            "projections",
            list(ATTENTION),
            "the same, some of q,k,v,o,gate,up,down",
            FLAGS,
        ),
    ],
    "Which rows are chosen": [
        flags.DEFINE_string("by", None, BY, FLAGS, required=True),
        flags.DEFINE_string("top", None, TOP, FLAGS),
        flags.DEFINE_string("bottom", None, BOTTOM, FLAGS),
        flags.DEFINE_string("range", None, RANGE, FLAGS),
        flags.DEFINE_string("random", None, RANDOM, FLAGS),
        flags.DEFINE_boolean("match_length", False, MATCHING, FLAGS),
        flags.DEFINE_integer("seed", 0, SEED, flag_values=FLAGS),
    ],
    "Output": [
        flags.DEFINE_string("output_dir", None, OUTPUT_DIR, FLAGS),
        flags.DEFINE_boolean("overwrite", False, OVERWRITE, FLAGS),
        flags.DEFINE_string("push_to_hub", None, PUSH, FLAGS),
    ],
}
DETAILS = """
Writes to --output_dir: high, low, range and random, whichever are asked for,
each as .jsonl (the rows as they stand in their source, for --data of gradjax
spectra) and .parquet (with their numbers); rejected.parquet, every other row
with the reason; summary.json, which is printed. With --match_length also
pairs.parquet: row i of high and row i of low are a pair.

A row is not usable if its status is not ok, if it lacks a number of a metric of
--by, or if that number is an ifd outside 0 to 1 or a perplexity over 10000 (as
most rows have by a weak model).
"""


def main() -> None:
    """Selects, then prints the summary and where the files are."""
    from gradjax.select.write import select_rows
    from gradjax.storage.hub import push_selection, require_repo

    values = FLAGS.flag_values_dict()
    if repo := values.pop("push_to_hub"):
        require_repo(repo, values["output_dir"])
    written = select_rows(**values)
    print(f"{written.text}\n\nThe selection is in {written.directory}")
    if repo:
        print(f"Pushed to {push_selection(written.directory, repo, values['by'], written.text)}")


COMMAND = Command(
    program="gradjax select",
    summary="Chooses the best and the worst rows, by scores or by gradients.",
    examples=(
        "gradjax select --scores=scores/wizardlm --by=ifd --top=200 --bottom=200",
        "gradjax select --scores=runs/mine --by=effective_rank --top=10% --random=10%",
        "gradjax select --scores=scores/mine --scores=runs/mine --top=500 \\\n"
        "      --by='reward,effective_rank*0.5' --match_length",
        "gradjax select --data=wizardlm.json --by=instag --top=200 --bottom=200",
    ),
    details=DETAILS,
    groups=GROUPS,
    flags=FLAGS,
    main=main,
)
