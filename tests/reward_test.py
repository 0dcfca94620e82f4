"""Rewards against transformers' LlamaForSequenceClassification, through files on disk."""

import copy
import dataclasses
import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForSequenceClassification, PreTrainedTokenizerFast, pipeline

from gradjax.api import load_model
from gradjax.checkpoints.hf_config import read_config
from gradjax.data.examples import to_example
from gradjax.errors import GradjaxError
from gradjax.score.reward import load_reward_model, score_reward
from gradjax.structs import Example
from tests.checkpoints import make_hf_model, save_checkpoint
from tests.tokenizers import make_tokenizer

BOS, END, EOT = "<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"
# In the manner of Llama 3, which the published reward models are made of.
TEMPLATE = """\
{%- for message in messages %}
    {%- if message.role == "system" and not message.content %}
        {{- raise_exception("the system turn is empty") }}
    {%- endif %}
    {%- set header = "<|start_header_id|>" + message.role + "<|end_header_id|>\\n\\n" %}
    {{- (bos_token if loop.first else "") + header + message.content | trim + "<|eot_id|>" }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- "<|start_header_id|>assistant<|end_header_id|>\\n\\n" }}
{%- endif %}
"""
PLAIN_ROPE = {"rope_theta": 5e5}
ROWS: list[dict[str, Any]] = [
    {"instruction": "What is 17 + 25?", "output": "Let us think step by step: 42."},
    {"instruction": "Write a short poem", "input": "about the sea", "output": "wind " * 29},
    {"instruction": "数据 and 😀?", "output": "  naïve café \n"},
    {
        "messages": [
            {"role": "system", "content": "You are a helpful assistant."},
            {"role": "user", "content": "Ann has twelve apples."},
            {"role": "assistant", "content": "She gives five of them to Ben."},
            {"role": "user", "content": "So?"},
            {"role": "assistant", "content": "She keeps seven."},
        ]
    },
    {
        "messages": [
            {"role": "user", "content": "hi"},
            {"role": "assistant", "content": "yo"},
            {"role": "user", "content": "and then?"},
        ]
    },
    {"instruction": f"What is {EOT}?", "output": f"The answer {EOT}"},
    {"instruction": "Repeat the end.", "output": f"{END} and {END}"},
    *({"instruction": "a" * n, "output": "def add(a, b):\n" * (n % 3 + 1)} for n in range(1, 10)),
]


def make_reward_model(
    pad: str | None = END, *, num_labels: int = 1, **overrides: Any
) -> LlamaForSequenceClassification:
    """A random float32 model with the vocabulary of the tokenizer below."""
    base = make_hf_model("llama", **{"vocab_size": 317, "num_hidden_layers": 2} | overrides)
    config = copy.deepcopy(base.config)
    config.num_labels = num_labels
    config.pad_token_id = None if pad is None else token_id(pad)
    model = LlamaForSequenceClassification(config).float().eval()
    model.model.load_state_dict(base.model.state_dict())
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        model.score.weight.copy_(torch.randn(model.score.weight.shape, generator=generator))
    return model


