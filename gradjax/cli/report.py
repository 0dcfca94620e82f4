"""Tables, figures and verdicts of a run: do its groups differ, and is it more than length?

Writes to --output_dir (RUN/report by default): report.html, comparisons.csv, the paper's tables as
CSV, Markdown and LaTeX, and figures as PNG and SVG; prints the verdicts.

  python -m gradjax.report --run=runs/demo --compare=slow:fast --compare=slow:corrupted
  python -m gradjax.report --run=runs/mine --equal_length_run=runs/mine_64
  python -m gradjax.report --run=runs/qwen2.5_1.5b --run=runs/gemma2_2b --compare=high:low
  python -m gradjax.report --run=runs/qwen2.5_7b --compare=high:low --published=wizardlm/ifd_gpt2
"""

from absl import flags

RUN = "a run's directory or URL, repeatable: further ones are shown beside the first"
COMPARE = "HIGH:LOW, two groups, repeatable (default: the first group with each other one)"
EQUAL_LENGTH = """a run of the same rows with --target_tokens=N: the primary view where fewer than
half of the rows can be matched on length; one per --run, in the same order"""
BY = "grain of the spectra table: projection (as in the paper), layer or example"
PUBLISHED = "DATASET/METRIC: the paper's numbers for the run's model beside the measured ones"

flags.DEFINE_multi_string("run", None, RUN, required=True)
flags.DEFINE_multi_string("compare", [], COMPARE)
flags.DEFINE_multi_string("equal_length_run", [], EQUAL_LENGTH)
flags.DEFINE_string("output_dir", None, "where to write (default: report/ in the first run)")
flags.DEFINE_enum("by", "projection", ["projection", "layer", "example"], BY)
flags.DEFINE_string("layers", "all", "all, or numbers and ranges from 0, as in 0-5,8")
flags.DEFINE_string("published", None, PUBLISHED)


def main(_: list[str]) -> None:
    """Writes the report, prints its verdicts and where it is."""
    values = flags.FLAGS
    from gradjax.report.write import ReportConfig, write_report

    config = ReportConfig(
        runs=tuple(values.run),
        compare=tuple(values.compare),
        equal_length_runs=tuple(values.equal_length_run),
        output_dir=values.output_dir,
        by=values.by,
        layers=values.layers,
        published=values.published,
    )
    written = write_report(config)
    print("\n".join(written.verdicts))
    print(f"\nThe report is in {written.directory}: open report.html")
