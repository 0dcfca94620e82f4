"""A row, whatever it holds, becomes an `Example`; a bad row gets a status and a reason."""

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from gradjax.config import Reading
from gradjax.data.readers import BadRow
from gradjax.data.sources import row_hash
from gradjax.structs import Example, Message

# What data sets call the four roles.
_ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "ipython": "tool",
    "function": "tool",
    "observation": "tool",
}
# What they call a question and its answer, beside instruction and output.
_PAIRS = (
    ("instruction", "response"),
    ("prompt", "completion"),
    ("prompt", "response"),
    ("question", "answer"),
    ("question", "response"),
    ("query", "response"),
)
_CONVERSATIONS = ("messages", "conversations", "conversation")
_EXPECTED = (
    "expected instruction and output, another pair of that kind (prompt and completion, question "
    "and answer), messages or conversations, or what --columns names"
)


class _InvalidRowError(Exception):
    """Carries the reason why a row cannot be used."""


class _Fields:
    """A row's fields by their standard names, whatever their case; notes which are used."""

    def __init__(self, row: Mapping[Any, Any], names: Mapping[str, str]):
        self.row, self.names = row, names
        self.keys = {key.lower(): key for key in row if isinstance(key, str)}
        self.used: set[object] = set()

    def has(self, *names: str) -> bool:
        """Whether the fields are there, not null and, as pandas says it, not NaN."""
        return all(self._find(name)[1] is not None for name in names)

    def get(self, name: str) -> Any:
        """A field's value, which is used then; None where it is absent, null or NaN."""
        key, value = self._find(name)
        if value is not None:
            self.used.add(key)
        return value

    def text(self, name: str) -> str | None:
        """A field that is a string, if it is there."""
        return None if (value := self.get(name)) is None else _field(value, name)

    def found(self) -> str:
        """The row's keys, for a message."""
        return ", ".join(_quote(key) for key in list(self.row)[:8]) or "no fields"

    def require_named(self) -> None:
        """Raises where a field that --columns names is there and was not used."""
        for name, key in self.names.items():
            if key not in self.used and not _is_absent(self.row.get(key)):
                raise _InvalidRowError(
                    f"the field {_quote(key)}, which --columns names as {name}, has no place "
                    "beside the others that are read"
                )

    def _find(self, name: str) -> tuple[object, Any]:
        key = self.names.get(name)
        if key is not None and key not in self.row:
            raise _InvalidRowError(
                f"the field {_quote(key)}, which --columns names, is missing (found {self.found()})"
            )
        if key is None:
            key = name if name in self.row else self.keys.get(name)
        value = None if key is None else self.row[key]
        if isinstance(value, np.ndarray):  # as pandas has lists
            value = value.tolist()
        return key, None if _is_absent(value) else value


def to_example(row: object, group: str, example_id: int, reading: Reading | None = None) -> Example:
    """Reads a question and its answer, a conversation, or what `reading` says.

    These are `instruction` and `output` (with `input` or `context`, `system`, `history`) or the
    like of other data sets; `messages` or ShareGPT's `conversations`; preference pairs (`chosen`,
    `rejected`); a `text` whose responses a marker begins. Keys are found in any case.

    Never raises: a row that fits none of them has status `invalid_row`, one with a blank
    response `empty_response`, each with a reason. `instruction` and `output` of a
    conversation are what comes before its last assistant turn, and that turn. Columns that were
    not read are in `ignored`.
    """
    digest = row_hash(row)
    try:
        if isinstance(row, BadRow):
            raise _InvalidRowError(row.reason)
        if not isinstance(row, Mapping):
            raise _InvalidRowError(f"the row is a {_kind(row)}, expected an object")
        reading = reading or Reading()
        fields = _Fields(row, reading.names)
        messages = _messages(fields, reading)
        fields.require_named()
    except _InvalidRowError as error:
        return Example(group, example_id, digest, status="invalid_row", reason=str(error))

    last = max(i for i, message in enumerate(messages) if message.role == "assistant")
    blank = [
        i
        for i, message in enumerate(messages, start=1)
        if message.role == "assistant" and not (message.content.strip() or message.extra_texts)
    ]
    return Example(
        group,
        example_id,
        digest,
        instruction=_instruction(messages[:last]),
        output=messages[last].content,
        messages=messages,
        ignored=_ignored(tuple(_name(key) for key in row if key not in fields.used), _absent(row)),
        status="empty_response" if blank else "ok",
        reason=f"the response in turn {blank[0]} is empty or only whitespace" if blank else "",
    )


def is_single_turn(messages: tuple[Message, ...]) -> bool:
    """Whether messages are one question and its answer, perhaps after a system message."""
    roles = [message.role for message in messages]
    return roles in (["user", "assistant"], ["system", "user", "assistant"])


