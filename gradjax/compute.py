"""Tokenized examples -> results, batch by batch: the loop inside `gradient_spectra` and `main`."""

from collections.abc import Collection, Iterator, Sequence

import jax

from gradjax.config import SpectraConfig
from gradjax.data.batches import BatchPlan, make_batch, plan_batches
from gradjax.device import device_memory
from gradjax.errors import GradjaxError, out_of_memory
from gradjax.gradients.factored import activation_bytes
from gradjax.model.config import DecoderConfig
from gradjax.model.decoder import Decoder
from gradjax.model.parameters import block_parameters
from gradjax.spectra.batch import RowSpectra, SpectraSettings, batch_spectra
from gradjax.spectra.decompose import decomposer, default_route
from gradjax.spectra.singular_values import Route
from gradjax.structs import ExampleResult, TokenizedExample

# Tokens per batch: enough to fill the device's matrix units, little enough for its memory.
_BATCH_TOKENS = {"cpu": 2048}
_ACCELERATOR_BATCH_TOKENS = 16384
# Shares of the device's memory that activations and whole gradients may take.
_ACTIVATIONS_SHARE = 0.25
_GRADIENTS_SHARE = 0.15


def compute_results(
    decoder: Decoder,
    tokenized: Sequence[TokenizedExample],
    config: SpectraConfig,
    batch_tokens: int | None = None,
    finished: Collection[int] = (),
) -> Iterator[list[ExampleResult]]:
    """Results of the `ok` examples, one list per batch, in the order they are computed.

    Args:
      tokenized: all examples of a run, so that one taken up again has the same batches.
      batch_tokens: padded tokens per batch; by backend if None.
      finished: positions in `tokenized` that are left out.

    Raises:
      GradjaxError: if a batch does not fit the device's memory.
    """
    backend = jax.default_backend()
    layers = config.layer_numbers(decoder.config.num_layers)
    plans = _plans(
        tokenized,
        batch_tokens or _BATCH_TOKENS.get(backend, _ACCELERATOR_BATCH_TOKENS),
        _most_rows(decoder.config, len(layers) if _holds_all_layers(config) else 2),
        frozenset(finished),
    )
    itemsize = decoder.embedding.dtype.itemsize
    for plan in plans:
        # Entered for each batch: it holds BLAS to one thread, and callers work between batches.
        with decomposer(resolved_route(config), config.projections, backend) as decompose:
            settings = SpectraSettings(
                layers=layers,
                projections=config.projections,
                similarity=config.similarity,
                decompose=decompose if config.spectrum == "factored" else None,
                keep_activations=_activations_fit(decoder.config, plan, layers, itemsize),
                dense_chunk=_dense_chunk(decoder.config, plan, itemsize),
            )
            try:
                rows = batch_spectra(decoder, make_batch(plan, tokenized), settings)
            except (jax.errors.JaxRuntimeError, MemoryError) as error:
                raise _memory_fault(plan, error) from error
        yield [
            _result(tokenized[position], row)
            for position, row in zip(plan.rows, rows, strict=True)
            if position not in finished
        ]


def check_vocabulary(tokenized: Sequence[TokenizedExample], config: DecoderConfig) -> None:
    """Raises GradjaxError where a token id has no row in the embedding table."""
    for t in tokenized:
        if t.num_tokens and t.tokens.max() >= config.vocab_size:
            raise GradjaxError(
                f"group {t.example.group} row {t.example.example_id}: the tokenizer gives token id "
                f"{t.tokens.max()}, outside the model's vocabulary of {config.vocab_size}; use the "
                "tokenizer that belongs to this checkpoint"
            )


def resolved_route(config: SpectraConfig) -> Route:
    """The route that `auto` stands for on this backend."""
    if config.spectrum_route == "auto":
        return default_route(jax.default_backend())
    return config.spectrum_route


def _plans(
    tokenized: Sequence[TokenizedExample],
    batch_tokens: int,
    most_rows: int,
    finished: frozenset[int],
) -> list[BatchPlan]:
    """Batches of the unfinished `ok` examples.

    A run that was stopped keeps the batches it had, so that its numbers come out the same to
    the last bit; where they no longer fit (rows were added), the rest is batched anew.
    """

    def plan(positions: list[int]) -> list[BatchPlan]:
        lengths = [tokenized[i].num_tokens for i in positions]
        return [
            BatchPlan(tuple(positions[row] for row in plan.rows), plan.length, plan.size)
            for plan in plan_batches(lengths, batch_tokens, most_rows)
        ]

    usable = [i for i, t in enumerate(tokenized) if t.status == "ok"]
    left = [p for p in plan(usable) if not finished.issuperset(p.rows)]
    if any(finished.intersection(p.rows) for p in left):
        return plan([i for i in usable if i not in finished])
    return left


def _result(tokenized: TokenizedExample, row: RowSpectra) -> ExampleResult:
    if not row.finite:
        reason = "the loss or a gradient is NaN or infinite although all weights are finite"
        return ExampleResult(tokenized, "non_finite", reason)
    return ExampleResult(
        tokenized, "ok", loss=row.loss, spectra=row.spectra, similarity=row.similarity
    )


def _memory_fault(plan: BatchPlan, error: Exception) -> Exception:
    """What to do about a batch that does not fit; other faults of the device as they are."""
    if not out_of_memory(error):
        return error
    remedy = "--batch_tokens" if plan.size > 1 else "--max_length, or choose --dtype=bfloat16"
    return GradjaxError(
        f"a batch of {plan.size} rows of {plan.length} tokens does not fit the "
        f"{device_memory() / 2**30:.0f} GiB of this device; lower {remedy}"
    )


def _activations_fit(
    config: DecoderConfig, plan: BatchPlan, layers: tuple[int, ...], itemsize: int
) -> bool:
    tokens = plan.size * plan.length
    needed = tokens * activation_bytes(config, itemsize) * (config.num_layers - min(layers))
    return needed <= _ACTIVATIONS_SHARE * device_memory()


def _dense_chunk(config: DecoderConfig, plan: BatchPlan, itemsize: int) -> int:
    """Examples to differentiate at a time: `jax.grad` keeps every intermediate of theirs."""
    scores = 4 * config.num_heads * plan.length * 4  # per token: float32, and its derivatives
    per_token = config.num_layers * (3 * activation_bytes(config, itemsize) + scores)
    per_token += 12 * config.vocab_size
    fitting = int(_ACTIVATIONS_SHARE * device_memory() / (per_token * plan.length))
    return min(max(fitting, 1), plan.size)


def _holds_all_layers(config: SpectraConfig) -> bool:
    return config.similarity == "all" or config.spectrum == "dense"


def _most_rows(config: DecoderConfig, layers_held: int) -> int:
    """Examples whose whole float32 gradients of some layers fit their share of the memory."""
    table = block_parameters(config, layer=0)
    entries = sum(rows * columns for rows, columns in (table[p].shape(config) for p in "qkvo"))
    return max(int(_GRADIENTS_SHARE * device_memory() / (4 * entries * layers_held)), 1)
