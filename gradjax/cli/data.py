"""The flags that say what rows are read, and how: of every command that reads rows."""

from typing import Any, get_args

from absl import flags

from gradjax.config import PreferenceField

DATA = """[GROUP=]SOURCE, repeatable. SOURCE: files (.json, .jsonl, .csv, .tsv, .parquet, also
.gz or .zst) by path, URL, glob, folder or A,B; a saved datasets directory; a Hub data set
(ORG/NAME[:CONFIG][@SPLIT]); one of gradjax prepare --list; or demo. GROUP: the file's stem if
not given"""
LIMIT = "use the first N rows of each group (default: all)"
COLUMNS = """where rows have their texts, if they are not found, as in
instruction=prompt,output=completion"""
FIELD = "which answer of preference pairs is taken (default: chosen, of rows with nothing else)"
MARKER = "of rows that are one text: the response is what comes after the last of these"
REVISION = "commit, tag or branch of Hub data sets"
STRICT = "refuse a file with a line that cannot be read, instead of counting it as an invalid row"


PUSH = """ORG/NAME: upload what is finished to this data set of the Hugging Face Hub, with a card
(needs HF_TOKEN; the rows' texts go along; a new data set is private)"""


def define_data_flags(
    values: flags.FlagValues, default: list[str], data: str = DATA, limit: str | None = LIMIT
) -> list[flags.FlagHolder[Any]]:
    """`--data` and what goes with it, in `values`; `data` and `limit` are their help."""
    fields = get_args(PreferenceField)
    holders: list[flags.FlagHolder[Any]] = [
        flags.DEFINE_multi_string("data", default, data, values),
        flags.DEFINE_list("columns", [], COLUMNS, values),
        flags.DEFINE_enum("field", None, fields, FIELD, values),
        flags.DEFINE_string("response_marker", None, MARKER, values),
        flags.DEFINE_string("data_revision", None, REVISION, values),
        flags.DEFINE_boolean("strict", False, STRICT, values),
    ]
    if limit:
        holders.insert(1, flags.DEFINE_integer("limit", None, limit, flag_values=values))
    return holders
