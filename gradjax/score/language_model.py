"""Language models as judges of text: mean losses of token sequences, forward passes only."""

import dataclasses
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from transformers import PreTrainedTokenizerFast

from gradjax.checkpoints.gpt2 import is_gpt2, load_gpt2, read_gpt2_config
from gradjax.checkpoints.hf_config import read_config
from gradjax.checkpoints.pretrained import load_weights
from gradjax.checkpoints.resolve import Checkpoint, fetch_weights, load_tokenizer, resolve
from gradjax.data.batches import BatchSpec, batch_by_length, make_batch, round_up
from gradjax.device import local_device, memory_faults
from gradjax.errors import GradjaxError
from gradjax.model import decoder, gpt2
from gradjax.score.config import Done, nobody
from gradjax.structs import TokenBatch, TokenizedExample

GPT2 = "gpt2"
_GPT2_REPO = "openai-community/gpt2"
_FLAG = "ifd_model"
_SHAPES = 6  # in one call
_FINENESS = 4  # sizes and padded lengths to each doubling
_CHUNK = 128  # positions whose logits exist at once


@dataclasses.dataclass(frozen=True)
class LanguageModel:
    """A model of any family that predicts next tokens, with its tokenizer."""

    name: str  # as it was asked for
    tokenizer: PreTrainedTokenizerFast
    vocab_size: int
    window: int  # tokens that a sequence may have
    hidden_states: Callable[[Array], Array]  # tokens [B, T] -> [B, T, D], before the final norm
    head: tuple[Array, ...]  # weights of the final norm and the output head
    project_logits: Callable[..., Array]  # head, then [*B, D] -> [*B, V]


def resolve_language_model(name: str) -> Checkpoint:
    """The checkpoint of a name as of `load_language_model`; see `checkpoints.resolve`."""
    return resolve(_GPT2_REPO if name == GPT2 else name, flag=_FLAG)


def language_window(directory: Path) -> int:
    """The most tokens that a checkpoint's model takes, by its config.json."""
    read = read_gpt2_config if is_gpt2(directory) else read_config
    return read(directory).max_positions


def load_language_model(name: str) -> LanguageModel:
    """A model in float32 on the default device.

    Args:
      name: `gpt2`, or as of `--model`: a registered name, a Hub repo or a local directory, of
        GPT-2's architecture or one of the decoder's.

    Raises:
      GradjaxError: if there is no such model, or its files are not what a checkpoint of these
        architectures holds.
    """
    checkpoint = resolve_language_model(name)
    directory = checkpoint.directory
    tokenizer = load_tokenizer(directory)
    if is_gpt2(directory):
        weights = load_gpt2(fetch_weights(checkpoint, flag=_FLAG).directory)
        hidden_states, project_logits = gpt2.hidden_states, gpt2.project_logits
        head = (weights.final_norm[...], weights.final_norm_bias[...], weights.embedding[...])
    else:
        config = read_config(directory)
        weights = load_weights(checkpoint, config, "float32", flag=_FLAG)
        hidden_states, project_logits = decoder.hidden_states, decoder.project_logits
        head = (weights.final_norm[...], weights.output_table)
    config = weights.config
    return LanguageModel(
        name=name,
        tokenizer=tokenizer,
        vocab_size=config.vocab_size,
        window=config.max_positions,
        hidden_states=partial(hidden_states, weights),
        head=head,
        project_logits=partial(project_logits, config),
    )


def mean_losses(
    model: LanguageModel, sequences: Sequence[TokenizedExample], done: Done = nobody
) -> np.ndarray:
    """Each sequence's mean of `-log p(token | tokens before it)` over its targets, in nats.

    float64 [len(sequences)], from losses in float32. NaN where a sequence has no target but
    its first token, which nothing predicts. A sequence's number depends on the others by no
    more than rounding.

    Raises:
      GradjaxError: if a sequence is longer than the model's window or has a token outside of
        its vocabulary, or a batch does not fit the device's memory.
    """
    means = np.full(len(sequences), np.nan)
    rows = [i for i, sequence in enumerate(sequences) if sequence.targets[1:].any()]
    scored = [sequences[row] for row in rows]
    _check(model, scored)
    for spec in recurring_batches([sequence.num_tokens for sequence in scored]):
        means[[rows[i] for i in spec.rows]] = _batch_means(model, make_batch(spec, scored))
        done(len(spec.rows))
    return means


def _check(model: LanguageModel, sequences: Sequence[TokenizedExample]) -> None:
    for sequence in sequences:
        where = f"group {sequence.example.group} row {sequence.example.example_id}"
        if sequence.num_tokens > model.window:
            raise GradjaxError(
                f"{where} has {sequence.num_tokens} tokens, and {model.name} takes at most "
                f"{model.window}: lower --max_length."
            )
        if (largest := sequence.tokens.max()) >= model.vocab_size:
            raise GradjaxError(
                f"{where}: the tokenizer gives token id {largest}, outside the vocabulary of "
                f"{model.vocab_size} of {model.name}: use the tokenizer that belongs to this "
                "checkpoint."
            )


def recurring_batches(lengths: Sequence[int]) -> list[BatchSpec]:
    """Batches of shapes that recur from call to call: each new one costs a compilation."""
    rounded = round_up(np.asarray(lengths, np.int64), 32, _FINENESS).tolist()
    specs = batch_by_length(rounded, local_device().batch_tokens, max_shapes=_SHAPES)
    sizes = round_up(np.asarray([spec.size for spec in specs], np.int64), 1, _FINENESS).tolist()
    return [dataclasses.replace(spec, size=size) for spec, size in zip(specs, sizes, strict=True)]


def _batch_means(model: LanguageModel, batch: TokenBatch) -> np.ndarray:
    """The mean losses of a batch whose rows all have targets; float64 [rows]."""
    # The states at `before` predict the token after; losses are summed row by row.
    slots, before = np.nonzero(batch.targets[:, 1:])
    labels = batch.tokens[slots, before + 1]
    with batch_faults(batch):
        states = np.asarray(model.hidden_states(jnp.asarray(batch.tokens)))[slots, before]
        losses = [
            _token_losses(model.project_logits, model.head, *chunk)
            for chunk in zip(_chunks(states), _chunks(labels), strict=True)
        ]
        total = np.bincount(slots, np.concatenate(losses)[: len(slots)])
    return total / np.bincount(slots)


def batch_faults(batch: TokenBatch) -> AbstractContextManager[None]:
    """Says what to do about a batch that does not fit beside the model."""
    size, length = batch.tokens.shape
    return memory_faults(size, length, "leave long rows out, or use a smaller model")


def _chunks(array: np.ndarray) -> np.ndarray:
    """[N, ...] -> [chunks, size, ...], the last filled up with zeros: logits are wide."""
    padding = np.zeros((-len(array) % _CHUNK, *array.shape[1:]), array.dtype)
    return np.concatenate([array, padding]).reshape(-1, _CHUNK, *array.shape[1:])


@partial(jax.jit, static_argnums=0)
def _token_losses(
    project_logits: Callable[..., Array],
    head: tuple[Array, ...],
    states: Float[Array, "N D"],
    labels: Int[Array, " N"],
) -> Float[Array, " N"]:
    return decoder.token_losses(project_logits(*head, states), labels)
