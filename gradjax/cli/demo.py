"""`gradjax demo`: the embedded example, from rows to verdicts."""

from absl import flags

from gradjax.cli.command import Command
from gradjax.config import RunConfig, TokenConfig, as_directory
from gradjax.errors import GradjaxError, extras

FLAGS = flags.FlagValues()
TARGET_TOKENS = 5  # the shortest responses of the example have no more
OUTPUT_DIR = f"""directory of the run of whole responses; the other run is written to the same name
and _{TARGET_TOKENS}_tokens"""
GROUPS = {"Output": [flags.DEFINE_string("output_dir", "runs/demo", OUTPUT_DIR, FLAGS)]}
DETAILS = f"""
A small model that comes with gradjax, and three groups of word problems:
worked out (slow), the bare answer (fast), worked out wrongly (corrupted). Runs
gradjax spectra on whole responses, and on their first {TARGET_TOKENS} tokens, so that length
cannot be the reason of a difference; then gradjax report on both. Needs no
network and takes about a minute. Called again, it goes on where it stopped.
"""


def main() -> None:
    """Runs the example; prints the table of groups, the verdicts and where the report is."""
    from gradjax.runs.run import run
    from gradjax.storage.results import format_table, group_means

    output_dir = as_directory(FLAGS.output_dir)
    beside = f"{output_dir}_{TARGET_TOKENS}_tokens"
    whole = run(RunConfig(output_dir=output_dir))
    equal = run(
        RunConfig(output_dir=as_directory(beside), tokens=TokenConfig(target_tokens=TARGET_TOKENS))
    )
    print(format_table(group_means(whole)))
    try:
        with extras():
            from gradjax.report.write import ReportConfig, write_report
    except GradjaxError as missing:
        print(f"\nNo report: {missing}\n\nThe runs are in {whole} and {equal}")
        return
    config = ReportConfig(runs=(str(whole),), equal_length_runs=(str(equal),))
    written = write_report(config)
    print("\n".join(["", *written.verdicts]))
    print(f"\nThe report is in {written.directory}: open report.html in a browser")


COMMAND = Command(
    program="gradjax demo",
    summary="Runs the embedded example, from rows to verdicts, in a minute.",
    examples=("gradjax demo",),
    details=DETAILS,
    groups=GROUPS,
    flags=FLAGS,
    main=main,
)
