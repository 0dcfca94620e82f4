"""IFD and perplexities against their definition in PyTorch, in float64 and one row at a time."""

import dataclasses
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gradjax.checkpoints import resolve
from gradjax.data.examples import to_example
from gradjax.errors import GradjaxError
from gradjax.score.config import Score
from gradjax.score.ifd import score_ifd, score_perplexity
from gradjax.score.language_model import LanguageModel, load_language_model, mean_losses
from gradjax.structs import Example, TokenizedExample
from tests.checkpoints import make_hf_model
from tests.gpt2_checkpoints import make_gpt2, save_as_on_the_hub
from tests.tokenizers import make_tokenizer

WINDOW = 31
VOCABULARY = 317
LONG = "the sea and the wind sing of seven apples; " * 8
ROWS = [
    {"instruction": "What is 17 + 25?", "output": "The answer is 42."},
    {"instruction": "Write a short poem.", "output": LONG},  # the response does not fit
    {"instruction": LONG, "output": "The answer."},  # the prompt alone does not
    {"instruction": "Ann has apples", "output": "7"},  # one token
    {"instruction": "Größe, 数据?", "input": "naïve café", "output": "  😀 print(add(1, 2))\n"},
    {"instruction": "", "output": "def add(a, b): return a + b"},
    {"instruction": "Repeat: keeps", "output": "Repeat: keeps\nRepeat: keeps"},
]
LONE_TOKEN = 3
FULL = 2


def examples(rows: list[dict] = ROWS) -> list[Example]:
    return [to_example(row, "rows", i) for i, row in enumerate(rows)]


@dataclasses.dataclass
class Pair:
    """One model twice: transformers' in float64 and ours, from its files."""

    exact: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    ours: LanguageModel

    def loss(self, tokens: list[int], first: int) -> float:
        """Mean loss of the tokens from `first` on; NaN if there are none."""
        with torch.no_grad():
            logits = self.exact(torch.tensor([tokens])).logits[0].double()
        losses = torch.nn.functional.cross_entropy(
            logits[:-1], torch.tensor(tokens[1:]), reduction="none"
        )
        return losses[max(first - 1, 0) :].mean().item()

    def tokens(self, row: dict, max_length: int = WINDOW) -> tuple[list[int], list[int]]:
        """The prompt's, and those of prompt and response as cut."""
        prompt = "\n".join([row["instruction"], *filter(None, [row.get("input")]), ""])
        tokens = self.tokenizer.encode(prompt + row["output"])[:max_length]
        return self.tokenizer.encode(prompt), tokens

    def losses(self, row: dict, max_length: int = WINDOW) -> tuple[float, float]:
        """With and without the instruction."""
        prompt, tokens = self.tokens(row, max_length)
        room = max_length - len(prompt) + 1
        alone = self.tokenizer.encode(row["output"])[:room] if room > 0 else []
        return (
            self.loss(tokens, len(prompt)),
            self.loss(alone, 1) if len(alone) > 1 else math.nan,
        )


FAMILIES = ("gpt2", "qwen2", "llama")  # the last has a BOS token


def make_pair(family: str, directory: Path) -> Pair:
    sizes = {"vocab_size": VOCABULARY}
    if family == "gpt2":
        tokenizer = make_tokenizer("qwen2", chat_template=False)
        model = make_gpt2(**sizes, n_positions=WINDOW)
        save_as_on_the_hub(model, directory, tokenizer)
    else:
        tokenizer = make_tokenizer(family, chat_template=False)
        model = make_hf_model(family, **sizes, max_position_embeddings=WINDOW)
        model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
    return Pair(model.double(), tokenizer, load_language_model(str(directory)))


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> dict[str, Pair]:
    return {family: make_pair(family, tmp_path_factory.mktemp(family)) for family in FAMILIES}


def close(expected: float):
    return None if math.isnan(expected) else pytest.approx(expected, rel=2e-5)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("max_length", [None, 19])
def test_ifd_is_its_definition(pairs, family, max_length):
    pair = pairs[family]
    scores = score_ifd(pair.ours, examples(), max_length)
    for row, score in zip(ROWS, scores, strict=True):
        given, alone = pair.losses(row, max_length or WINDOW)
        assert score.values == {
            "ifd": close(math.exp(given) / math.exp(alone)),
            "ifd_loss_ratio": close(given / alone),
            "perplexity_with_instruction": close(math.exp(given)),
            "perplexity_without_instruction": close(math.exp(alone)),
        }
        assert (score.reason == "") == (None not in score.values.values())
    undefined = {i for i, score in enumerate(scores) if score.values["ifd"] is None}
    assert undefined >= ({FULL} if family == "llama" else {FULL, LONE_TOKEN})
    assert len(undefined) <= 3


