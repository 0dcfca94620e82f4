"""Tokens and targets, against the paper's procedure and hand-split conversations."""

import dataclasses
import datetime
import errno
import functools
import os
import re
import unicodedata

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import processors
from transformers import AutoTokenizer

from gradjax.data.examples import to_example
from gradjax.data.texts import Texts
from gradjax.data.tokens import TokenConfig, check_tokenizer, describe, tokenize, tokenize_rows
from gradjax.errors import GradjaxError
from tests.tokenizers import BOS, END_OF_TURN, FAMILIES, make_tokenizer

pytestmark = pytest.mark.smoke

CHAT = TokenConfig("chat")
BOTH_ENDS = ("<|begin_of_text|>", "<|end_of_text|>")

# As DeepSeek-R1-Distill's: thoughts are dropped from finished turns, and a prompt opens them.
R1_TEMPLATE = """\
{%- for m in messages %}
    {%- if m.role == "user" %}{{- "<|im_start|>" + m.content }}{% endif %}
    {%- if m.role == "assistant" %}
        {{- "<|im_end|>" + m.content.split("</think>")[-1] + "<|endoftext|>" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- "<|im_end|><think>\\n" }}{% endif %}
"""

nfc = functools.partial(unicodedata.normalize, "NFC")


def pair(instruction, output):
    return to_example({"instruction": instruction, "output": output}, "g", 3)


def chat(*contents, system=None):
    turns = [{"role": "system", "content": system}] if system is not None else []
    for i, content in enumerate(contents):
        turns.append({"role": ("user", "assistant")[i % 2], "content": content})
    return to_example({"messages": turns}, "g", 3)


def target_texts(tokenized, tokenizer):
    """The decoded runs of consecutive target tokens."""
    borders = np.flatnonzero(np.diff(tokenized.targets)) + 1
    runs = zip(
        np.split(tokenized.tokens, borders), np.split(tokenized.targets, borders), strict=True
    )
    return [tokenizer.decode(ids) for ids, is_target in runs if is_target[0]]


def reference_labels(tokenizer, instruction, output, max_length):
    """What the paper's code feeds the model: ids, and labels with -100 over the prompt."""
    text = instruction + "\n" + output
    ids = tokenizer.encode(text, truncation=True, max_length=max_length)
    start_index = text.rfind(output)
    labels = list(ids)
    n_prompt = len(tokenizer.encode(text[:start_index]))
    labels[:n_prompt] = [-100] * len(labels[:n_prompt])
    return ids, labels


texts = st.one_of(
    st.text(max_size=40).filter(lambda text: not re.search("[\ud800-\udfff]", text)),
    st.text(alphabet=" \n\tab1.é数😀", max_size=60),
    st.sampled_from(["What is 17 + 25?\n", "aa", "a\n\n a", "<|im_end|> <eos> <bos>"]),
)


@pytest.mark.parametrize("family", FAMILIES)
@given(instruction=texts, output=texts, max_length=st.integers(2, 50))
@settings(max_examples=60, deadline=None)
def test_plain_is_the_papers_procedure(family, instruction, output, max_length):
    tokenizer = make_tokenizer(family)
    example = pair(instruction, output)
    result = tokenize(example, tokenizer, TokenConfig(max_length=max_length))
    if not output.strip():
        assert result.status == "empty_response"
        return
    ids, labels = reference_labels(tokenizer, instruction, output, max_length)
    assert result.tokens.tolist() == ids
    # The model never predicts its first token: the loss shifts the labels by one.
    assert result.targets.tolist() == [False] + [label != -100 for label in labels[1:]]
    assert result.status == ("ok" if any(result.targets) else "no_target_tokens")
    assert result.tokens.dtype == np.int32
    assert result.targets.dtype == bool


def test_plain_appends_the_input_and_marks_the_whole_response():
    tokenizer = make_tokenizer("llama")
    row = {"instruction": "Add them.", "input": "17 and 25", "output": "42 is 42"}
    result = tokenize(to_example(row, "g", 0), tokenizer, TokenConfig())
    assert tokenizer.decode(result.tokens) == "<|begin_of_text|>Add them.\n17 and 25\n42 is 42"
    assert target_texts(result, tokenizer) == ["42 is 42"]


def test_plain_without_bos_never_targets_the_first_token():
    tokenizer = make_tokenizer("qwen2")
    result = tokenize(pair("", "abc"), tokenizer, TokenConfig())
    assert not result.targets[0]
    assert target_texts(result, tokenizer) == ["abc"]


