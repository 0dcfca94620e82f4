"""Writes a group of a run in another tool's format.

  python -m gradjax.export --run=runs/demo --format=reference --group=slow --output=slow.jsonl

`reference` is the file that the paper's plotting scripts read: one JSON object per `ok` row, in
input order.
"""


from absl import flags

flags.DEFINE_string("run", None, "the directory that gradjax.main wrote", required=True)
flags.DEFINE_enum("format", "reference", ["reference"], "of the output")
flags.DEFINE_string("group", None, "the group to export", required=True)
flags.DEFINE_string("output", None, "the .jsonl file to write", required=True)