@pytest.mark.parametrize("family", FAMILIES)
def test_perplexity_is_ifds_with_the_instruction(pairs, family):
    pair = pairs[family]
    scores = score_perplexity(pair.ours, examples())
    for row, score, ifd in zip(ROWS, scores, score_ifd(pair.ours, examples()), strict=True):
        assert score.values["perplexity"] == ifd.values["perplexity_with_instruction"]
        if score.status == "ok":
            assert score.values["loss"] == close(pair.losses(row)[0])
            prompt, tokens = pair.tokens(row)
            assert score.values["num_tokens"] == len(tokens)
            assert score.values["num_target_tokens"] == len(tokens) - len(prompt)
            assert score.values["perplexity"] == math.exp(score.values["loss"] or 0)
            assert score.reason == ""


def test_a_prompt_that_fills_the_window_has_a_status(pairs):
    row = examples()[FULL]
    nothing = dict.fromkeys(("perplexity", "loss", "num_tokens", "num_target_tokens"))
    (score,) = score_perplexity(pairs["gpt2"].ours, [row])
    assert score.values == nothing
    assert score.status == "no_target_tokens"
    assert f"--max_length={WINDOW}: the prompt fills the window" in score.reason
    (score,) = score_ifd(pairs["gpt2"].ours, [row])
    assert score.status == "no_target_tokens"


def test_both_sides_predict_as_many_tokens_where_the_window_cuts(pairs):
    """With a BOS the cut response alone is scored on the very tokens that are left of it."""
    pair, row = pairs["llama"], ROWS[1]
    prompt = pair.tokenizer.encode(row["instruction"] + "\n")
    response = pair.tokenizer.encode(row["output"])
    kept = WINDOW - len(prompt)
    assert kept < len(response) - 1
    loss = pair.loss(response[: 1 + kept], 1)
    score = score_ifd(pair.ours, examples([row]))[0]
    assert score.values["perplexity_without_instruction"] == close(math.exp(loss))


@pytest.mark.parametrize("family", ["gpt2", "qwen2"])
def test_a_lone_token_has_no_perplexity_without_bos(pairs, family):
    score = score_ifd(pairs[family].ours, examples())[LONE_TOKEN]
    assert score.status == "ok"
    assert score.values["perplexity_with_instruction"] is not None
    assert score.values["perplexity_without_instruction"] is None
    assert score.reason == "the response alone has no token with one before it"


def test_rows_that_cannot_be_used_keep_their_place(pairs):
    turns = ["a?", "b", "c?", "d"]
    roles = ["user", "assistant"] * 2
    messages = [{"role": r, "content": t} for r, t in zip(roles, turns, strict=True)]
    rows = [ROWS[0], {"messages": messages}, {"instruction": "x"}, ROWS[0]]
    for scores in (f(pairs["gpt2"].ours, examples(rows)) for f in (score_ifd, score_perplexity)):
        assert [score.status for score in scores] == ["ok", "invalid_row", "invalid_row", "ok"]
        assert "4 turns have no plain form" in scores[1].reason
        assert "'output' is missing" in scores[2].reason
        assert scores[0] == scores[3]
        assert set(scores[1].values.values()) == {None}


def test_no_rows_have_no_scores(pairs):
    assert score_ifd(pairs["gpt2"].ours, []) == []


@pytest.mark.parametrize("family", FAMILIES)
def test_a_rows_score_does_not_depend_on_the_other_rows(pairs, family):
    ours = pairs[family].ours
    usable = [example for i, example in enumerate(examples()) if i not in (FULL, LONE_TOKEN)]
    order = np.random.default_rng(3).permutation(len(usable) * 17) % len(usable)
    together = score_ifd(ours, [usable[i] for i in order])
    alone = [score_ifd(ours, [example])[0] for example in usable]
    for i, score in zip(order, together, strict=True):
        assert score.values == pytest.approx(alone[i].values, rel=1e-5)


def test_batches_are_of_few_shapes(pairs):
    """Chunk after chunk of a data set has other lengths: each new shape costs a compilation."""
    random = np.random.default_rng(1)
    shapes, padded, real = set(), 0, 0

    def hidden_states(tokens: jax.Array) -> jax.Array:
        nonlocal padded
        shapes.add(tokens.shape)
        padded += tokens.size
        return jnp.ones((*tokens.shape, 3))

    model = dataclasses.replace(
        pairs["gpt2"].ours,
        window=1024,
        hidden_states=hidden_states,
        head=(jnp.ones((VOCABULARY, 3)),),
        project_logits=lambda table, states: states @ table.T,
    )
    for _ in range(20):
        lengths = np.minimum(random.lognormal(5.7, 0.8, 251).astype(int) + 2, 1024)
        sequences = [
            TokenizedExample(examples()[0], np.full(n, 5, np.int32), np.arange(n) == n - 1)
            for n in lengths
        ]
        # All scores are alike, so that every token has the same chance.
        np.testing.assert_allclose(mean_losses(model, sequences), math.log(VOCABULARY), rtol=1e-6)
        real += lengths.sum()
    assert len(shapes) < 40
    assert padded < 1.4 * real


def with_norm_scaled(model: LanguageModel, scale: float) -> LanguageModel:
    """A GPT-2 whose logits are multiplied."""
    norm, bias, table = model.head
    return dataclasses.replace(model, head=(norm * scale, bias * scale, table))


