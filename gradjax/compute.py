"""Tokenized examples -> results, batch by batch: the loop inside `gradient_spectra` and `main`."""

import dataclasses
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager

import jax
from jax.sharding import Mesh

from gradjax.config import SpectraConfig
from gradjax.data.batches import BatchPlan, make_batch, plan_batches
from gradjax.device import device_memory
from gradjax.errors import GradjaxError, out_of_memory
from gradjax.gradients.factored import activation_bytes
from gradjax.model.config import DecoderConfig
from gradjax.model.decoder import Decoder
from gradjax.model.parameters import block_parameters
from gradjax.plan import fitting_memory
from gradjax.spectra.batch import RowSpectra, SpectraSettings, batch_spectra
from gradjax.spectra.decompose import Decompose, decomposer, decomposes_on_host, default_route
from gradjax.spectra.singular_values import Route
from gradjax.structs import ExampleResult, TokenizedExample

# Tokens per batch: enough to fill the device's matrix units, little enough for its memory.
_BATCH_TOKENS = {"cpu": 2048}
_ACCELERATOR_BATCH_TOKENS = 16384
# Shares of the device's memory that the dense path's intermediates and whole gradients may take.
_INTERMEDIATES_SHARE = 0.25
_GRADIENTS_SHARE = 0.15


def plan_rows(
    tokenized: Sequence[TokenizedExample],
    config: SpectraConfig,
    model: DecoderConfig,
    batch_tokens: int | None = None,
    devices: int = 1,
    among: Sequence[int] | None = None,
) -> list[BatchPlan]:
    """Batches of the `ok` examples; their rows are positions in `tokenized`.

    Args:
      batch_tokens: padded tokens per batch and device; by backend if None.
      devices: each has its share of a batch's examples.
      among: the positions to choose from; all if None.
    """
    among = range(len(tokenized)) if among is None else among
    positions = [i for i in among if tokenized[i].status == "ok"]
    layers = len(config.layer_numbers(model.num_layers)) if _holds_all_layers(config) else 2
    plans = plan_batches(
        [tokenized[i].num_tokens for i in positions],
        batch_tokens or default_batch_tokens(),
        _most_rows(model, layers),
        devices,
    )
    return [
        dataclasses.replace(plan, rows=tuple(positions[row] for row in plan.rows)) for plan in plans
    ]


def default_batch_tokens() -> int:
    """Padded tokens per batch and device on this backend."""
    return _BATCH_TOKENS.get(jax.default_backend(), _ACCELERATOR_BATCH_TOKENS)


def unfinished(
    plans: Sequence[BatchPlan],
    finished: Collection[int],
    plan_among: Callable[[list[int]], list[BatchPlan]],
) -> list[BatchPlan]:
    """Batches of the rows that are left.

    A run that was stopped keeps the batches it had, so that its numbers come out the same to
    the last bit; where they no longer fit (rows were added), the rest is batched anew.
    """
    done = frozenset(finished)
    left = [plan for plan in plans if not done.issuperset(plan.rows)]
    if any(done.intersection(plan.rows) for plan in left):
        return plan_among(sorted(i for plan in left for i in plan.rows if i not in done))
    return left


def compute_results(
    decoder: Decoder,
    tokenized: Sequence[TokenizedExample],
    config: SpectraConfig,
    plans: Sequence[BatchPlan],
) -> Iterator[list[ExampleResult]]:
    """Results of the planned examples, one list per batch.

    They are those of this process's devices. While a list is being used, the devices work on the
    next batch.

    Args:
      tokenized: what the plans' rows are positions in.
      plans: of `plan_rows`.

    Raises:
      GradjaxError: if a batch does not fit the device's memory.
    """
    mesh, model = decoder.mesh, decoder.config
    itemsize = decoder.embedding.dtype.itemsize
    with _decompose(config, mesh) as decompose:
        waiting: tuple[BatchPlan, Callable[[], list[RowSpectra]]] | None = None
        for plan in plans:
            _, keep_activations = fitting_memory(model, config, plan, itemsize, dict(mesh.shape))
            settings = SpectraSettings(
                layers=config.layer_numbers(model.num_layers),
                projections=config.projections,
                similarity=config.similarity,
                decompose=decompose,
                keep_activations=keep_activations,
                dense_chunk=_dense_chunk(model, plan, mesh.size, itemsize),
            )
            with _memory_faults(plan):
                wait = batch_spectra(decoder, make_batch(plan, tokenized), settings)
            if waiting:
                yield _results(*waiting, tokenized)
            waiting = plan, wait
        if waiting:
            yield _results(*waiting, tokenized)


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


@contextmanager
def _decompose(config: SpectraConfig, mesh: Mesh) -> Iterator[Decompose | None]:
    """The way to singular values; None for the dense path."""
    if config.spectrum == "dense":
        yield None
        return
    on_host = decomposes_on_host(mesh.devices.flat[0].platform)
    with decomposer(resolved_route(config), config.projections, mesh, on_host=on_host) as way:
        yield way


def _results(
    plan: BatchPlan,
    wait: Callable[[], list[RowSpectra]],
    tokenized: Sequence[TokenizedExample],
) -> list[ExampleResult]:
    with _memory_faults(plan):
        rows = wait()
    return [_result(tokenized[row.row], row) for row in rows]


def _result(tokenized: TokenizedExample, row: RowSpectra) -> ExampleResult:
    if not row.finite:
        reason = "the loss or a gradient is NaN or infinite although all weights are finite"
        return ExampleResult(tokenized, "non_finite", reason)
    return ExampleResult(
        tokenized, "ok", loss=row.loss, spectra=row.spectra, similarity=row.similarity
    )


@contextmanager
def _memory_faults(plan: BatchPlan) -> Iterator[None]:
    """Says what to do about a batch that does not fit; other faults pass."""
    try:
        yield
    except (jax.errors.JaxRuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        remedy = "--batch_tokens" if plan.size > 1 else "--max_length, or choose --dtype=bfloat16"
        raise GradjaxError(
            f"a batch of {plan.size} rows of {plan.length} tokens does not fit the "
            f"{device_memory() / 2**30:.0f} GiB of this device; lower {remedy}"
        ) from error


def _dense_chunk(config: DecoderConfig, plan: BatchPlan, devices: int, itemsize: int) -> int:
    """Examples to differentiate at a time: `jax.grad` keeps every intermediate of theirs."""
    scores = 4 * config.num_heads * plan.length * 4  # per token: float32, and its derivatives
    per_token = config.num_layers * (3 * activation_bytes(config, itemsize) + scores)
    per_token += 12 * config.vocab_size
    fitting = int(_INTERMEDIATES_SHARE * device_memory() / (per_token * plan.length))
    return min(max(fitting, 1), plan.size // devices)


def _holds_all_layers(config: SpectraConfig) -> bool:
    return config.similarity == "all" or config.spectrum == "dense"


def _most_rows(config: DecoderConfig, layers_held: int) -> int:
    """Examples whose whole float32 gradients of some layers fit their share of the memory."""
    table = block_parameters(config, layer=0)
    entries = sum(rows * columns for rows, columns in (table[p].shape(config) for p in "qkvo"))
    return max(int(_GRADIENTS_SHARE * device_memory() / (4 * entries * layers_held)), 1)
