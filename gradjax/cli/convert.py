"""Writes a checkpoint once in a form that any mesh reads straight into its shards.

  python -m gradjax.convert --model=qwen2.5_72b --output=/disk/qwen2.5_72b
  python -m gradjax.main --model=/disk/qwen2.5_72b --mesh=fsdp:8

Weights keep the dtype of their files (float32 where that is neither bfloat16 nor float32), so that
runs of either form have the same numbers to the bit, and one may go on with a run of the other.
"""

from absl import flags

flags.DEFINE_string("model", None, "as in gradjax.main", required=True)
flags.DEFINE_string("output", None, "a new directory, or gs:// or s3:// URL", required=True)


def main(_: list[str]) -> None:
    """Converts and says what `--model` now takes."""
    from gradjax.checkpoints.pretrained import convert

    convert(flags.FLAGS.model, flags.FLAGS.output)
    print(f"--model={flags.FLAGS.output} loads it")