def tokenizer(template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    made = make_tokenizer("llama", chat_template=False)
    made.chat_template = template
    return made


def token_id(token: str) -> int:
    found = make_tokenizer("llama").convert_tokens_to_ids(token)
    assert isinstance(found, int)
    return found


def examples_of(rows: list[dict[str, Any]]) -> list[Example]:
    examples = [to_example(row, "g", i) for i, row in enumerate(rows)]
    assert all(example.status == "ok" for example in examples)
    return examples


def turns(example: Example) -> list[dict[str, str]]:
    return [dataclasses.asdict(message) for message in example.messages]


def ids_of(examples: list[Example]) -> list[list[int]]:
    """Token ids of each conversation, by transformers alone."""
    made = tokenizer()
    return [made.apply_chat_template(turns(e), tokenize=True, return_dict=False) for e in examples]


def rewards(directory: Path, examples: list[Example]) -> np.ndarray:
    """Ours, all of them defined."""
    scores = score_reward(load_reward_model(str(directory)), examples)
    assert [(score.status, score.reason) for score in scores] == [("ok", "")] * len(examples)
    return np.array([score.values["reward"] for score in scores])


def reference(model: LlamaForSequenceClassification, token_ids: list[list[int]]) -> np.ndarray:
    """transformers' in float64: one batch padded on the right, row by row without a pad token."""
    exact = copy.deepcopy(model).double()
    pad = model.config.pad_token_id
    with torch.no_grad():
        if pad is None:
            return np.array([exact(torch.tensor([ids])).logits.item() for ids in token_ids])
        width = max(map(len, token_ids)) + 1
        tokens = torch.tensor([ids + [pad] * (width - len(ids)) for ids in token_ids])
        mask = torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids in token_ids])
        return exact(tokens, attention_mask=mask).logits[:, 0].numpy()


def assert_close(found: np.ndarray, expected: np.ndarray) -> None:
    assert np.ptp(expected) > 1  # rows differ by far more than the tolerance
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5 * np.abs(expected).max())


# pad token, config, size of a shard
VARIANTS: dict[str, tuple[str | None, dict[str, Any], str | None]] = {
    "llama3 scaling, grouped queries": (END, {}, None),
    "the turn's end is the padding, one key/value head": (
        EOT,
        {"rope_parameters": PLAIN_ROPE, "num_key_value_heads": 1},
        None,
    ),
    "no padding token, all heads, says that it is tied": (
        None,
        {"num_key_value_heads": 6, "tie_word_embeddings": True},
        None,
    ),
    "sharded, head_dim of hidden/heads": (
        END,
        {"hidden_size": 60, "head_dim": None, "rope_parameters": PLAIN_ROPE},
        "40KB",
    ),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_rewards_equal_transformers_on_a_right_padded_batch(tmp_path, variant):
    pad, overrides, shard_size = VARIANTS[variant]
    model = make_reward_model(pad, **overrides)
    save_checkpoint(model, tmp_path, tokenizer=tokenizer(), max_shard_size=shard_size)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shard_size is not None)
    examples = examples_of(ROWS)
    token_ids = ids_of(examples)
    assert len({len(ids) for ids in token_ids}) > 10
    assert_close(rewards(tmp_path, examples), reference(model, token_ids))


def test_parity_would_notice_the_padding_token(tmp_path):
    """Which token is the padding decides which one is scored."""
    token_ids = ids_of(examples_of(ROWS))
    one, two = (reference(make_reward_model(pad), token_ids) for pad in (END, EOT))
    assert np.all(np.abs(one - two) > 1e-3 * np.abs(one).max())


def test_rewards_equal_the_published_recipe(tmp_path):
    """The model card's pipeline: the template's BOS is taken off, the tokenizer adds its own."""
    model = make_reward_model()
    save_checkpoint(model, tmp_path, tokenizer=tokenizer())
    made = tokenizer()
    pipe = pipeline("sentiment-analysis", model=model, tokenizer=made, device="cpu")
    examples = examples_of(ROWS)
    texts = [
        str(made.apply_chat_template(turns(e), tokenize=False, add_generation_prompt=False))
        for e in examples
    ]
    outputs = pipe(
        [text.replace(BOS, "") for text in texts],
        top_k=None,
        function_to_apply="none",
        batch_size=1,
    )
    assert_close(rewards(tmp_path, examples), np.array([output[0]["score"] for output in outputs]))


def test_a_bos_that_the_template_leaves_to_the_tokenizer_is_added(tmp_path):
    model, examples = make_reward_model(), examples_of(ROWS[:5])
    without = TEMPLATE.replace('(bos_token if loop.first else "") + ', "")
    assert "bos_token" not in without
    found = []
    for name, template in (("with", TEMPLATE), ("without", without)):
        save_checkpoint(model, tmp_path / name, tokenizer=tokenizer(template))
        found.append(rewards(tmp_path / name, examples))
    np.testing.assert_array_equal(found[0], found[1])