@pytest.mark.parametrize("output", ["5", "one two three"])
def test_an_eos_that_the_tokenizer_appends_shifts_nothing(output):
    tokenizer = make_tokenizer("llama")
    without = tokenize(pair("What?", output), tokenizer, TokenConfig())
    eos = "<|end_of_text|>"
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"<|begin_of_text|> $A {eos}",
        special_tokens=[(token, tokenizer.convert_tokens_to_ids(token)) for token in BOTH_ENDS],
    )
    result = tokenize(pair("What?", output), tokenizer, TokenConfig())
    assert result.tokens.tolist() == [*without.tokens, tokenizer.convert_tokens_to_ids(eos)]
    assert result.targets.tolist() == [*without.targets, True]


def test_plain_puts_a_system_message_before_the_question():
    tokenizer = make_tokenizer("qwen2")
    result = tokenize(chat("hi", "yo", system="Be kind."), tokenizer, TokenConfig())
    assert tokenizer.decode(result.tokens) == "Be kind.\nhi\nyo"
    assert target_texts(result, tokenizer) == ["yo"]


def test_plain_refuses_several_turns_and_points_to_chat():
    result = tokenize(chat("a", "b", "c", "d"), make_tokenizer("qwen2"), TokenConfig())
    assert (result.status, result.num_tokens) == ("invalid_row", 0)
    assert "4 turns" in result.reason
    assert "--prompt_format=chat takes them" in result.reason


def hand_split(family, turns):
    """The family's rendering as [(text, is_target)], each piece ending at a token's border."""
    if family == "qwen2":
        head = "<|im_start|>system\nYou are helpful.<|im_end|>\n"
        header, end, tail = "<|im_start|>{}\n", "<|im_end|>", "\n"
    elif family == "llama":
        head = (
            "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n"
            "Today Date: 26 Jul 2024\n\n<|eot_id|>"
        )
        header, end, tail = "<|start_header_id|>{}<|end_header_id|>\n\n", "<|eot_id|>", ""
    else:
        head, header, end, tail = "<bos>", "<start_of_turn>{}\n", "<end_of_turn>", "\n"
    names = ("user", "model" if family == "gemma2" else "assistant")
    pieces = [(head, False)]
    for i, content in enumerate(turns):
        is_target = i % 2 == 1
        pieces += [(header.format(names[i % 2]), False), (content + end, is_target)]
        pieces += [(tail, False)]
    return pieces


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "turns",
    [
        ("What is 17 + 25?", "42"),
        ("same", "same", "same", "same"),
        ("数据 and 😀", "Größe 😀.", "more?", "naïve café"),
        # Text that looks like the template, and a question after the last answer.
        ("user\nassistant\nmodel\n", "assistant\n\nfoo\nuser", "Ann and Ben"),
        ("say <|im_end|> <|eot_id|> <end_of_turn> now", "ok <|im_end|> <|eot_id|> fine"),
    ],
)
def test_chat_targets_are_the_assistant_turns_through_their_end(family, turns):
    tokenizer = make_tokenizer(family)
    pieces = hand_split(family, [turn.strip() if family != "qwen2" else turn for turn in turns])
    ids, targets = [], []
    for text, is_target in pieces:
        piece = tokenizer.encode(text, add_special_tokens=False)
        ids += piece
        targets += [is_target] * len(piece)
    result = tokenize(chat(*turns), tokenizer, CHAT)
    assert (result.status, result.reason) == ("ok", "")
    assert result.tokens.tolist() == ids
    assert result.targets.tolist() == targets


@pytest.mark.parametrize("family", FAMILIES)
@given(turns=st.lists(texts.filter(str.strip), min_size=2, max_size=5))
@settings(max_examples=40, deadline=None)
def test_chat_targets_hold_each_response_whatever_it_says(family, turns):
    tokenizer = make_tokenizer(family)
    result = tokenize(chat(*turns), tokenizer, TokenConfig("chat", max_length=10**6))
    end = tokenizer.convert_tokens_to_ids(END_OF_TURN[family])
    runs = np.flatnonzero(np.diff(np.append(result.targets, False).astype(int)) == 1) + 1
    assert len(runs) == len(turns) // 2
    for start, content in zip(runs, turns[1::2], strict=True):
        stop = start + np.argmin(np.append(result.targets[start:], False))
        assert result.tokens[stop - 1] == end
        text = tokenizer.decode(result.tokens[start : stop - 1])
        # A token may join the header's newline to a response that begins with one.
        assert text.strip() == (nfc(content) if family == "qwen2" else content).strip()


