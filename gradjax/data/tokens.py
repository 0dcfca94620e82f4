"""An `Example` becomes token ids, with the tokens that the loss is taken over marked.

`plain` is the paper's text and count of prompt tokens. `chat` renders the tokenizer's own
template once, and finds each assistant turn in it by character offsets.

Text that spells a special token ("<|im_end|>" typed by a user) becomes that token, as in
the paper's code and in usual training code. It cannot move the loss: where a turn begins and
ends is known from the rendering, not searched for in the text.
"""

import dataclasses
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from gradjax.config import TokenConfig
from gradjax.data.examples import plain_fault
from gradjax.errors import GradjaxError
from gradjax.structs import Example, Message, Status, TokenizedExample

# Llama 3.2's template writes the day of the run into the prompt. Its own default day, put in
# front of every template, keeps a row's numbers the same tomorrow.
_PINNED_DAY = "{% macro strftime_now(format) %}26 Jul 2024{% endmacro %}\n"

# Texts that are encoded at a time.
ENCODED_TOGETHER = 1024
# Tokens [T] and targets [T].
_Encoded = tuple[np.ndarray, np.ndarray]
_PROBE = (Message("user", "question"), Message("assistant", "answer"))
# A content that no template writes, and no text begins with.
_OTHER = "\ue000"


class _UnusableError(Exception):
    """Carries the reason why an example cannot be rendered."""


def check_tokenizer(tokenizer: PreTrainedTokenizerFast, settings: TokenConfig) -> None:
    """Raises GradjaxError where the tokenizer cannot do what the settings ask for."""
    if settings.prompt_format == "plain":
        return
    name = tokenizer.name_or_path or "the model"
    if not tokenizer.chat_template:
        raise GradjaxError(
            f"--prompt_format=chat needs a chat template, and the tokenizer of {name} has none: "
            "use --prompt_format=plain or an instruct model."
        )
    if not tokenizer.is_fast:
        raise GradjaxError(
            f"--prompt_format=chat needs character offsets, and the tokenizer of {name} is a slow "
            "one: use a checkpoint with a tokenizer.json."
        )
    try:
        _assistant_spans(_PROBE, tokenizer)
    except _UnusableError as error:
        raise GradjaxError(
            f"The chat template of {name} does not render one question and its answer "
            f"({error}): mend its chat_template or use --prompt_format=plain."
        ) from error


def tokenize(
    example: Example, tokenizer: PreTrainedTokenizerFast, settings: TokenConfig
) -> TokenizedExample:
    """`tokenize_rows` of one example."""
    (tokenized,) = tokenize_rows([example], tokenizer, settings)
    return tokenized


def tokenize_rows(
    examples: Iterable[Example], tokenizer: PreTrainedTokenizerFast, settings: TokenConfig
) -> Iterator[TokenizedExample]:
    """Tokens int32 [T] and targets bool [T] of each example, T ≤ `max_length` if it is `ok`.

    They come in order, encoded many at a time on all cores. An example that is not `ok` keeps its
    status and has no tokens; one that cannot be used under these settings gets a status and a
    reason: `invalid_row`, `too_long`, `no_target_tokens` or `too_short`. `truncated` tells of the
    cut at `max_length` alone.
    Raises GradjaxError for a row over `max_length` under `truncation="error"`.
    """
    encode = _encode_plain if settings.prompt_format == "plain" else _encode_chats
    rest = iter(examples)
    while together := list(itertools.islice(rest, ENCODED_TOGETHER)):
        usable = [example for example in together if example.status == "ok"]
        encoded = iter(encode(usable, tokenizer))
        for example in together:
            if example.status != "ok":
                yield _unusable(example, example.status, example.reason)
                continue
            found = next(encoded)
            if isinstance(found, _UnusableError):
                yield _unusable(example, "invalid_row", str(found))
                continue
            tokens, targets = found
            targets[:1] = False  # Nothing precedes the first token that could predict it.
            yield _cut(example, tokens, targets, settings)


