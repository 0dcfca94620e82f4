"""A store's numbers by example: what comparisons, tables and figures are made of."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

import gradjax
from gradjax.config import SpectraConfig
from gradjax.errors import GradjaxError
from gradjax.store import read_manifest, read_table
from gradjax.summary import rows_to_come

SPECTRAL = ("nuclear_norm", "effective_rank", "normalized_effective_rank")
ALL = "all"  # the mean of the projections
KEY = ["group", "example_id"]


@dataclasses.dataclass(frozen=True)
class RunValues:
    """One run's tables, of the layers asked for.

    `examples` has one row per input row, without texts. `matrices` has one per `ok` example,
    layer and projection: nuclear_norm, effective_rank and normalized_effective_rank, which is
    R / min(T, m, n) of a gradient m × n of T tokens. `similarity` is the store's.
    """

    directory: str | Path
    name: str  # the model's
    manifest: dict[str, Any]
    examples: pd.DataFrame
    matrices: pd.DataFrame
    similarity: pd.DataFrame

    @property
    def groups(self) -> list[str]:
        """In the order in which they were given."""
        return list(self.manifest["data"])

    @property
    def projections(self) -> list[str]:
        """Those that were measured."""
        return list(self.manifest["settings"]["projections"])

    @property
    def target_tokens(self) -> int | None:
        """What every response was cut to."""
        return self.manifest["settings"]["target_tokens"]

    def rows(self, group: str) -> pd.DataFrame:
        """The `ok` examples of a group.

        Raises:
          GradjaxError: if there is no such group, or none of its rows is `ok`.
        """
        if group not in self.groups:
            known = ", ".join(self.groups)
            raise GradjaxError(f"{self.directory} has no group {group!r}; it has {known}")
        found = self.examples[self.examples["group"] == group]
        used = found[found["status"] == "ok"]
        if used.empty:
            counts = ", ".join(f"{n} {status}" for status, n in count_statuses(found).items())
            raise GradjaxError(
                f"{self.directory}: none of the {len(found)} rows of group {group!r} can be used "
                f"({counts}); see the reasons in examples/"
            )
        return used


def read_values(directory: str | Path, layers: str = "all") -> RunValues:
    """Reads a finished run.

    Raises:
      GradjaxError: if there is no run, if it is not finished, was written by another version of
        the store, or lacks some of the layers.
    """
    manifest = read_manifest(directory)
    _require_version(directory, manifest)
    if missing := rows_to_come(directory):
        raise GradjaxError(
            f"{directory} is not finished: {missing} rows are missing; give the command that began "
            "it again, and it goes on"
        )
    settings = manifest["settings"]
    chosen = list(settings["layers"])
    if layers != "all":
        chosen = SpectraConfig(layers=layers).layer_numbers(chosen[-1] + 1)
        if absent := sorted(set(chosen) - set(settings["layers"])):
            raise GradjaxError(f"--layers={layers}: {directory} was run without layers {absent}")
    columns = ["group", "example_id", "status", "reason", "num_tokens", "num_target_tokens"]
    examples = read_table(directory, "examples", [*columns, "truncated", "loss"]).to_pandas()
    columns = [*KEY, "layer", "projection", "nuclear_norm", "effective_rank"]
    matrices = read_table(directory, "spectra", columns).to_pandas()
    matrices = matrices[matrices["layer"].isin(chosen)]
    tokens = matrices.merge(examples[[*KEY, "num_tokens"]], on=KEY, how="left")["num_tokens"]
    sides = {name: min(shape) for name, shape in manifest["gradient_shapes"].items()}
    most = np.minimum(tokens.to_numpy(), matrices["projection"].map(sides).to_numpy())
    matrices["normalized_effective_rank"] = matrices["effective_rank"] / most
    similarity = read_table(directory, "similarity").to_pandas()
    within = similarity["layer_a"].isin(chosen) & similarity["layer_b"].isin(chosen)
    name = manifest["model"]["name"]
    return RunValues(directory, name, manifest, examples, matrices, similarity[within])


def _require_version(directory: str | Path, manifest: dict[str, Any]) -> None:
    version = manifest.get("versions", {}).get("gradjax", "of an unknown version")
    if version.split(".")[:2] != gradjax.__version__.split(".")[:2]:
        raise GradjaxError(
            f"{directory} was written by gradjax {version}, and this is {gradjax.__version__}; "
            "report it with the version that wrote it, or run it anew with --overwrite"
        )


def example_values(run: RunValues) -> pd.DataFrame:
    """Each `ok` example's statistics: its means over layers, and `all`, their mean.

    Returns:
      A frame over (group, example_id) with columns (statistic, projection); null where no layer
      has a number.
    """
    means = run.matrices.groupby([*KEY, "projection"])[list(SPECTRAL)].mean()
    parts = {s: means[s].unstack("projection")[run.projections] for s in SPECTRAL}
    for part in parts.values():
        part[ALL] = part.mean(axis=1)
    loss = run.examples[run.examples["status"] == "ok"].set_index(KEY)["loss"]
    parts["loss"] = pd.DataFrame({ALL: loss})
    return pd.concat(parts, axis=1).sort_index()


def count_statuses(examples: pd.DataFrame) -> dict[str, int]:
    """How many rows have each status other than `ok`."""
    counts = examples.loc[examples["status"] != "ok", "status"].value_counts()
    return {str(status): int(count) for status, count in sorted(counts.items())}