@pytest.mark.parametrize("family", FAMILIES)
def test_chat_has_one_bos(family):
    tokenizer = make_tokenizer(family)
    result = tokenize(pair("hi", "yo"), tokenizer, CHAT)
    expected = 0 if BOS[family] is None else 1
    assert np.sum(result.tokens == tokenizer.bos_token_id) == expected
    if BOS[family] is None:
        return
    # The same template without BOS: the tokenizer adds one, so gradjax does.
    tokenizer.chat_template = tokenizer.chat_template.replace("{{- bos_token }}", "").replace(
        "bos_token + ", ""
    )
    again = tokenize(pair("hi", "yo"), tokenizer, CHAT)
    assert again.tokens.tolist() == result.tokens.tolist()
    assert again.targets.tolist() == result.targets.tolist()


def test_chat_agrees_with_a_tokenizer_read_from_disk(tmp_path):
    tokenizer = make_tokenizer("llama")
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    example = chat("hi", "yo", "and?", "so", system="Be kind.")
    one, two = tokenize(example, tokenizer, CHAT), tokenize(example, loaded, CHAT)
    assert one.tokens.tolist() == two.tokens.tolist()
    assert one.targets.tolist() == two.targets.tolist()


def test_chat_does_not_depend_on_the_day():
    tokenizer = make_tokenizer("llama")
    today = datetime.datetime.now().strftime("%d %b %Y")
    assert today in tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False
    )
    text = tokenizer.decode(tokenize(pair("hi", "yo"), tokenizer, CHAT).tokens)
    assert "Today Date: 26 Jul 2024" in text


def test_chat_targets_do_not_depend_on_trimmed_offsets():
    # Some checkpoints' post-processors report offsets without surrounding whitespace.
    tokenizer = make_tokenizer("qwen2")
    example = chat("hi", "  two  words \n\n then", "x", "\n\n y ")
    expected = tokenize(example, tokenizer, CHAT)
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    result = tokenize(example, tokenizer, CHAT)
    assert result.tokens.tolist() == expected.tokens.tolist()
    # All but the whitespace that touches the border, which has no offset of its own.
    assert np.sum(result.targets != expected.targets) <= 2


def test_gemma_refusals_become_invalid_rows_with_the_templates_words():
    tokenizer = make_tokenizer("gemma2")
    result = tokenize(chat("hi", "yo", system="Be kind."), tokenizer, CHAT)
    assert result.status == "invalid_row"
    assert "System role not supported" in result.reason
    turns = [{"role": role, "content": role} for role in ("user", "user", "assistant")]
    result = tokenize(to_example({"messages": turns}, "g", 0), tokenizer, CHAT)
    assert result.status == "invalid_row"
    assert "must alternate" in result.reason


def test_a_template_that_rewrites_earlier_turns_is_an_invalid_row():
    tokenizer = make_tokenizer("qwen2")
    tokenizer.chat_template = (
        "{%- for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + "
        "(m.content if loop.last else m.content[:3]) + '<|im_end|>\\n' }}{%- endfor %}"
        "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{%- endif %}"
    )
    result = tokenize(chat("question", "long answer", "question", "end"), tokenizer, CHAT)
    assert result.status == "invalid_row"
    assert "turn 2" in result.reason


@pytest.mark.parametrize("answers", [("yo",), ("<b>yo</b>",), ("<think>", "<thin"), ("\n<", "a")])
def test_a_prompt_that_opens_a_thought_is_no_part_of_a_turn(answers):
    tokenizer = make_tokenizer("qwen2")
    tokenizer.chat_template = R1_TEMPLATE
    check_tokenizer(tokenizer, CHAT)
    turns = [text for answer in answers for text in ("hi", answer)]
    result = tokenize(chat(*turns), tokenizer, CHAT)
    assert result.status == "ok"
    assert target_texts(result, tokenizer) == [f"{answer}<|endoftext|>" for answer in answers]


