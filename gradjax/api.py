"""The public Python API: what `gradjax spectra` itself is made of."""

import dataclasses
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from gradjax.checkpoints.pretrained import Model, load_model
from gradjax.config import (
    NEGLIGIBLE,
    TEXT_SETTINGS,
    Reading,
    SpectraConfig,
    TokenConfig,
    as_directory,
    select,
)
from gradjax.data.examples import to_example
from gradjax.data.tokens import check_tokenizer, check_vocabulary, tokenize_rows
from gradjax.device import local_device
from gradjax.errors import GradjaxError, extras
from gradjax.runs.compute import compute_results
from gradjax.runs.layout import batch_rows
from gradjax.spectra.decompose import resolved_route
from gradjax.storage.store import read_manifest, read_table
from gradjax.structs import ExampleResult

__all__ = ["ExampleResult", "GradjaxError", "Model", "gradient_spectra", "load_model", "open_run"]


def gradient_spectra(
    model: Model,
    examples: Iterable[object],
    *,
    batch_tokens: int | None = None,
    ordered: bool = True,
    **settings: Any,
) -> Iterator[ExampleResult]:
    """Losses, gradient spectra and cosines of SFT rows (paper, eqs. 1 to 4).

    Args:
      model: of `load_model`.
      examples: rows as dicts, as of `gradjax spectra --data`. They are numbered from 0 in the
        results.
      batch_tokens: padded tokens computed at once; by backend if None.
      ordered: give results in the order of the examples, all of them computed when the first is
        asked for. Else as they come: unusable rows, then batch by batch, longest rows first.
      **settings: as the flags of `gradjax spectra`: `columns`, `field`, `response_marker`,
        `prompt_format`, `max_length`, `truncation`, `target_tokens`, `spectrum`,
        `spectrum_route`, `layers`, `projections`, `similarity`.

    Returns:
      An iterator, computed as it is read: one result per row, with a status and a reason if it is
      unusable; `result.tokenized.example.example_id` is the row's number. `loss` is in nats per
      target token; each of `spectra` has singular values [≤ min(T, O, I)] of the gradient of that
      loss, and what sums them up. See structs.py.

    Raises:
      GradjaxError: for a fault of the model or the settings, never for one of a row.
      TypeError: for an unknown setting.
    """
    tokens, spectra = select(TokenConfig, settings), select(SpectraConfig, settings)
    reading = select(Reading, settings)
    if unknown := settings.keys() - vars(tokens).keys() - vars(spectra).keys() - set(TEXT_SETTINGS):
        raise TypeError(f"gradient_spectra has no setting {', '.join(sorted(unknown))}")
    device = local_device()
    resolved_route(spectra, device.platform)  # refused before anything is computed
    check_tokenizer(model.tokenizer, tokens)
    rows = (to_example(row, "", number, reading) for number, row in enumerate(examples))
    tokenized = [*tokenize_rows(rows, model.tokenizer, tokens)]
    check_vocabulary(tokenized, model.config.vocab_size)
    spectra.layer_numbers(model.config.num_layers)
    unusable = (ExampleResult(t, t.status, t.reason) for t in tokenized if t.status != "ok")
    devices = model.decoder.mesh.size
    plans = batch_rows(tokenized, spectra, model.config, device, batch_tokens, devices)

    def computed() -> Iterator[ExampleResult]:
        yield from unusable
        for plan in plans:
            # To its end: while the caller has a result, BLAS has the caller's number of threads.
            for batch in list(compute_results(model.decoder, tokenized, spectra, [plan], device)):
                yield from batch

    return _in_order(computed()) if ordered else computed()


def _in_order(results: Iterator[ExampleResult]) -> Iterator[ExampleResult]:
    yield from sorted(results, key=lambda result: result.tokenized.example.example_id)


@dataclasses.dataclass(frozen=True)
class Run:
    """A store, opened for reading. Tables are read when first asked for."""

    directory: Path | str  # str: a URL
    manifest: dict[str, Any]

    @cached_property
    def examples(self) -> pd.DataFrame:
        """One row per input row: status, lengths in tokens, loss in nats per target token."""
        return read_table(self.directory, "examples").to_pandas()

    @cached_property
    def spectra(self) -> pd.DataFrame:
        """One row per example, layer and projection: norms, effective rank, singular values."""
        return read_table(self.directory, "spectra").to_pandas()

    @cached_property
    def similarity(self) -> pd.DataFrame:
        """One row per example and pair of gradients: their cosine."""
        return read_table(self.directory, "similarity").to_pandas()

    def compare(
        self,
        high: str,
        low: str,
        *,
        equal_length: "Run | None" = None,
        layers: str = "all",
        pair_by: str | None = None,
        cluster_by: str | None = None,
        negligible: float = NEGLIGIBLE,
    ) -> pd.DataFrame:
        """Two groups' statistics, their gaps, and whether they differ beyond length.

        Args:
          high, low: groups of the run; a gap is high − low.
          equal_length: a run of the same rows with `--target_tokens`.
          layers: as `--layers` of `gradjax spectra`; an example's value is its mean over them.
          pair_by, cluster_by: columns of the data that say which rows are pairs and which count
            together (default: those of one prompt).
          negligible: standard deviations of what length leaves, that are of no importance.

        Returns:
          The rows and columns of the report's `comparisons.csv`; see gradjax/report/length.py
          for the rule behind `beyond_length`.

        Raises:
          GradjaxError: if the run is not finished, a group is unknown, none of its rows is `ok`, or
            the extra `report` is not installed.
        """
        with extras():
            from gradjax.report.clusters import with_clusters
            from gradjax.report.compare import COLUMNS, adjusted, compare
        from gradjax.storage.results import read_values

        runs = [
            with_clusters(read_values(run.directory, layers), pair_by, cluster_by)
            for run in (self, equal_length)
            if run
        ]
        compared = compare(runs[0], high, low, *runs[1:], negligible=negligible)
        return adjusted([compared])[COLUMNS]


def open_run(directory: str | Path) -> Run:
    """Opens a run that `gradjax spectra` wrote, finished or not.

    Args:
      directory: a path, or the URL of a run in an object store (`s3://bucket/run`).

    Returns:
      An object with `manifest` (a dict) and the pandas frames `examples`, `spectra` and
      `similarity`; columns as in docs/results.md.

    Raises:
      GradjaxError: if the directory holds no run, or cannot be read.
    """
    directory = as_directory(directory)
    return Run(directory, read_manifest(directory))
