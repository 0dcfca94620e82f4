"""Tokenized examples -> results, batch by batch: the loop inside `gradient_spectra` and `main`."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

from jax.sharding import Mesh

from gradjax.config import SpectraConfig
from gradjax.data.batches import BatchSpec, make_batch
from gradjax.device import Device, memory_faults
from gradjax.gradients.factored import activation_bytes
from gradjax.model.config import DecoderConfig
from gradjax.model.decoder import Decoder
from gradjax.runs.cost import fitting_memory
from gradjax.spectra.batch import BatchConfig, RowSpectra, batch_spectra
from gradjax.spectra.decompose import Decompose, decomposer, decomposes_on_host, resolved_route
from gradjax.structs import ExampleResult, TokenizedExample

# Share of the device's memory that the dense path's intermediates may take.
_INTERMEDIATES_SHARE = 0.25


def compute_results(
    decoder: Decoder,
    tokenized: Sequence[TokenizedExample],
    config: SpectraConfig,
    specs: Sequence[BatchSpec],
    device: Device,
) -> Iterator[list[ExampleResult]]:
    """Results of the planned examples, one list per batch.

    They are those of this process's devices. While a list is being used, the devices work on the
    next batch.

    Args:
      tokenized: what the specs' rows are positions in.
      specs: of `batch_rows`.
      device: the kind of the decoder's.

    Raises:
      GradjaxError: if a batch does not fit the device's memory.
    """
    mesh, model = decoder.mesh, decoder.config
    itemsize = decoder.embedding.dtype.itemsize
    with _decompose(config, mesh, device.platform) as decompose:
        waiting: tuple[BatchSpec, Callable[[], list[RowSpectra]]] | None = None
        for spec in specs:
            sizes = dict(mesh.shape)
            _, keep_activations = fitting_memory(model, config, spec, itemsize, sizes, device)
            settings = BatchConfig(
                layers=config.layer_numbers(model.num_layers),
                projections=config.projections,
                similarity=config.similarity,
                decompose=decompose,
                keep_activations=keep_activations,
                dense_chunk=_dense_chunk(model, spec, mesh.size, itemsize, device),
            )
            with _memory_faults(spec):
                wait = batch_spectra(decoder, make_batch(spec, tokenized), settings)
            if waiting:
                yield _results(*waiting, tokenized)
            waiting = spec, wait
        if waiting:
            yield _results(*waiting, tokenized)


@contextmanager
def _decompose(config: SpectraConfig, mesh: Mesh, platform: str) -> Iterator[Decompose | None]:
    """The way to singular values; None for the dense path."""
    route = resolved_route(config, platform)
    if route is None:
        yield None
        return
    on_host = decomposes_on_host(platform)
    with decomposer(route, config.projections, mesh, on_host=on_host) as way:
        yield way


def _results(
    spec: BatchSpec,
    wait: Callable[[], list[RowSpectra]],
    tokenized: Sequence[TokenizedExample],
) -> list[ExampleResult]:
    with _memory_faults(spec):
        rows = wait()
    return [_result(tokenized[row.row], row) for row in rows]


def _result(tokenized: TokenizedExample, row: RowSpectra) -> ExampleResult:
    if not row.finite:
        reason = "the loss or a gradient is NaN or infinite although all weights are finite"
        return ExampleResult(tokenized, "non_finite", reason)
    return ExampleResult(
        tokenized, "ok", loss=row.loss, spectra=row.spectra, similarity=row.similarity
    )


def _memory_faults(spec: BatchSpec) -> AbstractContextManager[None]:
    lower = "--batch_tokens" if spec.size > 1 else "--max_length, or choose --dtype=bfloat16"
    return memory_faults(spec.size, spec.length, f"lower {lower}")


def _dense_chunk(
    config: DecoderConfig, spec: BatchSpec, devices: int, itemsize: int, device: Device
) -> int:
    """Examples to differentiate at a time: `jax.grad` keeps every intermediate of theirs."""
    scores = 4 * config.num_heads * spec.length * 4  # per token: float32, and its derivatives
    per_token = config.num_layers * (3 * activation_bytes(config, itemsize) + scores)
    per_token += 12 * config.vocab_size
    fitting = int(_INTERMEDIATES_SHARE * device.memory / (per_token * spec.length))
    return min(max(fitting, 1), spec.size // devices)