def test_a_bos_in_the_text_becomes_that_token(tmp_path):
    model = make_reward_model()
    save_checkpoint(model, tmp_path, tokenizer=tokenizer())
    examples = examples_of([*ROWS[:3], {"instruction": f"{BOS} is", "output": f"what {BOS}?"}])
    token_ids = ids_of(examples)
    assert token_ids[-1].count(token_id(BOS)) == 3
    assert_close(rewards(tmp_path, examples), reference(model, token_ids))


def test_a_reward_does_not_depend_on_the_rows_around_it(tmp_path):
    save_checkpoint(make_reward_model(), tmp_path, tokenizer=tokenizer())
    model = load_reward_model(str(tmp_path))
    examples = examples_of(ROWS)
    together = [score.values["reward"] for score in score_reward(model, examples)]
    order = random.Random(0).sample(range(len(examples)), 11)
    again = [score.values["reward"] for score in score_reward(model, [examples[i] for i in order])]
    np.testing.assert_allclose(again, [together[i] for i in order], rtol=0, atol=1e-5)
    alone = score_reward(model, [examples[order[0]]])[0].values["reward"]
    np.testing.assert_allclose(alone, again[0], rtol=0, atol=1e-5)


def test_no_rows_have_no_scores(tmp_path):
    save_checkpoint(make_reward_model(), tmp_path, tokenizer=tokenizer())
    assert score_reward(load_reward_model(str(tmp_path)), []) == []


def test_rows_without_a_reward_say_why(tmp_path):
    lengths = [len(ids) for ids in ids_of(examples_of(ROWS))]
    longest = max(lengths)
    model = make_reward_model(max_position_embeddings=longest)
    save_checkpoint(model, tmp_path, tokenizer=tokenizer())
    too_long = copy.deepcopy(ROWS[lengths.index(longest)])
    too_long["output"] += " 1"
    refused = {"messages": [{"role": "system", "content": ""}, *ROWS[4]["messages"]]}
    examples = examples_of([too_long, *ROWS, refused])
    count = len(ids_of(examples[:1])[0])
    assert count > longest
    first, *others, last = score_reward(load_reward_model(str(tmp_path)), examples)
    assert (first.values, first.status) == ({"reward": None}, "too_long")
    assert first.reason == (f"{count} tokens are more than the {longest} of the reward model")
    assert all(score.status == "ok" and score.values["reward"] is not None for score in others)
    assert (last.values, last.status) == ({"reward": None}, "invalid_row")
    assert "the system turn is empty" in last.reason


def test_a_reward_beyond_float32_is_none(tmp_path):
    model = make_reward_model()
    with torch.no_grad():
        model.score.weight.mul_(1e38)
    save_checkpoint(model, tmp_path, tokenizer=tokenizer())
    scores = score_reward(load_reward_model(str(tmp_path)), examples_of(ROWS))
    bad = [score for score in scores if score.status == "non_finite"]
    assert bad
    assert all(score.values == {"reward": None} and score.reason for score in bad)
    assert all(math.isfinite(s.values["reward"] or 0.0) for s in scores)


