"""A run in the reference format: what the paper's plotting scripts read.

One JSON object per `ok` row, in input order, cosines as whole matrices.
"""

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from absl import logging

from gradjax.errors import GradjaxError
from gradjax.storage.filesystem import write_json_lines
from gradjax.storage.spool import Spool
from gradjax.storage.store import TABLES, read_shards, read_table, require_group
from gradjax.structs import ATTENTION, PROJECTIONS

# Examples whose texts are held at once.
_CHUNK = 256


def reference_rows(directory: str | Path, group: str) -> Iterator[dict[str, Any]]:
    """The `ok` rows of a group as objects of the paper's reference code, in input order.

    Raises:
      GradjaxError: if there is no such run or group, or the run has no singular values.
    """
    manifest = require_group(directory, group)
    if not manifest["settings"]["store_singular_values"]:
        raise GradjaxError(
            f"{directory} was run with --nostore_singular_values, and the reference format needs "
            "them; run it again without that flag"
        )
    in_group = pc.field("group") == group
    examples = read_table(directory, "examples", where=in_group).sort_by("example_id")
    rows = manifest["data"][group]["rows"]
    if rows != examples.num_rows:
        missing = f"{rows - examples.num_rows:,}" if rows else "some"
        logging.warning("%s is unfinished: %s rows of %s are missing", directory, missing, group)
    # Shards are in the order in which rows were computed, and the file is in theirs.
    gradients, places = Spool(), dict[int, int]()
    columns = {name: TABLES[name].names for name in ("spectra", "similarity")}
    for spectra, similarity in read_shards(directory, columns, in_group):
        cosines = dict(_by_example(similarity))
        for example_id, rows in _by_example(spectra):
            places[example_id] = len(gradients)
            own = _matrices(rows, manifest["gradient_shapes"])
            own |= _cosines(cosines.get(example_id, []), manifest["settings"])
            gradients.append(json.dumps(own).encode("ascii"))
    for batch in examples.filter(pc.field("status") == "ok").to_batches(_CHUNK):
        for row in batch.to_pylist():
            yield {
                "instruction": row["instruction"],
                "output": row["output"],
                "loss": row["loss"],
                **json.loads(gradients[places[row["example_id"]]]),
            }


def _by_example(table: pa.Table) -> Iterator[tuple[int, list[dict[str, Any]]]]:
    """Each example's rows of a shard, where they stand together."""
    ids = table["example_id"].to_numpy()
    borders = [0, *(np.flatnonzero(np.diff(ids)) + 1).tolist(), len(ids)]
    for start, end in itertools.pairwise(borders):
        if start < end:
            yield int(ids[start]), table.slice(start, end - start).to_pylist()


def _matrices(spectra: list[dict[str, Any]], shapes: dict[str, list[int]]) -> dict[str, Any]:
    matrices = {}
    for row in spectra:
        values = row["singular_values"]
        tail = [0.0] * (min(shapes[row["projection"]]) - len(values))
        part = "self_attn" if row["projection"] in ATTENTION else "mlp"
        matrices[f"model.layers.{row['layer']}.{part}.{row['projection']}_proj.weight"] = {
            "M_mean": row["mean"],
            "M_max": row["max"],
            "M_min": row["min"],
            "frobenius_norm": row["frobenius_norm"],
            "S_list": values + tail,
        }
    return matrices


def _cosines(similarity: list[dict[str, Any]], settings: dict[str, Any]) -> dict[str, Any]:
    layers = settings["layers"]
    position = {layer: i for i, layer in enumerate(layers)}
    across = {
        projection: [[1.0 if a == b else None for b in layers] for a in layers]
        for projection in PROJECTIONS
        if projection in settings["projections"]
    }
    within: dict[str, dict[str, Any]] = {}
    for row in similarity:
        a, b = row["layer_a"], row["layer_b"]
        if row["kind"] == "same_layer":
            first, second = row["projection"].split("-")
            within.setdefault(str(a), {})[f"{first}_proj_x_{second}_proj"] = row["cosine"]
        else:
            matrix = across[row["projection"]]
            matrix[position[a]][position[b]] = row["cosine"]
            matrix[position[b]][position[a]] = row["cosine"]
    return {
        "cosine_sim": {
            f"{projection}_proj": {"layer_indices": layers, "matrix": matrix}
            for projection, matrix in across.items()
        },
        "cosine_sim_qkvo": within,
    }


def export(directory: str | Path, group: str, output: Path) -> int:
    """Writes `reference_rows` as JSON lines, the whole file or none; returns their number.

    Raises:
      GradjaxError: as `reference_rows`, or if the file cannot be written.
    """
    return write_json_lines(reference_rows(directory, group), output)
