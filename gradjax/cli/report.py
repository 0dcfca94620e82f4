"""`gradjax report`: tables, figures and verdicts of runs."""

from absl import flags

from gradjax.cli.command import Command
from gradjax.config import NEGLIGIBLE

FLAGS = flags.FlagValues()
RUN = "a run's directory or URL, repeatable: further ones are shown beside the first"
COMPARE = "HIGH:LOW, two groups, repeatable (default: the first group with each other one)"
EQUAL_LENGTH = """a run of the same rows with --target_tokens=N: decides where fewer than half
of the rows can be matched on length; one per --run, in the same order"""
BY = "the spectra table has a line per projection (as in the paper), layer or example"
PUBLISHED = """DATASET/METRIC: shows the paper's numbers for the run's model beside the measured
ones; DATASET/METRIC:TABLE: as that table prints them (default: the first that does)"""
PAIR_BY = """column of the data that says which rows of the groups are pairs (default: those of one
prompt)"""
CLUSTER_BY = """column of the data that says which rows count together (default: those of one
prompt)"""
NO_MATTER = "standard deviations, of what length leaves, that are of no importance"
SUMMARY = """one table (summary.csv) and one page of the verdicts of all runs, instead of tables,
figures and examples of each"""
OUTPUT_DIR = "where to write (default: report/, or summary/, in the first run)"
LAYERS = "all, or numbers and ranges from 0, as in 0-5,8"
GROUPS = {
    "Runs": [
        flags.DEFINE_multi_string("run", None, RUN, FLAGS, required=True),
        flags.DEFINE_multi_string("equal_length_run", [], EQUAL_LENGTH, FLAGS),
    ],
    "What is compared": [
        flags.DEFINE_multi_string("compare", [], COMPARE, FLAGS),
        flags.DEFINE_string("layers", "all", LAYERS, FLAGS),
        flags.DEFINE_enum("by", "projection", ["projection", "layer", "example"], BY, FLAGS),
        flags.DEFINE_string("pair_by", None, PAIR_BY, FLAGS),
        flags.DEFINE_string("cluster_by", None, CLUSTER_BY, FLAGS),
        flags.DEFINE_float("negligible", NEGLIGIBLE, NO_MATTER, flag_values=FLAGS),
        flags.DEFINE_string("published", None, PUBLISHED, FLAGS),
    ],
    "Output": [
        flags.DEFINE_boolean("summary", False, SUMMARY, FLAGS),
        flags.DEFINE_string("output_dir", None, OUTPUT_DIR, FLAGS),
    ],
}
DETAILS = """
Do the groups differ, and is it more than the length of their responses?
Writes report.html, comparisons.csv, layers.csv, the paper's tables as CSV,
Markdown and LaTeX, and figures as PNG and SVG; prints the verdicts. With
--summary only summary.csv, rows.csv and report.html, of all runs together.
"""


def main() -> None:
    """Writes the report, prints its verdicts and where it is."""
    from gradjax.report.write import ReportConfig, write_report

    config = ReportConfig(
        runs=tuple(FLAGS.run),
        compare=tuple(FLAGS.compare),
        equal_length_runs=tuple(FLAGS.equal_length_run),
        output_dir=FLAGS.output_dir,
        summary=FLAGS.summary,
        by=FLAGS.by,
        layers=FLAGS.layers,
        published=FLAGS.published,
        pair_by=FLAGS.pair_by,
        cluster_by=FLAGS.cluster_by,
        negligible=FLAGS.negligible,
    )
    written = write_report(config)
    print("\n".join(written.verdicts))
    print(f"\nThe report is in {written.directory}: open report.html in a browser")


COMMAND = Command(
    program="gradjax report",
    summary="Compares groups of a run: tables, figures, verdicts, one page.",
    examples=(
        "gradjax report --run=runs/demo --compare=slow:fast",
        "gradjax report --run=runs/mine --equal_length_run=runs/mine_64",
        "gradjax report --run=runs/by_qwen --run=runs/by_gemma --compare=high:low",
        "gradjax report --run=runs/mine --compare=a:b --published=wizardlm/ifd_gpt2",
        "gradjax report --run=runs/a --run=runs/b --run=runs/c --summary",
    ),
    details=DETAILS,
    groups=GROUPS,
    flags=FLAGS,
    main=main,
)
