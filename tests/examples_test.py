"""Rows of every schema, good and bad."""

import json

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gradjax.config import Reading
from gradjax.data.examples import is_single_turn, to_example
from gradjax.data.sources import row_hash
from gradjax.errors import GradjaxError
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
        ({"prompt": "q", "completion": "a"}, "q", "a"),
        ({"prompt": "q", "response": "a", "id": 3}, "q", "a"),
        ({"Question": "q", "Answer": "a"}, "q", "a"),
        ({"query": "q", "response": "a"}, "q", "a"),
        ({"INSTRUCTION": "q", "Input": "x", "OUTPUT": "a"}, "q\nx", "a"),
        ({"instruction": "q", "input": float("nan"), "output": "a"}, "q", "a"),
        ({"instruction": "q", "input": pd.NA, "output": "a"}, "q", "a"),
        # Dolly, OpenOrca, Alpaca and ShareGPT with system, TRL's conversations, preference pairs
        ({"instruction": "q", "context": "x", "response": "a", "category": "qa"}, "q\nx", "a"),
        ({"system_prompt": "s", "question": "q", "response": "a"}, "s\nq", "a"),
        ({"instruction": "q", "input": "", "output": "a", "system": "s"}, "s\nq", "a"),
        ({"instruction": "q", "output": "a", "system": " ", "history": []}, "q", "a"),
        (
            {
                "system": "s",
                "conversations": turns(("human", "q"), ("gpt", "a"), keys=("from", "value")),
            },
            "s\nq",
            "a",
        ),
        ({"prompt": turns(("user", "q")), "completion": turns(("assistant", "a"))}, "q", "a"),
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, "q", "a"),
        ({"prompt": "q", "chosen": turns(("user", "q"), ("assistant", "a"))}, "q", "a"),
        ({"prompt": turns(("user", "q")), "chosen": turns(("assistant", "a"))}, "q", "a"),
        (
            {"messages": turns(("user", [{"type": "text", "text": "q"}]), ("assistant", "a"))},
            "q",
            "a",
        ),
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
        ({"text": "### Q: q ### A: a"}, "the row is one 'text'"),
        ({"prompt": "q", "completion": 5}, "'completion' is a int"),
        ({"instruction": "q", "output": "a", "history": ["x"]}, "'history' is no list of"),
        ({"chosen": "a", "rejected": "b"}, "'chosen' is an answer, and the row has no prompt"),
        (
            {"messages": turns(("user", [{"type": "image", "url": "x"}]), ("assistant", "a"))},
            "turn 1 of 'messages' holds a part that is no text ('image')",
        ),
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
            {"messages": turns(("user", "q"), ("robot", "a"))},
            "turn 2 of 'messages' has the unknown role 'robot'",
        ),
        ({"messages": turns((["user"], "q"))}, "unknown role ['user']"),
        (
            {"messages": turns(("user", "q"), ("assistant", None))},
            "'content' of turn 2 of 'messages' is a null",
        ),
        (
            {"messages": turns(("user", [3]))},
            "turn 1 of 'messages' holds a part that is no text (3)",
        ),
        ({"messages": turns(("user", {"a": 1}))}, "'content' of turn 1 of 'messages' is a dict"),
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


ROW = {
    "id": 1,
    "prompt": "p",
    "chosen": "c",
    "rejected": "r",
    "text": "### Q:\nq ### A:\nx\n### A:\na",
    "instruction": "i",
    "output": "o",
    "Reply": "y",
}


@pytest.mark.parametrize(
    ("options", "instruction", "output", "used"),
    [
        ({}, "i", "o", {"instruction", "output"}),
        ({"columns": ["output=Reply"]}, "i", "y", {"instruction", "Reply"}),
        ({"columns": ["instruction=prompt", "output=Reply"]}, "p", "y", {"prompt", "Reply"}),
        ({"field": "chosen"}, "p", "c", {"prompt", "chosen"}),
        ({"columns": ["chosen=Reply"]}, "p", "y", {"prompt", "Reply"}),
        ({"field": "rejected"}, "p", "r", {"prompt", "rejected"}),
        ({"response_marker": "### A:"}, "### Q:\nq ### A:\nx\n### A:", "a", {"text"}),
    ],
)
def test_a_row_is_read_as_it_is_asked_for(options, instruction, output, used):
    example = to_example(ROW, "g", 0, Reading(**options))
    assert (example.status, example.instruction, example.output) == ("ok", instruction, output)
    assert set(example.ignored) == ROW.keys() - used


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"columns": ["output=answer"]}, "'answer', which --columns names, is missing (found 'id'"),
        ({"response_marker": "### Z:"}, "does not hold --response_marker='### Z:'"),
        ({"columns": ["input=chosen", "text=prompt"]}, "'prompt', which --columns names as text"),
    ],
)
def test_what_is_asked_for_and_not_there_is_said(options, reason):
    example = to_example(ROW, "g", 0, Reading(**options))
    assert example.status == "invalid_row"
    assert reason in example.reason


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"columns": ["outptu=x"]}, "--columns=outptu=x: expected NAME=COLUMN.*output"),
        ({"columns": ["output"]}, "--columns=output: expected NAME=COLUMN"),
        ({"field": "best"}, "--field=best: expected one of chosen, rejected"),
        ({"response_marker": ""}, "--response_marker is empty"),
    ],
)
def test_odd_wishes_are_refused(options, message):
    with pytest.raises(GradjaxError, match=message):
        Reading(**options)


