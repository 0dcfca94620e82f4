"""A process that writes made-up results into a store, for tests to watch and to kill."""

import itertools
import os
import signal
from collections.abc import Mapping
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np

from gradjax.storage import filesystem
from gradjax.storage.store import open_store
from gradjax.structs import (
    ATTENTION,
    SAME_LAYER_PAIRS,
    Example,
    ExampleResult,
    Similarity,
    Spectrum,
    TokenizedExample,
)

LAYERS = (0, 2, 5)
SHARD = 3
SETTINGS = {
    "layers": list(LAYERS),
    "projections": list(ATTENTION),
    "store_singular_values": True,
}
MANIFEST = {
    "settings": SETTINGS,
    "data": {"rows": {"rows": 23}},
    "gradient_shapes": {projection: [7, 11] for projection in ATTENTION},
}


def made_up_result(number: int) -> ExampleResult:
    """A result whose numbers follow from the row's; every seventh row was empty."""
    example = Example("rows", number, f"hash {number}", f"What is {number}?", "σ" * number)
    tokens = np.zeros(number + 1, np.int32)
    status = "ok" if number % 7 else "empty_response"
    tokenized = TokenizedExample(example, tokens, tokens == 0, number % 2 == 0, status)
    if status != "ok":
        return ExampleResult(tokenized, status, "nothing there")
    random = np.random.default_rng(number)
    spectra = tuple(
        Spectrum(
            layer,
            projection,
            *random.normal(size=7).tolist(),
            singular_values=np.sort(random.random(number % 8).astype(np.float32))[::-1],
        )
        for layer in LAYERS
        for projection in ATTENTION
    )
    similarity = tuple(
        Similarity("same_layer", f"{a}-{b}", layer, layer, None if layer == 2 else random.random())
        for layer in LAYERS
        for a, b in SAME_LAYER_PAIRS
    )
    return ExampleResult(tokenized, status, "", number / 3, spectra, similarity)


def kill_after(files: int) -> None:
    """Ends this process, as `kill -9` does, when so many files are in place."""
    placed = itertools.count(1)
    for kind in (filesystem.LocalPlace, filesystem.RemotePlace):

        def put(self, name: str, data: bytes, put=kind.put) -> None:
            put(self, name, data)
            if next(placed) == files:
                os.kill(os.getpid(), signal.SIGKILL)

        kind.put = put


def write(
    connection: Connection,
    environment: Mapping[str, str],
    directory: Path | str,
    rows: int,
    *,
    process: int = 0,
    num_processes: int = 1,
    dead_seconds: float = 60.0,
    files: int | None = None,
) -> None:
    """Writes the rows that are not finished, shared out to the processes in turn.

    At each barrier, and when its rows are written, the process says so over the connection and
    goes on when it is answered, or the other end is closed. With `files` it is killed after them.
    """

    def meet(where: str) -> None:
        with suppress(EOFError, ConnectionError):
            connection.send(where)
            connection.recv()

    os.environ.update(environment)
    filesystem._RENEW_SECONDS = 0.2
    filesystem._DEAD_SECONDS = dead_seconds
    if files is not None:
        kill_after(files)
    with open_store(
        directory,
        SETTINGS,
        process=process,
        num_processes=num_processes,
        barrier=lambda: meet("barrier"),
    ) as store:
        store.write_manifest(MANIFEST)
        left = [n for n in range(rows) if ("rows", n) not in store.finished]
        mine = left[process::num_processes]
        for first in range(0, len(mine), SHARD):
            store.append(map(made_up_result, mine[first : first + SHARD]))
        meet("written")