def message(directory: Path) -> str:
    with pytest.raises(GradjaxError) as raised:
        load_reward_model(str(directory))
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_a_reward_model_is_no_language_model_nor_the_other_way_round(tmp_path):
    save_checkpoint(make_reward_model(), tmp_path / "reward", tokenizer=tokenizer())
    with pytest.raises(GradjaxError, match=r"no next-token head: use it as --reward_model\.$"):
        load_model(str(tmp_path / "reward"))
    save_checkpoint(make_hf_model("llama"), tmp_path / "causal", tokenizer=tokenizer())
    text = message(tmp_path / "causal")
    assert '["LlamaForCausalLM"], expected LlamaForSequenceClassification' in text


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"id2label": None, "label2id": None}, "id2label is null (supported: one label)"),
        ({"id2label": {"0": "bad", "1": "good"}}, 'id2label is {"0": "bad", "1": "good"}'),
        ({"label2id": {"bad": 0, "good": 1}}, 'label2id is {"bad": 0, "good": 1}'),
        ({"id2label": None, "label2id": None, "num_labels": 3}, "num_labels is 3"),
        ({"pad_token_id": [1]}, "pad_token_id is [1] (supported: an integer or null)"),
        ({"mlp_bias": True}, "mlp_bias is true"),
        ({"a_new_idea": 1}, "a_new_idea is 1"),
        ({"architectures": ["MistralForSequenceClassification"]}, "MistralForSequence"),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(tmp_path, change, expected):
    save_checkpoint(make_reward_model(), tmp_path, tokenizer=tokenizer())
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(GradjaxError) as raised:
        read_config(tmp_path, reward=True)
    assert expected in str(raised.value)


def test_transformers_two_labels_are_refused(tmp_path):
    save_checkpoint(make_reward_model(num_labels=2), tmp_path, tokenizer=tokenizer())
    assert "(supported: one label)" in message(tmp_path)


def test_one_label_may_be_said_in_any_way(tmp_path):
    save_checkpoint(make_reward_model(), tmp_path, tokenizer=tokenizer())
    path = tmp_path / "config.json"
    values = json.loads(path.read_text())
    expected = read_config(tmp_path, reward=True)
    assert expected.score_head is not None
    assert expected.score_head.pad_id == token_id(END)
    for names in (["id2label"], ["num_labels"], ["id2label", "label2id", "num_labels"]):
        labels = {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}, "num_labels": 1}
        rest = {name: value for name, value in values.items() if name not in labels}
        path.write_text(json.dumps(rest | {name: labels[name] for name in names}))
        assert read_config(tmp_path, reward=True) == expected


@pytest.mark.parametrize(
    ("name", "tensor", "expected"),
    [
        ("score.weight", None, "missing: score.weight"),
        ("score.weight", torch.zeros(2, 42), "score.weight is [2, 42], by the config [1, 42]"),
        ("lm_head.weight", torch.zeros(317, 42), "not part of this model: lm_head.weight"),
        ("score.bias", torch.zeros(1), "not part of this model: score.bias"),
    ],
)
def test_every_tensor_is_accounted_for(tmp_path, name, tensor, expected):
    save_checkpoint(make_reward_model(), tmp_path, tokenizer=tokenizer())
    tensors = load_file(tmp_path / "model.safetensors")
    tensors.pop(name, None)
    save_file(tensors | ({} if tensor is None else {name: tensor}), tmp_path / "model.safetensors")
    assert expected in message(tmp_path)


def test_a_tokenizer_must_render_a_conversation(tmp_path):
    save_checkpoint(make_reward_model(), tmp_path, tokenizer=tokenizer(None))
    assert f"The tokenizer of {tmp_path} has no chat template" in message(tmp_path)
    for template, reason in (("{{ raise_exception('not today') }}", "not today"), ("", "no chat")):
        tokenizer(template).save_pretrained(tmp_path)
        assert reason in message(tmp_path)
    tokenizer("{% if False %}never{% endif %}").save_pretrained(tmp_path)
    assert "renders nothing" in message(tmp_path)


def test_a_token_that_the_model_does_not_have_is_named(tmp_path):
    save_checkpoint(make_reward_model(vocab_size=211), tmp_path, tokenizer=tokenizer())
    model = load_reward_model(str(tmp_path))
    with pytest.raises(GradjaxError, match=r"group g row \d+: .* vocabulary of 211"):
        score_reward(model, examples_of(ROWS))