def test_earlier_and_tool_turns_are_kept():
    row = {"instruction": "q2", "output": "a2", "history": [["q", "a"], ["q1", "a1"]]}
    roles = [(m.role, m.content) for m in to_example(row, "g", 0).messages]
    assert roles == [
        (role, f"{letter}{i}")
        for i in ("", "1", "2")
        for role, letter in (("user", "q"), ("assistant", "a"))
    ]
    call = [{"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}]
    row = {
        "messages": [
            {"role": "user", "content": "q"},
            {"role": "assistant", "content": None, "tool_calls": call},
            {"role": "tool", "content": "3"},
            {"role": "assistant", "content": "a"},
        ]
    }
    example = to_example(row, "g", 0)
    assert example.status == "ok"
    assert [m.role for m in example.messages] == ["user", "assistant", "tool", "assistant"]
    assert example.messages[1].to_dict() == {
        "role": "assistant",
        "content": "",
        "tool_calls": call,
    }


def test_what_templates_may_want_of_a_turn_is_kept():
    turn = {"role": "assistant", "content": "a", "reasoning_content": "why", "name": None}
    row = {"messages": [{"role": "user", "content": "q"}, turn]}
    message = to_example(row, "g", 0).messages[1]
    assert message.to_dict() == {"role": "assistant", "content": "a", "reasoning_content": "why"}
    assert message.extra_texts == {"reasoning_content": "why"}


def test_what_belongs_to_the_question_is_read_in_every_form():
    beside = {"input": "x", "history": [["q1", "a1"]], "system": "s"}
    for answer in ({"output": "a"}, {"response": "a"}, {"chosen": "a", "rejected": "b"}):
        example = to_example({"instruction": "q", **beside, **answer}, "g", 0)
        assert [m.content for m in example.messages] == ["s", "q1", "a1", "q\nx", "a"]
        assert set(example.ignored) <= {"rejected"}
    # Column stores and CSV have empty ones.
    row = {"instruction": "q", "output": "a", "history": "", "input": None, "system": ""}
    example = to_example(row, "g", 0)
    assert (example.status, example.instruction) == ("ok", "q")


def test_lists_may_be_arrays_as_pandas_has_them():
    turns = np.array([{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}])
    assert to_example({"messages": turns}, "g", 0).output == "a"
    call = {"role": "assistant", "content": None, "tool_calls": np.array([{"name": "f"}])}
    example = to_example({"messages": [turns[0], call]}, "g", 0)
    assert example.messages[1].extra_texts == {"tool_calls": [{"name": "f"}]}
    for odd in ({(1, 2): 3}, float("nan")):
        call = {"role": "assistant", "content": "a", "tool_calls": [odd]}
        assert to_example({"messages": [turns[0], call]}, "g", 0).status in ("ok", "invalid_row")
    circular: list = []
    circular.append(circular)
    call = {"role": "assistant", "content": "a", "tool_calls": circular}
    example = to_example({"messages": [turns[0], call]}, "g", 0)
    assert example.status == "invalid_row"
    assert "is no JSON" in example.reason


def test_only_columns_that_hold_something_and_were_not_read_are_ignored():
    row = {"instruction": "q", "input": None, "output": "a", "id": 3, "note": float("nan")}
    assert to_example(row, "g", 0).ignored == ("id",)
    row = {"instruction": "ctx", "messages": turns(("user", "q"), ("assistant", "a"))}
    assert to_example(row, "g", 0).ignored == ("instruction",)


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


FIELDS = ["instruction", "output", "input", "messages", "conversations", "prompt", "chosen"]
FIELDS += ["role", "content", "from", "value", "other", "System", "history", "text", "tool_calls"]
keys = st.sampled_from(FIELDS) | st.none() | st.integers() | st.tuples(st.text(max_size=2))

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(keys, inner, max_size=4),
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
