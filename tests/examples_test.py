"""Rows of every schema, good and bad."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gradjax.data.examples import is_single_turn, to_example
from gradjax.data.sources import row_hash
from gradjax.structs import Message

pytestmark = pytest.mark.smoke


def turns(*pairs, keys=("role", "content")):
    return [dict(zip(keys, pair, strict=True)) for pair in pairs]


@pytest.mark.parametrize(
    ("row", "instruction", "output"),
    [
        ({"instruction": "q", "output": "a"}, "q", "a"),
        ({"instruction": "q", "input": "x\n", "output": " a "}, "q\nx\n", " a "),
        ({"instruction": "q", "input": "", "output": "a"}, "q", "a"),
        ({"instruction": "q", "input": None, "output": "a", "ppl": float("nan")}, "q", "a"),
        ({"instruction": "", "output": "a"}, "", "a"),
        ({"messages": turns(("user", "q"), ("assistant", "a"))}, "q", "a"),
        ({"messages": turns(("system", "s"), ("user", "q"), ("assistant", "a"))}, "s\nq", "a"),
        (
            {"conversations": turns(("human", "q"), ("gpt", "a"), keys=("from", "value"))},
            "q",
            "a",
        ),
        ({"conversations": turns(("user", "q"), ("assistant", "a"))}, "q", "a"),
        # Column stores fill the forms that a row does not have with null.
        (
            {"instruction": None, "output": None, "messages": turns(("user", "q"), ("gpt", "a"))},
            "q",
            "a",
        ),
        (
            {
                "instruction": "q",
                "response": "a",
                "conversations": turns(("user", "q"), ("gpt", "a")),
            },
            "q",
            "a",
        ),
        ({"instruction": "q", "output": "a", "messages": None}, "q", "a"),
    ],
)
def test_single_turn_rows(row, instruction, output):
    example = to_example(row, "g", 5)
    assert (example.status, example.reason) == ("ok", "")
    assert (example.instruction, example.output) == (instruction, output)
    assert (example.group, example.example_id, example.row_hash) == ("g", 5, row_hash(row))
    assert is_single_turn(example.messages)


def test_pairs_and_conversations_have_the_same_messages():
    expected = (Message("user", "q\nx"), Message("assistant", "a"))
    rows = [
        {"instruction": "q", "input": "x", "output": "a"},
        {"messages": turns(("user", "q\nx"), ("assistant", "a"))},
        {"conversations": turns(("human", "q\nx"), ("gpt", "a"), keys=("from", "value"))},
    ]
    assert [to_example(row, "g", 0).messages for row in rows] == [expected] * 3


def test_conversations_show_their_last_answer():
    row = {
        "messages": turns(
            ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"), ("user", "e")
        )
    }
    example = to_example(row, "g", 0)
    assert example.status == "ok"
    assert example.instruction == "user: a\n\nassistant: b\n\nuser: c"
    assert example.output == "d"
    assert len(example.messages) == 5
    assert not is_single_turn(example.messages)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ([1], "the row is a list, expected an object"),
        ("text", "the row is a str"),
        (None, "the row is a null"),
        ({}, "'instruction' is missing (found no fields)"),
        ({"prompt": "q", "\x1b[31m": 1}, "'instruction' is missing (found 'prompt', '\\x1b[31m')"),
        ({"instruction": "q"}, "'output' is missing (found 'instruction')"),
        ({"instruction": "q", "output": None}, "'output' is a null, expected a string"),
        ({"instruction": 3, "output": "a"}, "'instruction' is a int"),
        ({"instruction": "q", "output": ["a"]}, "'output' is a list"),
        ({"instruction": "q", "input": {}, "output": "a"}, "'input' is a dict"),
        (
            {"instruction": "q\ud83d", "output": "a"},
            "'instruction' holds half of a surrogate pair at character 1",
        ),
        ({"messages": "hi"}, "'messages' is a str, expected a list"),
        ({"messages": []}, "'messages' has no assistant turn among its 0 turns"),
        ({"messages": turns(("user", "q"))}, "no assistant turn"),
        ({"messages": turns(("system", "s"), ("assistant", "a"))}, "no user turn before"),
        ({"messages": ["hi"]}, "turn 1 of 'messages' is a str, expected an object"),
        ({"messages": [{"role": "user"}]}, "turn 1 of 'messages' has no field 'content'"),
        ({"messages": [{"content": "q"}]}, "turn 1 of 'messages' has no field 'role'"),
        (
            {"messages": turns(("user", "q"), ("tool", "a"))},
            "turn 2 of 'messages' has the unknown role 'tool'",
        ),
        ({"messages": turns((["user"], "q"))}, "unknown role ['user']"),
        (
            {"messages": turns(("user", "q"), ("assistant", None))},
            "'content' of turn 2 of 'messages' is a null",
        ),
        (
            {"messages": turns(("user", [{"text": "q"}]))},
            "'content' of turn 1 of 'messages' is a list",
        ),
        ({"conversations": [{"from": "human"}]}, "turn 1 of 'conversations' has no field 'value'"),
        ({"conversations": turns(("bot" * 99, "q"))}, "unknown role 'botbot"),
    ],
)
def test_unusable_rows_keep_their_place_and_say_why(row, reason):
    example = to_example(row, "g", 5)
    assert example.status == "invalid_row"
    assert reason in example.reason
    assert (example.group, example.example_id, example.row_hash) == ("g", 5, row_hash(row))
    assert (example.instruction, example.output, example.messages) == ("", "", ())
    assert len(example.reason) < 300


@pytest.mark.parametrize("output", ["", " \n\t", "\u2028"])
def test_blank_responses_are_empty(output):
    example = to_example({"instruction": "q", "output": output}, "g", 0)
    assert example.status == "empty_response"
    assert "turn 2" in example.reason
    assert (example.instruction, example.output) == ("q", output)
    row = {
        "messages": turns(("user", "q"), ("assistant", output), ("user", "r"), ("assistant", "a"))
    }
    assert to_example(row, "g", 0).status == "empty_response"


FIELDS = ["instruction", "output", "input", "messages", "conversations"]
FIELDS += ["role", "content", "from", "value", "other"]

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(FIELDS), inner, max_size=4)
    ),
    max_leaves=12,
)


@given(json_values)
@settings(deadline=None)
def test_no_row_raises(row):
    example = to_example(row, "g", 0)
    assert (example.status == "ok") == (example.reason == "")
    json.dumps(example.reason).encode("ascii")
    for text in (example.instruction, example.output, example.reason):
        text.encode("utf-8")