def test_a_perplexity_beyond_float64_is_none_with_a_reason(pairs):
    wild = with_norm_scaled(pairs["gpt2"].ours, 1e4)
    (score,) = score_ifd(wild, examples(ROWS[:1]))
    losses = score.values.pop("ifd_loss_ratio")
    assert losses is not None
    assert 0 < losses < math.inf
    assert score == Score(
        dict.fromkeys(score.values), reason="a perplexity is too large for a float64"
    )
    (score,) = score_perplexity(wild, examples(ROWS[:1]))
    assert score.values["perplexity"] is None
    assert score.values["loss"] is not None
    assert score.values["loss"] > 709
    assert score.reason == "a perplexity is too large for a float64"


def test_a_loss_that_is_not_finite_is_none_with_a_status(pairs):
    broken = with_norm_scaled(pairs["gpt2"].ours, 1e38)
    for score in (f(broken, examples(ROWS[:1]))[0] for f in (score_ifd, score_perplexity)):
        assert score.status == "non_finite"
        assert set(score.values.values()) == {None}
        assert "NaN or infinite" in score.reason


def test_a_certain_response_has_ifd_1_and_no_loss_ratio(pairs):
    pair = pairs["gpt2"]
    row = {"instruction": "What?", "output": "!!!"}
    mark = pair.tokenizer.encode("!")
    assert pair.tokenizer.encode("!!!") == mark * 3
    # Every context gives the same scores, and "!" by far the largest.
    width = pair.ours.head[2].shape[1]
    table = jnp.zeros((VOCABULARY, width)).at[mark[0], 0].set(1e3)
    head = (jnp.zeros(width), jnp.ones(width), table)
    sure = dataclasses.replace(pair.ours, head=head)
    (score,) = score_ifd(sure, examples([row]))
    assert score == Score(
        {
            "ifd": 1.0,
            "ifd_loss_ratio": None,
            "perplexity_with_instruction": 1.0,
            "perplexity_without_instruction": 1.0,
        },
        reason="the loss of the response alone is 0",
    )


def test_a_length_over_the_window_is_refused(pairs):
    with pytest.raises(GradjaxError, match=f"--max_length=32: .* takes at most {WINDOW} tokens"):
        score_ifd(pairs["gpt2"].ours, examples(), WINDOW + 1)


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        ([5] * (WINDOW + 1), rf"group rows row 0 has {WINDOW + 1} tokens, and .* takes at most"),
        ([5, VOCABULARY, 5], rf"token id {VOCABULARY}, outside the vocabulary of {VOCABULARY}"),
    ],
)
def test_tokens_that_the_model_cannot_take_are_refused(pairs, tokens, expected):
    ids = np.array(tokens, np.int32)
    sequence = TokenizedExample(examples()[0], ids, np.ones(len(ids), bool))
    with pytest.raises(GradjaxError, match=expected):
        mean_losses(pairs["gpt2"].ours, [sequence])


def test_losses_of_a_large_batch_are_taken_in_chunks(pairs):
    """More targets than are projected to the vocabulary at a time."""
    pair = pairs["qwen2"]
    random = np.random.default_rng(2)
    tokens = random.integers(0, VOCABULARY, (13, 29), dtype=np.int32)
    marks = random.random(tokens.shape) < 0.7
    sequences = [TokenizedExample(examples()[0], t, m) for t, m in zip(tokens, marks, strict=True)]
    with torch.no_grad():
        scores = pair.exact(torch.tensor(tokens)).logits.double()
    losses = torch.nn.functional.cross_entropy(
        scores[:, :-1].transpose(1, 2), torch.tensor(tokens[:, 1:]).long(), reduction="none"
    ).numpy()
    expected = [row[mark[1:]].mean() for row, mark in zip(losses, marks, strict=True)]
    found = mean_losses(pair.ours, sequences)
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, expected, rtol=2e-5)


def test_gpt2_is_the_hubs(tmp_path, monkeypatch):
    save_as_on_the_hub(
        make_gpt2(vocab_size=VOCABULARY, n_positions=WINDOW),
        tmp_path,
        make_tokenizer("qwen2", chat_template=False),
    )
    asked = []

    def download(repo: str, **options: object) -> str:
        asked.append(repo)
        return str(tmp_path)

    monkeypatch.setattr(resolve, "snapshot_download", download)
    model = load_language_model("gpt2")
    assert set(asked) == {"openai-community/gpt2"}
    assert (model.name, model.window, model.vocab_size) == ("gpt2", WINDOW, VOCABULARY)


def test_a_hub_out_of_reach_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(GradjaxError, match="--ifd_model=openai-community/gpt2 is not in the"):
        load_language_model("gpt2")


def test_progress_comes_by_batches_and_ends_with_every_row(pairs):
    told: list[float] = []
    usable = [example for example in examples() if example.status == "ok"]
    score_ifd(pairs["gpt2"].ours, usable, done=told.append)
    assert len(told) >= 2
    rows = sum(told)
    told.clear()
    score_perplexity(pairs["gpt2"].ours, usable, done=told.append)
    assert len(usable) - 2 <= rows <= sum(told) <= len(usable)  # some have no loss to compute
