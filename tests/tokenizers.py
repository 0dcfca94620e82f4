"""Tiny byte-level BPE tokenizers in the manner of the three model families."""

import functools
from typing import Literal

from tokenizers import (
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

Family = Literal["qwen2", "llama", "gemma2"]
FAMILIES: tuple[Family, ...] = ("qwen2", "llama", "gemma2")

CORPUS = (
    "Ann has twelve apples and gives five of them to Ben, so she keeps seven apples.",
    "What is 17 + 25? Let us think step by step: 17 + 25 = 42. The answer is 42.",
    "Write a short poem about the sea and the wind; explain every line of the poem.",
    "def add(a, b):\n    return a + b\n\n\nprint(add(1, 2))\n",
    "Größe, naïve café, 数据 and 😀 are words outside of ASCII.",
    "You are a helpful assistant. Cutting knowledge, today, user, model, system.",
)

# Digits one by one and at most one leading space, as Qwen and Llama split text.
SPLIT = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"

SPECIAL_TOKENS = {
    "qwen2": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    "llama": [
        "<|begin_of_text|>",
        "<|end_of_text|>",
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<|eot_id|>",
    ],
    "gemma2": ["<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"],
}
BOS = {"qwen2": None, "llama": "<|begin_of_text|>", "gemma2": "<bos>"}
EOS = {"qwen2": "<|endoftext|>", "llama": "<|end_of_text|>", "gemma2": "<eos>"}
END_OF_TURN = {"qwen2": "<|im_end|>", "llama": "<|eot_id|>", "gemma2": "<end_of_turn>"}

# ChatML with a default system turn.
QWEN2_TEMPLATE = """\
{%- if messages[0].role != "system" %}
    {{- "<|im_start|>system\\nYou are helpful.<|im_end|>\\n" }}
{%- endif %}
{%- for message in messages %}
    {{- "<|im_start|>" + message.role + "\\n" + message.content + "<|im_end|>\\n" }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- "<|im_start|>assistant\\n" }}
{%- endif %}
"""

# Begins with BOS and a system turn that names the day; trims every content.
LLAMA_TEMPLATE = """\
{%- macro header(role) %}
    {{- "<|start_header_id|>" + role + "<|end_header_id|>\\n\\n" }}
{%- endmacro %}
{%- set system, turns = "", messages %}
{%- if messages[0].role == "system" %}
    {%- set system, turns = messages[0].content | trim, messages[1:] %}
{%- endif %}
{%- set today = strftime_now("%d %b %Y") if strftime_now is defined else "26 Jul 2024" %}
{{- bos_token + header("system") + "Today Date: " + today + "\\n\\n" + system + "<|eot_id|>" }}
{%- for message in turns %}
    {{- header(message.role) + message.content | trim + "<|eot_id|>" }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- header("assistant") }}
{%- endif %}
"""

# Begins with BOS; knows no system role and insists on alternating turns.
GEMMA2_TEMPLATE = """\
{{- bos_token }}
{%- if messages[0].role == "system" %}
    {{- raise_exception("System role not supported") }}
{%- endif %}
{%- for message in messages %}
    {%- if (message.role == "user") != (loop.index0 % 2 == 0) %}
        {{- raise_exception("Conversation roles must alternate user/assistant") }}
    {%- endif %}
    {%- set role = "model" if message.role == "assistant" else message.role %}
    {{- "<start_of_turn>" + role + "\\n" + message.content | trim + "<end_of_turn>\\n" }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- "<start_of_turn>model\\n" }}
{%- endif %}
"""

TEMPLATES = {"qwen2": QWEN2_TEMPLATE, "llama": LLAMA_TEMPLATE, "gemma2": GEMMA2_TEMPLATE}


@functools.cache
def _trained(family: Family, vocab_size: int) -> str:
    """The tokenizer's JSON: byte-level BPE, with BOS where the family adds one."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=family == "llama"))
    if family == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=SPECIAL_TOKENS[family],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    byte_level = processors.ByteLevel(trim_offsets=False)
    if bos := BOS[family]:
        add_bos = processors.TemplateProcessing(
            single=f"{bos} $A",
            pair=f"{bos} $A {bos} $B:1",
            special_tokens=[(bos, tokenizer.token_to_id(bos))],
        )
        tokenizer.post_processor = processors.Sequence([byte_level, add_bos])
    else:
        tokenizer.post_processor = byte_level
    return tokenizer.to_str()


def make_tokenizer(
    family: Family, chat_template: bool = True, vocab_size: int = 317
) -> PreTrainedTokenizerFast:
    """A fast tokenizer with exactly `vocab_size` entries (264 to 450)."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_trained(family, vocab_size)),
        bos_token=BOS[family],
        eos_token=EOS[family],
        pad_token=SPECIAL_TOKENS[family][0] if family == "gemma2" else EOS[family],
        clean_up_tokenization_spaces=False,
    )
    if chat_template:
        tokenizer.chat_template = TEMPLATES[family]
    return tokenizer