def plain_fault(example: Example) -> str:
    """Why `--prompt_format=plain` cannot take an example; "" if it can."""
    if not is_single_turn(example.messages):
        return f"{len(example.messages)} turns have no plain form; --prompt_format=chat takes them"
    if any(message.extra_texts for message in example.messages):
        return (
            "tool calls and thoughts of a turn have no plain form; --prompt_format=chat takes them"
        )
    return ""


def _messages(fields: _Fields, reading: Reading) -> tuple[Message, ...]:
    """The turns of a row. One may carry several forms: what flags ask for comes first."""
    if reading.response_marker and fields.has(name := reading.field or "text"):
        marked = _marked(fields.text(name) or "", reading.response_marker)
        return _with_system(fields, marked)
    if reading.field:
        return _preference(fields, reading.field)
    # Column stores fill forms that a row does not have with null.
    forms = [("instruction", "output"), *((name,) for name in _CONVERSATIONS), *_PAIRS, ("chosen",)]
    forms.sort(key=lambda names: not any(name in fields.names for name in names))
    form = next((names for names in forms if fields.has(*names)), None)
    if form == ("chosen",):
        return _preference(fields, "chosen")
    if form and len(form) == 1:
        return _with_system(fields, _conversation(fields.get(form[0]), form[0]))
    if form is None and fields.has("text") and not fields.has("instruction"):
        raise _InvalidRowError(
            "the row is one 'text': say what its response comes after with --response_marker"
        )
    return _pair(fields, *(form or forms[0]))


def _pair(fields: _Fields, question: str, answer: str) -> tuple[Message, ...]:
    for name in (question, answer):
        if name not in fields.names and name not in fields.keys:
            raise _InvalidRowError(
                f"the field '{name}' is missing (found {fields.found()}), {_EXPECTED}"
            )
    asked, answered = _asked(fields, question), fields.get(answer)
    if question == "prompt" and isinstance(answered, list | tuple):  # as TRL has them
        return _with_system(fields, _checked((*asked, *_turns(answered, answer)), answer))
    turns = (*asked, Message("assistant", _field(answered, answer)))
    return _with_system(fields, _checked(turns, answer))


def _asked(fields: _Fields, name: str) -> tuple[Message, ...]:
    """A question with what belongs to it, or, in `prompt`, the turns before the answer."""
    asked = fields.get(name)
    if name == "prompt" and isinstance(asked, list | tuple):
        return _turns(asked, name)
    text = _field(asked, name)
    if name == "instruction":
        extra = fields.text("input") or fields.text("context")
        text += "\n" + extra if extra else ""
    return (*_history(fields.get("history")), Message("user", text))


def _field(value: object, name: str) -> str:
    return _text(value, f"the field '{name}'")


def _history(turns: object) -> tuple[Message, ...]:
    """Alpaca's earlier turns: a list of [question, answer]."""
    if turns is None or turns in ("", "[]"):  # as CSV has none
        return ()
    if not isinstance(turns, list | tuple) or not all(
        isinstance(turn, list | tuple) and len(turn) == 2 for turn in turns
    ):
        raise _InvalidRowError("the field 'history' is no list of [question, answer]")
    return tuple(
        Message(role, _text(text, f"the {role}'s text in 'history'"))
        for turn in turns
        for role, text in zip(("user", "assistant"), turn, strict=True)
    )


def _with_system(fields: _Fields, messages: tuple[Message, ...]) -> tuple[Message, ...]:
    """The turns, after the system message that a column of its own holds."""
    if messages[0].role == "system":
        return messages
    system = fields.text("system") or fields.text("system_prompt") or ""
    return (Message("system", system), *messages) if system.strip() else messages


def _preference(fields: _Fields, name: str) -> tuple[Message, ...]:
    """`chosen` or `rejected`: an answer to the prompt, or the conversation that ends in it."""
    answer = fields.get(name)
    turns: tuple[Message, ...]
    if isinstance(answer, list | tuple):
        turns = _turns(answer, name)
        if turns and turns[0].role != "assistant":
            return _with_system(fields, _checked(turns, name))
    else:
        turns = (Message("assistant", _field(answer, name)),)
    prompts = [prompt for prompt in ("prompt", "instruction", "question") if fields.has(prompt)]
    if not prompts:
        raise _InvalidRowError(
            f"'{name}' is an answer, and the row has no prompt: say with --columns=prompt=COLUMN "
            "where it is, or with --response_marker what the answer in a text comes after"
        )
    return _with_system(fields, _checked((*_asked(fields, prompts[0]), *turns), name))


