"""What gradjax writes as JSON, read by a reader that takes no NaN and no infinity."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradjax import strict_json
from gradjax.storage.directory import SCORES, Directory
from gradjax.storage.filesystem import write_json_lines

pytestmark = pytest.mark.smoke

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)
NO_NUMBERS = {"a": [1.5, math.nan, {"b": (math.inf, -math.inf, 2)}], "c": "NaN"}


def read(text: str | bytes) -> Any:
    """Parsed by the standard: Python's own reader also takes what no other does."""

    def refuse(name: str) -> None:
        raise ValueError(f"{name} is no JSON")

    return json.loads(text, parse_constant=refuse)


def same(read: Any, written: Any) -> bool:
    if isinstance(written, float) and not math.isfinite(written):
        return read is None
    if isinstance(written, dict):
        return read.keys() == written.keys() and all(same(read[k], written[k]) for k in written)
    if isinstance(written, list | tuple):
        return len(read) == len(written) and all(map(same, read, written))
    return type(read) is type(written) and read == written


@given(VALUES)
def test_numbers_that_json_lacks_are_null_and_all_else_stays(value: Any):
    assert same(read(strict_json.dumps(value)), value)


def test_files_of_every_kind(tmp_path: Path):
    directory = Directory(tmp_path, SCORES)
    with directory.place.lock(0):
        directory.write_manifest(NO_NUMBERS)
    write_json_lines([NO_NUMBERS, NO_NUMBERS], tmp_path / "rows.jsonl")
    texts = [(tmp_path / "score.json").read_bytes()]
    texts += (tmp_path / "rows.jsonl").read_bytes().splitlines()
    assert len(texts) == 3
    assert all(same(read(text), NO_NUMBERS) for text in texts)


def test_files_are_written_by_no_other_function():
    """`json.dumps` stays where nothing is written: messages, hashes, texts of another process."""
    no_files = {
        *("checkpoints/gpt2.py", "checkpoints/resolve.py", "checkpoints/hf_config.py"),
        *("data/tokens.py", "data/examples.py", "data/sources.py", "runs/run.py"),
        *("score/endpoint.py", "storage/hub.py", "demo/tokenizer.py", "strict_json.py"),
        "storage/reference.py",  # aside, to be written by write_json_lines
    }
    package = Path(strict_json.__file__).parent
    found = {
        str(path.relative_to(package))
        for path in package.rglob("*.py")
        if "json.dump" in path.read_text().replace("strict_json.dump", "")
    }
    assert found <= no_files