def tokenize_conversation(example: Example, tokenizer: PreTrainedTokenizerFast) -> TokenizedExample:
    """Tokens int32 [T] of the whole conversation as the chat template renders it, never cut.

    No token is a target. A conversation that the template refuses is an `invalid_row`.
    """
    try:
        text = _render(example.messages, tokenizer)
    except _UnusableError as error:
        return _unusable(example, "invalid_row", str(error))
    (found,) = _encode_rendered([text], tokenizer)
    if isinstance(found, _UnusableError):
        return _unusable(example, "invalid_row", str(found))
    return TokenizedExample(example, found[0], np.zeros(len(found[0]), bool))


def _encode_plain(
    examples: list[Example], tokenizer: PreTrainedTokenizerFast
) -> list[_Encoded | _UnusableError]:
    """The reference's text, special tokens and start of the response.

    A system message stands on its own line before the question, like the exported
    `instruction`. The response starts after as many tokens as the text before its last
    occurrence encodes to on its own; the text ends in it, so that is where it begins. An EOS that
    the tokenizer appends is no token of the prompt, but one of the response; the reference counts
    it in the prompt, so that there the response's first token is no target.
    """
    faults = [plain_fault(example) for example in examples]
    plain = [example for example, fault in zip(examples, faults, strict=True) if not fault]
    prompts = [example.instruction + "\n" for example in plain]
    texts = [prompt + example.output for prompt, example in zip(prompts, plain, strict=True)]
    backend = _backend(tokenizer)
    whole = backend.encode_batch_fast(texts)
    before = backend.encode_batch_fast(prompts)

    def encoded() -> Iterator[_Encoded]:
        for text, prompt in zip(whole, before, strict=True):
            tokens = np.asarray(text.ids, np.int32)
            start = len(np.trim_zeros(1 - np.asarray(prompt.special_tokens_mask), "b"))
            yield tokens, np.arange(len(tokens)) >= start

    found = encoded()
    return [_UnusableError(fault) if fault else next(found) for fault in faults]


def _encode_chats(
    examples: list[Example], tokenizer: PreTrainedTokenizerFast
) -> list[_Encoded | _UnusableError]:
    rendered = [_spans_or_fault(example, tokenizer) for example in examples]
    texts = [found[0] for found in rendered if not isinstance(found, _UnusableError)]
    encodings = iter(_encode_rendered(texts, tokenizer))

    def encoded(found: tuple[str, list[tuple[int, int]]]) -> _Encoded | _UnusableError:
        encoding = next(encodings)
        if isinstance(encoding, _UnusableError):
            return encoding
        tokens, starts, ends = encoding
        targets = np.zeros(len(tokens), bool)
        for start, end in found[1]:
            # By overlap: a token that joins the header's newline to the response counts.
            targets |= (ends > start) & (starts < end)
        return tokens, targets

    return [found if isinstance(found, _UnusableError) else encoded(found) for found in rendered]


def _spans_or_fault(
    example: Example, tokenizer: PreTrainedTokenizerFast
) -> tuple[str, list[tuple[int, int]]] | _UnusableError:
    try:
        return _assistant_spans(example.messages, tokenizer)
    except _UnusableError as error:
        return error


def _encode_rendered(
    texts: list[str], tokenizer: PreTrainedTokenizerFast
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray] | _UnusableError]:
    """Tokens [T] of rendered conversations, and where each starts and ends in its text.

    Exactly as rendered, but for a BOS that the template leaves to the tokenizer.
    """
    backend = _backend(tokenizer)
    first = backend.encode("a").ids[0]
    for encoding in backend.encode_batch(texts, add_special_tokens=False):
        tokens = np.asarray(encoding.ids, np.int32)
        if not len(tokens):
            yield _UnusableError("the chat template renders nothing for the conversation")
            continue
        offsets = np.asarray(encoding.offsets, np.int64).reshape(-1, 2)
        if first == tokenizer.bos_token_id != tokens[0]:
            tokens, offsets = np.insert(tokens, 0, first), np.insert(offsets, 0, 0, axis=0)
        starts, ends = offsets.T
        yield tokens, starts, ends


def _backend(tokenizer: PreTrainedTokenizerFast) -> Tokenizer:
    """The tokenizer itself, which encodes on all cores and cuts and pads nothing."""
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    return backend


