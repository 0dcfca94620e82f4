"""Reward: how a Llama reward model scores a conversation.

The model is transformers' LlamaForSequenceClassification with one label, as
`sfairXC/FsfairX-LLaMA3-RM-v0.1`: a decoder whose head gives one number. It is read at the text's
last token that is not the model's padding token, as transformers does. The text is the whole
conversation as the tokenizer's chat template renders it, with one BOS before it; text that spells
a special token becomes that token, as everywhere in gradjax.
"""

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from transformers import PreTrainedTokenizerFast

from gradjax.checkpoints.hf_config import read_config
from gradjax.checkpoints.pretrained import load_weights
from gradjax.checkpoints.resolve import load_tokenizer, resolve
from gradjax.data.batches import make_batch
from gradjax.data.examples import to_example
from gradjax.data.tokens import check_vocabulary, tokenize_conversation
from gradjax.errors import GradjaxError
from gradjax.model.decoder import Decoder, hidden_states, project_logits
from gradjax.score.config import Done, Score, nobody
from gradjax.score.language_model import batch_faults, recurring_batches
from gradjax.structs import Example, TokenBatch, TokenizedExample

_PROBE = to_example({"instruction": "question", "output": "answer"}, group="", example_id=0)


@dataclasses.dataclass(frozen=True)
class RewardModel:
    """A decoder with a score head, and its tokenizer."""

    decoder: Decoder
    tokenizer: PreTrainedTokenizerFast


def load_reward_model(model: str) -> RewardModel:
    """Loads a reward model in float32.

    Args:
      model: a Hub repo (`sfairXC/FsfairX-LLaMA3-RM-v0.1`) or a local Hugging Face directory.

    Raises:
      GradjaxError: if there is no such model, it is no Llama reward model with one label, its
        files are not what such a checkpoint holds, or its tokenizer has no chat template that
        renders one question and its answer.
    """
    checkpoint = resolve(model, flag="reward_model")
    tokenizer = load_tokenizer(checkpoint.directory)
    if not tokenizer.chat_template:
        raise GradjaxError(
            f"The tokenizer of {checkpoint.directory} has no chat template, which says how the "
            "reward model reads a conversation: add the chat_template that it was trained with to "
            "its tokenizer_config.json, or use another --reward_model."
        )
    probe = tokenize_conversation(_PROBE, tokenizer)
    if probe.status != "ok":
        raise GradjaxError(
            f"The chat template of {checkpoint.directory} does not render one question and its "
            f"answer ({probe.reason}): mend its chat_template or use another --reward_model."
        )
    config = read_config(checkpoint.directory, reward=True)
    decoder = load_weights(checkpoint, config, "float32", flag="reward_model")
    return RewardModel(decoder, tokenizer)


def score_reward(
    model: RewardModel, examples: Sequence[Example], *, done: Done = nobody
) -> list[Score]:
    """The column `reward` of usable examples, in their order: any finite number, higher is better.

    None, with a status and a reason, for a conversation that the chat template refuses
    (`invalid_row`), one of more tokens than the model has positions (`too_long`: cut, it would
    have no end to score) and one whose score is NaN or infinite (`non_finite`).

    Raises:
      GradjaxError: if the tokenizer gives a token that the model does not have.
    """
    config = model.decoder.config
    tokenized = [
        _within(config.max_positions, tokenize_conversation(example, model.tokenizer))
        for example in examples
    ]
    check_vocabulary(tokenized, config.vocab_size)
    scores = [Score({"reward": None}, row.status, row.reason) for row in tokenized]
    usable = [i for i, row in enumerate(tokenized) if row.status == "ok"]
    rows = [tokenized[i] for i in usable]
    for spec in recurring_batches([row.num_tokens for row in rows]):
        batch = make_batch(spec, rows)
        with batch_faults(batch):
            rewards = _batch_rewards(model.decoder, batch)
        for row, reward in zip(spec.rows, rewards.tolist(), strict=False):  # filler comes last
            scores[usable[row]] = _score(reward)
        done(len(spec.rows))
    return scores


def _within(max_positions: int, row: TokenizedExample) -> TokenizedExample:
    if row.num_tokens <= max_positions:
        return row
    reason = f"{row.num_tokens} tokens are more than the {max_positions} of the reward model"
    return dataclasses.replace(row, status="too_long", reason=reason)


def _score(reward: float) -> Score:
    if math.isfinite(reward):
        return Score({"reward": reward})
    reason = f"the reward is {reward} although all weights are finite"
    return Score({"reward": None}, "non_finite", reason)


def _batch_rewards(decoder: Decoder, batch: TokenBatch) -> np.ndarray:
    """Scores of a batch, float32 [B]; those of filler mean nothing."""
    head, positions = decoder.config.score_head, np.arange(batch.tokens.shape[1])
    scored = positions < batch.lengths[:, None]
    if head and head.pad_id is not None:
        scored &= batch.tokens != head.pad_id
    last = (positions * scored).argmax(axis=1)  # 0 where a text is padding alone, as transformers
    return np.asarray(_scores_at(decoder, hidden_states(decoder, jnp.asarray(batch.tokens)), last))


@jax.jit
def _scores_at(
    decoder: Decoder, x: Float[Array, "B T D"], positions: Int[Array, " B"]
) -> Float[Array, " B"]:
    ends = x[jnp.arange(len(x)), positions]
    scores = project_logits(decoder.config, decoder.final_norm[...], decoder.output_table, ends)
    return scores[:, 0]