def _marked(text: str, marker: str) -> tuple[Message, ...]:
    """A text whose response comes after the last marker, as TRL takes it."""
    before, found, response = text.rpartition(marker)
    if not found:
        raise _InvalidRowError(f"the text does not hold --response_marker={_quote(marker)}")
    # What stands between the two under --prompt_format=plain is a newline.
    return Message("user", before + marker.rstrip("\n")), Message(
        "assistant", response.removeprefix("\n")
    )


def _conversation(turns: object, name: str) -> tuple[Message, ...]:
    if not isinstance(turns, list | tuple):
        raise _InvalidRowError(f"the field '{name}' is a {_kind(turns)}, expected a list")
    return _checked(_turns(turns, name), name)


def _checked(messages: tuple[Message, ...], name: str) -> tuple[Message, ...]:
    """The same turns, if an answer and a question before it are among them."""
    roles = [message.role for message in messages]
    if "assistant" not in roles:
        raise _InvalidRowError(f"'{name}' has no assistant turn among its {len(roles)} turns")
    if "user" not in roles[: roles.index("assistant")]:
        raise _InvalidRowError(f"'{name}' has no user turn before its first assistant turn")
    return messages


def _turns(turns: Sequence[object], name: str) -> tuple[Message, ...]:
    return tuple(_turn(turn, f"turn {i} of '{name}'") for i, turn in enumerate(turns, 1))


def _turn(turn: object, where: str) -> Message:
    if not isinstance(turn, Mapping):
        raise _InvalidRowError(f"{where} is a {_kind(turn)}, expected an object")
    role_field, text_field = ("from", "value") if "from" in turn else ("role", "content")
    for field in (role_field, text_field):
        if field not in turn:
            raise _InvalidRowError(f"{where} has no field '{field}'")
    role = turn[role_field]
    if not isinstance(role, str) or role not in _ROLES:
        raise _InvalidRowError(f"{where} has the unknown role {_quote(role)}")
    content = turn[text_field]
    extra = {
        key: value
        for key, value in turn.items()
        if isinstance(key, str) and key not in (role_field, text_field) and not _is_absent(value)
    }
    if content is None and "tool_calls" in extra:
        content = ""
    if isinstance(content, list | tuple | np.ndarray):
        content = "".join(_part(part, where) for part in content)
    text = _text(content, f"the field '{text_field}' of {where}")
    return Message(_ROLES[role], text, _json(extra, where) if extra else "")


def _json(extra: Mapping[str, object], where: str) -> str:
    try:
        return json.dumps(extra, default=_plain)
    except (TypeError, ValueError, RecursionError) as error:
        raise _InvalidRowError(f"{where} holds what is no JSON: {error}") from error


def _plain(value: object) -> object:
    """NumPy's arrays and numbers, which pandas rows hold, as Python's; else as text."""
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else str(value)


def _part(part: object, where: str) -> str:
    """A text part of a message, as multimodal chat formats write it."""
    if isinstance(part, str):
        return _text(part, f"a part of {where}")
    if not isinstance(part, Mapping) or part.get("type", "text") != "text":
        kind = part.get("type") if isinstance(part, Mapping) else part
        raise _InvalidRowError(f"{where} holds a part that is no text ({_quote(kind)})")
    return _text(part.get("text"), f"a part of {where}")


def _text(value: object, where: str) -> str:
    if not isinstance(value, str):
        raise _InvalidRowError(f"{where} is a {_kind(value)}, expected a string")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise _InvalidRowError(
            f"{where} holds half of a surrogate pair at character {error.start}, "
            "which is no valid text"
        ) from error
    return value


def _instruction(messages: tuple[Message, ...]) -> str:
    if [message.role for message in messages] in (["user"], ["system", "user"]):
        return "\n".join(message.content for message in messages)
    return "\n\n".join(f"{message.role}: {message.content}" for message in messages)


@lru_cache(maxsize=256)
def _ignored(unread: tuple[str, ...], absent: frozenset[str]) -> tuple[str, ...]:
    """Columns that were not read but for empty ones; rows of one form share one tuple."""
    return tuple(key for key in unread if key not in absent)


def _absent(row: Mapping[Any, Any]) -> frozenset[str]:
    return frozenset(_name(key) for key, value in row.items() if _is_absent(value))


def _name(key: object) -> str:
    return key if isinstance(key, str) else _quote(key)


def _is_absent(value: object) -> bool:
    """None, and what pandas fills holes with: NaN and NA."""
    is_nan = isinstance(value, float) and value != value
    return value is None or is_nan or type(value).__name__ == "NAType"


def _kind(value: object) -> str:
    return "null" if value is None else type(value).__name__


def _quote(value: object) -> str:
    text = ascii(value)
    return text if len(text) <= 40 else text[:37] + "..."