def _assistant_spans(
    messages: tuple[Message, ...], tokenizer: PreTrainedTokenizerFast
) -> tuple[str, list[tuple[int, int]]]:
    """The rendered conversation, and [start, end) in characters of each assistant turn.

    A turn starts where the generation prompt before it ends, and ends with its
    end-of-turn token; whitespace that the template puts behind that belongs to no turn.
    """
    text = _render(messages, tokenizer)
    special = tuple(tokenizer.get_added_vocab())
    spans = []
    seen = first = 0  # characters and turns up to the last assistant turn
    for i, message in enumerate(messages):
        if message.role != "assistant":
            continue
        start, end = _assistant_turn(messages, i, text, tokenizer)
        if not seen < start < end:
            raise _rewritten(i)
        _require_contents(messages[first:i], first, text[seen:start])
        stripped = text[start:end].rstrip()
        spans.append((start, start + len(stripped) if stripped.endswith(special) else end))
        seen, first = end, i + 1
    _require_contents(messages[first:], first, text[seen:])
    return text, spans


def _assistant_turn(
    messages: tuple[Message, ...], i: int, text: str, tokenizer: PreTrainedTokenizerFast
) -> tuple[int, int]:
    """Where turn `i` begins and ends in `text`, the whole conversation, with all that it says."""
    before, message = messages[:i], messages[i]
    through = _render((*before, message), tokenizer)
    if text.startswith(through):
        start, end = _turn_start(before, through, tokenizer), len(through)
        turn = through[start:]
        if message.content.strip() not in turn:
            # It may begin with what the generation prompt ends in ("<think>").
            turn = through[_shared_length(_render(before, tokenizer), through) :]
    else:
        # Qwen3's template writes an empty thought into the last turn alone: from its content on, a
        # turn is what it was as the last one.
        start = _content_start(messages, i, text, tokenizer)
        turn = through[_content_start((*before, message), i, through, tokenizer) :].lstrip()
        end = start + len(text[start:]) - len(text[start:].lstrip()) + len(turn)
        if not text[start:end].endswith(turn):
            _require_contents((message,), i, text[start:])  # which says more
            raise _rewritten(i)
    _require_contents((message,), i, turn)
    if "tool_calls" in message.extra_texts:
        calls = dataclasses.replace(message, extra="")
        if _render((*before, calls), tokenizer) == through:
            raise _UnusableError(f"the chat template drops the tool calls of turn {i + 1}")
    return start, end


def _rewritten(i: int) -> _UnusableError:
    return _UnusableError(
        f"the chat template does not append turn {i + 1} to what it renders for the turns before "
        "it, so its tokens cannot be told apart"
    )


def _content_start(
    messages: tuple[Message, ...], i: int, text: str, tokenizer: PreTrainedTokenizerFast
) -> int:
    """Where what turn `i` says begins in the rendering `text`: it parts there from another one."""
    other = dataclasses.replace(messages[i], content=_OTHER)
    changed = _render((*messages[:i], other, *messages[i + 1 :]), tokenizer)
    return _shared_length(text, changed)


def _turn_start(
    before: tuple[Message, ...], through: str, tokenizer: PreTrainedTokenizerFast
) -> int:
    """Where the assistant turn behind `before` begins in its rendering `through`."""
    prompt = _render(before, tokenizer, add_generation_prompt=True)
    if through.startswith(prompt):
        return len(prompt)
    # The prompt opens what a finished turn does not have ("<think>"): a turn begins where another
    # one parts from the prompt.
    other = _render((*before, Message("assistant", _OTHER)), tokenizer)
    start = _shared_length(prompt, other)
    return start if through.startswith(prompt[:start]) else 0


def _shared_length(one: str, other: str) -> int:
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))


def _require_contents(messages: tuple[Message, ...], first: int, rendered: str) -> None:
    """A template that leaves out part of a turn would have the rest measured in its place."""
    at = 0  # texts stand in their order
    for number, message in enumerate(messages, start=first + 1):
        thoughts = [text for text in message.extra_texts.values() if isinstance(text, str)]
        for text in (*thoughts, message.content):
            found = rendered.find(text.strip(), at)
            if found < 0 and message.role == "tool":  # which some templates quote
                text = json.dumps(text, ensure_ascii=False)[1:-1]
                found = rendered.find(text.strip(), at)
            if found < 0:
                raise _UnusableError(
                    f"the chat template drops or changes some of the {message.role}'s text in "
                    f"turn {number}"
                )
            at = found + len(text.strip())