@pytest.mark.parametrize(
    ("turns", "role", "number"),
    [
        (("hi", "<think>\nwhy</think>yo"), "assistant", 2),
        (("hi", "yo", "a", "b</think>\n\nc"), "assistant", 4),
    ],
)
def test_a_template_that_drops_what_a_turn_says_makes_an_invalid_row(turns, role, number):
    tokenizer = make_tokenizer("qwen2")
    tokenizer.chat_template = R1_TEMPLATE
    result = tokenize(chat(*turns), tokenizer, CHAT)
    assert (result.status, result.num_tokens) == ("invalid_row", 0)
    assert f"drops or changes some of the {role}'s text in turn {number}" in result.reason


def test_a_template_that_drops_a_system_message_makes_an_invalid_row():
    tokenizer = make_tokenizer("qwen2")
    tokenizer.chat_template = R1_TEMPLATE
    result = tokenize(chat("hi", "yo", system="Be kind."), tokenizer, CHAT)
    assert result.status == "invalid_row"
    assert "the system's text in turn 1" in result.reason


# As Qwen3's: the thoughts, empty ones too, of answers to the last question alone.
QWEN3_TEMPLATE = """\
{%- set ns = namespace(last=-1) %}
{%- for m in messages %}
    {%- if m.role == "user" %}{% set ns.last = loop.index0 %}{% endif %}
{%- endfor %}
{%- for m in messages %}
    {{- "<|im_start|>" + m.role + "\\n" }}
    {%- set content = m.content %}
    {%- if m.role == "assistant" %}
        {%- set thought = m.reasoning_content or "" %}
        {%- if "</think>" in content %}
            {%- set thought = content.split("</think>")[0].split("<think>")[-1].strip() %}
            {%- set content = content.split("</think>")[-1].lstrip("\\n") %}
        {%- endif %}
        {%- if loop.index0 > ns.last and (loop.last or thought) %}
            {{- "<think>\\n" + thought + "\\n</think>\\n\\n" }}
            {%- set content = content.lstrip("\\n") %}
        {%- endif %}
    {%- endif %}
    {{- content }}
    {%- for call in m.tool_calls or [] %}
        {%- if content or not loop.first %}{{- "\\n" }}{% endif %}
        {{- "<tool_call>" + call | tojson + "</tool_call>" }}
    {%- endfor %}
    {{- "<|im_end|>\\n" }}
{%- endfor %}
{%- if add_generation_prompt %}{{- "<|im_start|>assistant\\n" }}{% endif %}
"""


CHATML = (
    "{%- for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{%- endif %}"
)
TOOLS = CHATML.replace(
    "m.content", "(m.content or '') + (m.tool_calls | tojson if m.tool_calls else '')"
)
THINKS = CHATML.replace("m.content", "(m.reasoning_content or '') + m.content")
ASKED = {"role": "user", "content": "q"}
CALL = {"role": "assistant", "content": "", "tool_calls": [{"name": "add"}]}
THOUGHT = {"role": "assistant", "content": "a", "reasoning_content": "because"}


@pytest.mark.parametrize(
    ("template", "turn", "said"),
    [
        (TOOLS, CALL, '[{"name": "add"}]<|im_end|>'),
        (CHATML, CALL, "the chat template drops the tool calls of turn 2"),
        (THINKS, THOUGHT, "becausea<|im_end|>"),
        (CHATML, THOUGHT, "drops or changes some of the assistant's text in turn 2"),
    ],
)
def test_tool_calls_and_thoughts_are_measured_or_the_row_is_invalid(template, turn, said):
    tokenizer = make_tokenizer("qwen2")
    tokenizer.chat_template = template
    example = to_example({"messages": [ASKED, turn]}, "g", 0)
    result = tokenize(example, tokenizer, CHAT)
    if result.status == "ok":
        assert target_texts(result, tokenizer) == [said]
    else:
        assert said in result.reason
    assert "have no plain form" in tokenize(example, tokenizer, TokenConfig()).reason


EMPTY = "<think>\n\n</think>\n\n"
WHY = "<think>\nwhy\n</think>\n\nyo"


