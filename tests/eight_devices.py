"""What tests run in processes that have 8 CPU devices: prints JSON."""

import io
import json
import os
import re
import subprocess
import sys
from logging import StreamHandler
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.sharding import Mesh, NamedSharding
from jax.stages import Compiled

from gradjax.checkpoints.hf_config import read_config
from gradjax.checkpoints.orbax import load_converted
from gradjax.checkpoints.resolve import DEMO, resolve
from gradjax.checkpoints.safetensors import load_decoder
from gradjax.model.parallel import log_unsplit
from gradjax.runs.programs import PER_EXAMPLE, programs
from gradjax.sharding import AXES, EVERYWHERE, EXAMPLES, make_mesh, one_device
from gradjax.spectra import measures
from gradjax.spectra.batch import BatchConfig, RowSpectra, batch_spectra
from gradjax.spectra.decompose import decomposer
from gradjax.spectra.singular_values import Route
from gradjax.structs import ATTENTION, PROJECTIONS, Factors, TokenBatch

ROOT = Path(__file__).parent.parent
# Two examples a device, of which some are filler.
LENGTHS = (7, 37, 59, 11, 23, 5, 41, 13, 3, 29, 17)
SLOTS = 16


def run_on_eight_devices(program: str, *arguments: str) -> dict:
    """What a function of this file gives, run on 8 forced CPU devices."""
    environment = {
        **os.environ,
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT),
    }
    done = subprocess.run(
        [sys.executable, "-m", "tests.eight_devices", program, *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def mesh_of(split: list[int]) -> Mesh:
    return make_mesh(dict(zip(AXES, split, strict=True)), jax.devices())


def make_batch() -> TokenBatch:
    rng = np.random.default_rng(0)
    shape = (SLOTS, max(LENGTHS) + 2)
    tokens, targets = rng.integers(0, 101, shape).astype(np.int32), np.zeros(shape, bool)
    for row, length in enumerate(LENGTHS):
        targets[row, 2:length] = True
    lengths = np.array([*LENGTHS, *[0] * (SLOTS - len(LENGTHS))], np.int32)
    return TokenBatch(tuple(range(len(LENGTHS))), tokens, targets, lengths)


def spectra_on(mesh: Mesh, directory: Path, route: Route) -> list[RowSpectra]:
    decoder = load_decoder(directory, read_config(directory), jnp.float32, mesh)
    with decomposer(route, PROJECTIONS, mesh, on_host=True) as decompose:
        settings = BatchConfig((0, 1), PROJECTIONS, "all", decompose)
        return batch_spectra(decoder, make_batch(), settings)()


def numbers(rows: list[RowSpectra]) -> dict[str, np.ndarray]:
    """Every number of the rows, relative to its scale."""
    spectra = [s for row in rows for s in row.spectra]
    scale = np.array([max(s.max, -s.min) for s in spectra])
    return {
        "rows": np.array([row.row for row in rows], float),
        "loss": np.array([row.loss for row in rows]) / 5,
        "values": np.concatenate([s.singular_values / s.spectral_norm for s in spectra]),
        "nuclear_norm": np.log([s.nuclear_norm for s in spectra]),
        "effective_rank": np.log(np.array([s.effective_rank for s in spectra], float)) / 10,
        "entries": np.array([[s.mean, s.max, s.min] for s in spectra]) / scale[:, None],
        "cosine": np.array([s.cosine for row in rows for s in row.similarity], float),
    }


def largest_differences(directory: str, splits: str, route: Route = "gram") -> dict:
    """split -> what -> largest difference from one device."""
    one = numbers(spectra_on(one_device(), Path(directory), route))
    found = {}
    for split in json.loads(splits):
        many = numbers(spectra_on(mesh_of(split), Path(directory), route))
        found[str(tuple(split))] = {k: float(np.abs(many[k] - one[k]).max()) for k in one}
    return found


def read_program(compiled: Compiled) -> dict[str, list[str]]:
    """The collectives of a compiled program, and how many examples its decompositions have."""
    text = compiled.as_text() or ""
    kinds = "all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute"
    calls = re.findall(r"= .*custom-call\(.*lapack_\w*(?:syevd|gesdd|geqrf|potrf).*", text)
    return {
        "collectives": re.findall(rf" ({kinds})(?:-start)?\(", text),
        "decomposed": [
            size for call in calls for size in re.findall(r"\[(\d+),\d+,\d+\]", call)[:1]
        ],
    }


def compiled_collectives() -> dict:
    """What the per-example programs compile to, for 16 examples."""
    config = read_config(resolve(DEMO).directory)
    found = {}
    for split in ([8, 1, 1], [1, 8, 1], [1, 1, 8], [2, 2, 2]):
        ours = programs(config, mesh_of(split), rows=16, length=13, projections=PROJECTIONS)
        for name, program in ours.items():
            if name.startswith((*PER_EXAMPLE, "spectra_gram", "spectra_qr")):
                found[f"{name} {tuple(split)}"] = read_program(program.lower().compile())
    mesh = mesh_of([2, 2, 2])
    total = jax.jit(lambda x: x.sum(), out_shardings=NamedSharding(mesh, EVERYWHERE))
    array = jax.ShapeDtypeStruct((16,), jnp.float32, sharding=NamedSharding(mesh, EXAMPLES))
    found["control"] = read_program(total.lower(array).compile())
    return found


def lowered_programs() -> dict:
    """Every program of the embedded model for TPUs and GPUs: its fault, else if it has float64."""
    config = read_config(resolve(DEMO).directory)
    found = {}
    for mesh in (one_device(), mesh_of([2, 2, 2])):
        for platform, compiler in (("tpu", "tpu"), ("gpu", "cuda")):
            for name, program in programs(config, mesh, 8, 64, platform=platform).items():
                try:
                    said = "xf64>" in program.lower(compiler).as_text()
                except Exception as error:
                    said = f"{type(error).__name__}: {error}"[:500]
                found[f"{platform} {mesh.size} {name}"] = said
    return found


def wrong_values(times: str) -> int:
    """How often a mesh's values, taken by threads that give way at every turn, are not its own."""
    sys.setswitchinterval(1e-6)
    mesh, rng = mesh_of([8, 1, 1]), np.random.default_rng(0)
    shape = (8, 3, 2)
    every = dict.fromkeys(ATTENTION, np.ones(shape[:2], bool))
    names = ("x_qkv", "x_o", *ATTENTION)
    values = {name: rng.standard_normal(shape, np.float32) for name in names}
    pairs = [(values["x_o" if p == "o" else "x_qkv"], values[p]) for p in ATTENTION]
    gradients = [np.swapaxes(delta, 1, 2).astype(float) @ x for x, delta in pairs]
    expected = [np.linalg.svd(g, compute_uv=False) for g in gradients]
    sharding = NamedSharding(mesh, EXAMPLES)
    place = jax.jit(lambda tree: tree, out_shardings=sharding)
    wrong = 0
    with decomposer("gram", ATTENTION, mesh, on_host=True) as decompose:
        for _ in range(int(times)):
            factors = Factors(**place(values))
            formed = measures.form_gradients(factors, ATTENTION)
            found = decompose(factors, formed, every)()
            wrong += not all(
                np.allclose(np.array(found[p])[:, :2], e, rtol=1e-4)
                for p, e in zip(ATTENTION, expected, strict=True)
            )
    return wrong


def restored_and_loaded(source: str, converted: str, splits: str) -> list:
    """Whether a converted checkpoint is its source's weights, and how q is split, per mesh."""
    found = []
    config = read_config(Path(source))
    for split in json.loads(splits):
        mesh = mesh_of(split)
        pair = (
            load(Path(d), config, jnp.float32, mesh)
            for load, d in ((load_decoder, source), (load_converted, converted))
        )
        loaded, restored = pair
        leaves = zip(jax.tree.leaves(loaded), jax.tree.leaves(restored), strict=True)
        same = all(a.sharding == b.sharding and bool((a == b).all()) for a, b in leaves)
        q = restored.blocks[0].q[...]
        parts = q.size // q.addressable_shards[0].data.size
        found.append({"equal": same, "q is split in": parts, "of": split[1] * split[2]})
    return found


def log_lines(directory: str, split: str) -> list[str]:
    """What is said about axes that do not divide."""
    stream = io.StringIO()
    logging.get_absl_logger().addHandler(StreamHandler(stream))
    log_unsplit(mesh_of(json.loads(split)), read_config(Path(directory)))
    return stream.getvalue().splitlines()


if __name__ == "__main__":
    print(json.dumps(globals()[sys.argv[1]](*sys.argv[2:])))