def _render(
    messages: tuple[Message, ...],
    tokenizer: PreTrainedTokenizerFast,
    add_generation_prompt: bool = False,
) -> str:
    try:
        text = tokenizer.apply_chat_template(
            [message.to_dict() for message in messages],
            chat_template=_PINNED_DAY + tokenizer.get_chat_template(),
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
        )
    except Exception as error:  # a template may do anything
        raise _UnusableError(f"the chat template refuses the conversation: {error}") from error
    return str(text)


def _cut(
    example: Example, tokens: np.ndarray, targets: np.ndarray, settings: TokenConfig
) -> TokenizedExample:
    """Applies `target_tokens`, then `max_length`, and judges what is left."""
    wanted, limit = settings.target_tokens, settings.max_length
    if wanted is not None and targets.sum() > wanted:
        end = np.flatnonzero(targets)[wanted - 1] + 1
        tokens, targets = tokens[:end], targets[:end]

    length = len(tokens)
    truncated = False
    if length > limit:
        if settings.truncation == "error":
            raise GradjaxError(
                f"Row {example.example_id} of group {example.group!r} has {length} tokens, over "
                f"--max_length={limit}: raise the limit, or use --truncation=right or drop."
            )
        if settings.truncation == "drop":
            reason = f"{length} tokens are more than --max_length={limit}"
            return TokenizedExample(example, tokens, targets, False, "too_long", reason)
        tokens, targets, truncated = tokens[:limit], targets[:limit], True

    status, reason = _judge(targets, truncated, settings)
    return TokenizedExample(example, tokens, targets, truncated, status, reason)


def _judge(targets: np.ndarray, truncated: bool, settings: TokenConfig) -> tuple[Status, str]:
    count, wanted = int(targets.sum()), settings.target_tokens
    cut = f" within --max_length={settings.max_length}" if truncated else ""
    if count == 0:
        why = "the prompt fills the window" if truncated else "the prompt's tokens cover it"
        return "no_target_tokens", f"no token of the response is left{cut}: {why}"
    if wanted is not None and count < wanted:
        return "too_short", f"the response has {count} of --target_tokens={wanted} tokens{cut}"
    return "ok", ""


def _unusable(example: Example, status: Status, reason: str) -> TokenizedExample:
    return TokenizedExample(
        example, np.zeros(0, np.int32), np.zeros(0, bool), status=status, reason=reason
    )


def describe(tokenized: TokenizedExample, tokenizer: PreTrainedTokenizerFast) -> str:
    """One line for the log: the decoded tokens, targets between ⟦ and ⟧.

    Characters that a terminal would act on are escaped, and long stretches shortened.
    """
    tokens, targets = tokenized.tokens, tokenized.targets
    borders = np.flatnonzero(np.diff(targets)) + 1
    parts = []
    for run, is_target in zip(np.split(tokens, borders), np.split(targets, borders), strict=True):
        if len(run):
            text = _printable(
                str(tokenizer.decode(run.tolist(), clean_up_tokenization_spaces=False))
            )
            parts.append(f"⟦{text}⟧" if is_target[0] else text)
    return "".join(parts)


def _printable(text: str, width: int = 600) -> str:
    if len(text) > width:
        text = f"{text[: width // 2]} … {text[-width // 2 :]}"
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode("ascii")
        for char in text
    )


def check_vocabulary(tokenized: Sequence[TokenizedExample], vocab_size: int) -> None:
    """Raises GradjaxError where a token id has no row in an embedding table of `vocab_size`."""
    for t in tokenized:
        if t.num_tokens and t.tokens.max() >= vocab_size:
            raise GradjaxError(
                f"group {t.example.group} row {t.example.example_id}: the tokenizer gives token id "
                f"{t.tokens.max()}, outside the model's vocabulary of {vocab_size}; use the "
                "tokenizer that belongs to this checkpoint"
            )