@pytest.mark.parametrize(
    ("answers", "found"),
    [
        (("yo",), [f"{EMPTY}yo<|im_end|>"]),
        (("yo", "hi", "q"), ["yo<|im_end|>", "hi<|im_end|>", f"{EMPTY}q<|im_end|>"]),
        # Its line breaks are one token with the header's.
        (("\n\n<b>", "<"), ["\n\n\n<b><|im_end|>", f"{EMPTY}<<|im_end|>"]),
        (("q", WHY), ["q<|im_end|>", f"{WHY}<|im_end|>"]),
        ((WHY, "q"), "some of the assistant's text in turn 2"),
    ],
)
def test_turns_that_a_template_writes_otherwise_at_the_end_are_told_apart(answers, found):
    tokenizer = make_tokenizer("qwen2")
    tokenizer.chat_template = QWEN3_TEMPLATE
    check_tokenizer(tokenizer, CHAT)
    result = tokenize(chat(*(text for a in answers for text in ("q", a))), tokenizer, CHAT)
    if result.status == "ok":
        assert target_texts(result, tokenizer) == found
    else:
        assert found in result.reason


@pytest.mark.parametrize("content", ["", "Let me see."])
@pytest.mark.parametrize("thought", ["", "It is a sum."])
@pytest.mark.parametrize("asked_again", [False, True])
def test_calls_between_question_and_answer_are_told_apart(content, thought, asked_again):
    tokenizer = make_tokenizer("qwen2")
    tokenizer.chat_template = QWEN3_TEMPLATE
    call = CALL | {"content": content, "reasoning_content": thought}
    turns = [ASKED, call, {"role": "tool", "content": "5"}, {"role": "assistant", "content": "5"}]
    turns += [ASKED, {"role": "assistant", "content": "6"}] if asked_again else []
    result = tokenize(to_example({"messages": turns}, "g", 0), tokenizer, CHAT)
    if thought and asked_again:
        assert "drops or changes some of the assistant's text in turn 2" in result.reason
        return
    called = content + ("\n" if content else "") + '<tool_call>{"name": "add"}</tool_call>'
    before = f"<think>\n{thought}\n</think>\n\n" if thought else ""
    answers = ["5<|im_end|>", f"{EMPTY}6<|im_end|>"] if asked_again else [f"{EMPTY}5<|im_end|>"]
    assert target_texts(result, tokenizer) == [f"{before}{called}<|im_end|>", *answers]


def test_what_a_tool_says_must_be_there_quoted_or_not():
    tokenizer = make_tokenizer("qwen2")
    tool = {"role": "tool", "content": 'five "5"\n'}
    rows = {
        "messages": [
            ASKED,
            {"role": "assistant", "content": "?"},
            tool,
            THOUGHT | {"reasoning_content": None},
        ]
    }
    quoted = CHATML.replace("m.content", "(m.content | tojson if m.role == 'tool' else m.content)")
    for template, status in (
        (CHATML, "ok"),
        (quoted, "ok"),
        (CHATML.replace("{{ '<", "{{ '' if m.role == 'tool' else '<"), "invalid_row"),
    ):
        tokenizer.chat_template = template
        assert tokenize(to_example(rows, "g", 0), tokenizer, CHAT).status == status


def test_a_text_that_stands_in_another_one_is_not_enough():
    tokenizer = make_tokenizer("qwen2")
    tokenizer.chat_template = R1_TEMPLATE  # knows no system turn
    result = tokenize(chat("Be brief. q", "yo", system="Be brief."), tokenizer, CHAT)
    assert result.status == "invalid_row"


def test_a_template_that_fails_makes_an_invalid_row():
    tokenizer = make_tokenizer("qwen2")
    tokenizer.chat_template = CHATML.replace(
        "m.role", "m.role + ('' if m.content != 'hi' else 1 // 0)"
    )
    assert "refuses the conversation" in tokenize(chat("hi", "yo"), tokenizer, CHAT).reason
    assert tokenize(chat("ho", "yo"), tokenizer, CHAT).status == "ok"


def test_a_thought_that_the_prompt_opens_and_the_turn_keeps_is_usable():
    tokenizer = make_tokenizer("qwen2")
    tokenizer.chat_template = R1_TEMPLATE.replace('.split("</think>")[-1]', "")
    result = tokenize(chat("hi", "<think>\nwhy</think>yo"), tokenizer, CHAT)
    # The prompt holds the tag already, so the loss begins behind it.
    assert target_texts(result, tokenizer) == ["why</think>yo<|endoftext|>"]


def test_a_template_without_end_of_turn_marks_the_whole_content():
    tokenizer = make_tokenizer("qwen2")
    tokenizer.chat_template = (
        "{%- for m in messages %}{{ m.role + ':' + m.content }}{%- endfor %}"
        "{%- if add_generation_prompt %}{{ 'assistant:' }}{%- endif %}"
    )
    result = tokenize(chat("hi", "yo \n"), tokenizer, CHAT)
    assert target_texts(result, tokenizer) == ["yo \n"]


