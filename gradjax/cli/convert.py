"""`gradjax convert`: a checkpoint in the form that a mesh reads fastest."""

from absl import flags

from gradjax.cli.command import Command

FLAGS = flags.FlagValues()
MODEL = "as in gradjax spectra: registered name, Hub repo or local directory"
OUTPUT = "a new directory, or gs:// or s3:// URL"
GROUPS = {
    "Model": [flags.DEFINE_string("model", None, MODEL, FLAGS, required=True)],
    "Output": [flags.DEFINE_string("output", None, OUTPUT, FLAGS, required=True)],
}
DETAILS = """
Each device of a mesh then reads its own part of the weights only. Weights keep
the dtype of their files (float32 where that is neither bfloat16 nor float32):
runs from either form have the same numbers to the bit, and a run that was
started with one may go on with the other.
"""


def main() -> None:
    """Converts and says what `--model` now takes."""
    from gradjax.checkpoints.pretrained import convert

    convert(FLAGS.model, FLAGS.output)
    print(f"--model={FLAGS.output} loads it")


COMMAND = Command(
    program="gradjax convert",
    summary="Writes a model once in a form that several devices load fast.",
    examples=(
        "gradjax convert --model=qwen2.5_72b --output=/disk/qwen2.5_72b",
        "gradjax spectra --model=/disk/qwen2.5_72b --mesh=fsdp:8",
    ),
    details=DETAILS,
    groups=GROUPS,
    flags=FLAGS,
    main=main,
)
