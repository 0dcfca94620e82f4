"""A row, whatever it holds, becomes an `Example`; a bad row gets a status and a reason."""

from collections.abc import Mapping
from typing import Any

from gradjax.data.sources import row_hash
from gradjax.structs import Example, Message

# What data sets call the three roles.
_ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
}


class _InvalidRowError(Exception):
    """Carries the reason why a row cannot be used."""


def to_example(row: object, group: str, example_id: int) -> Example:
    """Reads `instruction`/`output` (+ `input`), `messages` or ShareGPT `conversations`.

    Never raises: a row that fits none of them has status `invalid_row`, one with a blank
    response `empty_response`, each with a reason. `instruction` and `output` of a
    conversation are what comes before its last assistant turn, and that turn.
    """
    digest = row_hash(row)
    try:
        messages = _messages(row)
    except _InvalidRowError as error:
        return Example(group, example_id, digest, status="invalid_row", reason=str(error))

    last = max(i for i, message in enumerate(messages) if message.role == "assistant")
    blank = [
        i
        for i, message in enumerate(messages, start=1)
        if message.role == "assistant" and not message.content.strip()
    ]
    return Example(
        group,
        example_id,
        digest,
        instruction=_instruction(messages[:last]),
        output=messages[last].content,
        messages=messages,
        status="empty_response" if blank else "ok",
        reason=f"the response in turn {blank[0]} is empty or only whitespace" if blank else "",
    )


def is_single_turn(messages: tuple[Message, ...]) -> bool:
    """Whether messages are one question and its answer, perhaps after a system message."""
    roles = [message.role for message in messages]
    return roles in (["user", "assistant"], ["system", "user", "assistant"])


def _messages(row: object) -> tuple[Message, ...]:
    if not isinstance(row, Mapping):
        raise _InvalidRowError(f"the row is a {_kind(row)}, expected an object")
    # A row may carry several forms, and column stores fill absent ones with null.
    if row.get("instruction") is not None and row.get("output") is not None:
        return _pair(row)
    for field in ("messages", "conversations"):
        if row.get(field) is not None:
            return _conversation(row[field], field)
    return _pair(row)


def _pair(row: Mapping[str, Any]) -> tuple[Message, ...]:
    for field in ("instruction", "output"):
        if field not in row:
            keys = ", ".join(_quote(key) for key in list(row)[:8]) or "no fields"
            raise _InvalidRowError(
                f"the field '{field}' is missing (found {keys}), expected instruction and "
                "output, messages, or conversations"
            )
    instruction = _text(row["instruction"], "the field 'instruction'")
    output = _text(row["output"], "the field 'output'")
    if row.get("input") is not None and (extra := _text(row["input"], "the field 'input'")):
        instruction += "\n" + extra
    return Message("user", instruction), Message("assistant", output)


def _conversation(turns: object, field: str) -> tuple[Message, ...]:
    if not isinstance(turns, (list, tuple)):
        raise _InvalidRowError(f"the field '{field}' is a {_kind(turns)}, expected a list")
    messages = tuple(_turn(turn, f"turn {i} of '{field}'") for i, turn in enumerate(turns, 1))
    roles = [message.role for message in messages]
    if "assistant" not in roles:
        raise _InvalidRowError(f"'{field}' has no assistant turn among its {len(turns)} turns")
    if "user" not in roles[: roles.index("assistant")]:
        raise _InvalidRowError(f"'{field}' has no user turn before its first assistant turn")
    return messages


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
    return Message(_ROLES[role], _text(turn[text_field], f"the field '{text_field}' of {where}"))


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


def _kind(value: object) -> str:
    return "null" if value is None else type(value).__name__


def _quote(value: object) -> str:
    text = ascii(value)
    return text if len(text) <= 40 else text[:37] + "..."