def test_right_truncation_cuts_and_says_so():
    tokenizer = make_tokenizer("llama")
    whole = tokenize(pair("What is it?", "one two three"), tokenizer, TokenConfig())
    assert not whole.truncated
    n = whole.num_tokens
    exact = tokenize(whole.example, tokenizer, TokenConfig(max_length=n))
    assert (exact.status, exact.truncated) == ("ok", False)
    cut = tokenize(whole.example, tokenizer, TokenConfig(max_length=n - 3))
    assert (cut.status, cut.truncated, cut.num_tokens) == ("ok", True, n - 3)
    assert cut.num_target_tokens == whole.num_target_tokens - 3
    assert cut.tokens.tolist() == whole.tokens[: n - 3].tolist()


@pytest.mark.parametrize("prompt_format", ["plain", "chat"])
def test_a_prompt_that_fills_the_window_leaves_no_target(prompt_format):
    tokenizer = make_tokenizer("gemma2")
    settings = TokenConfig(prompt_format, max_length=7)
    result = tokenize(pair("a long question " * 9, "yes"), tokenizer, settings)
    assert (result.status, result.truncated) == ("no_target_tokens", True)
    assert (result.num_tokens, result.num_target_tokens) == (7, 0)
    assert "--max_length=7" in result.reason


def test_drop_keeps_the_counts_of_a_row_that_is_too_long():
    tokenizer = make_tokenizer("qwen2")
    whole = tokenize(pair("q", "one two three"), tokenizer, TokenConfig())
    limit = whole.num_tokens - 1
    result = tokenize(whole.example, tokenizer, TokenConfig(max_length=limit, truncation="drop"))
    assert (result.status, result.truncated) == ("too_long", False)
    assert result.num_tokens == whole.num_tokens
    assert f"{whole.num_tokens} tokens" in result.reason
    assert f"--max_length={limit}" in result.reason


def test_error_truncation_names_row_and_limit():
    settings = TokenConfig(max_length=5, truncation="error")
    with pytest.raises(GradjaxError, match=r"Row 3 of group 'g' has \d+ tokens.*--max_length=5"):
        tokenize(pair("What is it?", "one two three"), make_tokenizer("qwen2"), settings)


def test_target_tokens_ends_the_sequence_after_the_nth_target():
    tokenizer = make_tokenizer("llama")
    example = pair("What is it?", "one two three four")
    whole = tokenize(example, tokenizer, TokenConfig())
    result = tokenize(example, tokenizer, TokenConfig(target_tokens=5))
    assert (result.status, result.truncated, result.num_target_tokens) == ("ok", False, 5)
    assert result.targets[-5:].all()
    assert result.tokens.tolist() == whole.tokens[: result.num_tokens].tolist()


def test_target_tokens_counts_over_turns():
    tokenizer = make_tokenizer("qwen2")
    example = chat("hi", "yo", "and what then?", "something else")
    first = tokenize(chat("hi", "yo"), tokenizer, CHAT).num_target_tokens
    settings = dataclasses.replace(CHAT, target_tokens=first + 2)
    result = tokenize(example, tokenizer, settings)
    assert result.num_target_tokens == first + 2
    assert result.targets[-2:].all()
    assert not result.targets[-3]


@pytest.mark.parametrize(
    ("n", "max_length", "status"),
    [(3, 4096, "ok"), (99, 4096, "too_short"), (99, 2, "no_target_tokens")],
)
def test_target_tokens_judges_short_responses(n, max_length, status):
    settings = TokenConfig(max_length=max_length, target_tokens=n)
    result = tokenize(pair("What?", "one two"), make_tokenizer("llama"), settings)
    assert result.status == status
    if status == "too_short":
        assert f"{result.num_target_tokens} of --target_tokens=99" in result.reason


def test_target_tokens_spares_a_row_that_fits_once_cut():
    settings = TokenConfig(max_length=40, truncation="drop", target_tokens=4)
    result = tokenize(pair("What?", "one two " * 50), make_tokenizer("llama"), settings)
    assert (result.status, result.truncated, result.num_target_tokens) == ("ok", False, 4)


@pytest.mark.parametrize("row", [{}, {"instruction": "a", "output": ""}])
def test_unusable_examples_pass_through(row):
    example = to_example(row, "g", 0)
    result = tokenize(example, make_tokenizer("qwen2"), CHAT)
    assert (result.status, result.reason) == (example.status, example.reason)
    assert (result.num_tokens, result.num_target_tokens, result.truncated) == (0, 0, False)


@pytest.mark.parametrize("family", FAMILIES)
def test_check_tokenizer_accepts_the_families(family):
    check_tokenizer(make_tokenizer(family), CHAT)
    check_tokenizer(make_tokenizer(family, chat_template=False), TokenConfig())


def test_check_tokenizer_names_what_is_missing():
    tokenizer = make_tokenizer("qwen2", chat_template=False)
    with pytest.raises(GradjaxError, match=r"chat template.*has none.*--prompt_format=plain"):
        check_tokenizer(tokenizer, CHAT)
    for template in ("{% for m in messages %}", "{{ messages[0].content }}", "{{ 1 + 'a' }}", " "):
        tokenizer.chat_template = template
        with pytest.raises(GradjaxError, match="does not render one question and its answer"):
            check_tokenizer(tokenizer, CHAT)


def test_check_tokenizer_refuses_slow_tokenizers():
    class Slow:
        name_or_path, chat_template, is_fast = "some/model", "{{ messages }}", False

    with pytest.raises(GradjaxError, match=r"some/model is a slow one.*tokenizer\.json"):
        check_tokenizer(Slow(), CHAT)


def test_describe_marks_targets_and_is_safe_to_print():
    tokenizer = make_tokenizer("llama")
    example = pair("hi\x1b[31m \u202eyou", "the sea\r\n\x00")
    text = describe(tokenize(example, tokenizer, TokenConfig()), tokenizer)
    assert text == "<|begin_of_text|>hi\\x1b[31m \\u202eyou\\n⟦the sea\\r\\n\\x00⟧"


def test_describe_shortens_long_stretches_but_keeps_the_border():
    tokenizer = make_tokenizer("llama")
    tokenized = tokenize(pair("a " * 3000 + "LAST", "FIRST" + " b" * 900), tokenizer, CHAT)
    text = describe(tokenized, tokenizer)
    assert "⟦FIRST" in text
    assert text.count(" … ") == 2
    assert len(text) < 2000
    empty = tokenize(to_example({}, "g", 0), tokenizer, CHAT)
    assert describe(empty, tokenizer) == ""


@pytest.mark.parametrize("settings", [TokenConfig(), CHAT], ids=["plain", "chat"])
def test_many_rows_are_what_each_is_alone(settings, monkeypatch):
    monkeypatch.setattr("gradjax.data.tokens.ENCODED_TOGETHER", 3)
    tokenizer = make_tokenizer("qwen2")
    rows = [
        pair("What?", "one"),
        to_example({"instruction": "no answer"}, "g", 1),
        chat("a", "b", "c", "d"),
        pair("Ω ☃", "two two"),
        pair("long " * 50, "three"),
        pair("", "ünï"),
        pair("What?", "  "),
    ]
    found = list(tokenize_rows(iter(rows), tokenizer, settings))
    assert [row.example for row in found] == rows
    for row, example in zip(found, rows, strict=True):
        alone = tokenize(example, tokenizer, settings)
        assert (row.status, row.reason) == (alone.status, alone.reason)
        np.testing.assert_array_equal(row.tokens, alone.tokens)
        np.testing.assert_array_equal(row.targets, alone.targets)


def test_texts_wait_on_disk():
    texts = Texts()
    rows = [pair("Ω" * 9, "☃\ud800"), pair("", ""), pair("q", "a" * 10**5)]
    bare = [texts.append(row) for row in rows]
    assert not any(row.instruction or row.output or row.messages for row in bare)
    for position in (2, 0, 1, 2):
        restored = texts.restore(position, bare[position])
        assert (restored.instruction, restored.output) == (
            rows[position].instruction,
            rows[position].output,
        )


def test_a_full_temporary_folder_is_named(monkeypatch):
    class Full:
        def close(self): ...

        def seek(self, *_): ...

        def write(self, _):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("gradjax.storage.spool.tempfile.TemporaryFile", Full)
    with pytest.raises(GradjaxError, match=r"No space left on device\); .* TMPDIR"):
        Texts().append(pair("q", "a"))
