"""Every program of a run through the compilers of TPUs and GPUs, for devices that are not here.

Runs where the compilers are installed (`.ci/run` installs them); nothing runs on a device.
"""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.shapes import shape_config
from gradjax.config import SpectraConfig
from gradjax.data.batches import BatchSpec
from gradjax.device import parse_topology
from gradjax.gradients.factored import activation_bytes
from gradjax.runs.compilers import WHEELS, absent_devices, compiled, has_compiler
from gradjax.runs.cost import batch_memory
from gradjax.runs.programs import programs
from gradjax.sharding import make_mesh, parse_mesh

ROOT = Path(__file__).parent.parent
MESHES = {1: "data:1", 8: "data:2,fsdp:2,tensor:2"}
OWN = ("form_gradients", "entry_measures", "cosine", "mask_factors", "spectra_")
LARGE = 1024  # tokens of a row that fills a device's matrix units
LARGEST = ("block_forward", "head", "block_backward", "form_gradients")  # by code and workspace

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=["tpu", "gpu"])
def found(request) -> tuple[str, dict]:
    """A platform, and the figures of its programs by `devices name`."""
    platform = request.param
    if not has_compiler(platform):
        wheels = WHEELS[platform]
        pytest.skip(f"NO COMPILER for {platform}, nothing compiled: pip install --no-deps {wheels}")
    # In a process of its own: a compiler's library takes settings and signals of its process.
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": _python_path()}
    command = [sys.executable, "-m", "tests.compiled_test", platform]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return platform, json.loads(done.stdout.splitlines()[-1])


def test_every_program_compiles(found):
    platform, programs = found
    faults = {name: said for name, said in programs.items() if isinstance(said, str)}
    assert not faults
    own = {"spectra_qr_triangle"} | ({"spectra_gram"} if platform == "gpu" else set())
    for devices in MESHES:
        names = {name.split()[1] for name in programs if name.startswith(f"{devices} ")}
        assert names >= {"embed", "block_forward", "block_backward", "head", "spectra_dense"} | own


def test_examples_meet_in_no_program_that_measures_them(found):
    _, programs = found
    collectives = {name: said["collectives"] for name, said in programs.items()}
    assert collectives["8 block_forward"]  # the reading finds them where they are
    for name, kinds in collectives.items():
        if name.split()[1].startswith(OWN):
            assert not kinds, name


def test_a_tpu_is_given_no_float64(found):
    platform, programs = found
    float64 = {name.split()[1] for name, said in programs.items() if said["float64"]}
    assert float64 == ({"spectra_gram"} if platform == "gpu" else set())


@pytest.mark.parametrize("keep", [False, True])
def test_the_plan_says_what_the_programs_take(found, keep):
    """Workspace and code, at the width of Qwen2.5-7B."""
    platform, programs = found
    config = shape_config("qwen2.5_7b")
    head, backward = programs["large head"], programs["large block_backward"]
    again = 0 if keep else LARGE * activation_bytes(config, 2)
    ends = 2 * 2 * LARGE * config.hidden_size  # the cotangent that goes in, and what comes out
    temp = max(head["temp"], backward["temp"] + again) + ends
    code = sum(programs[f"large {name}"]["code"] for name in LARGEST)
    planned = batch_memory(
        config,
        SpectraConfig(),
        BatchSpec((0,), LARGE, 1),
        2,
        parse_mesh("data:1"),
        platform,
        keep_activations=keep,
    )
    assert planned.workspace == pytest.approx(temp, rel=0.15)
    assert planned.workspace + planned.code == pytest.approx(temp + code, rel=0.15)


def test_a_plan_for_a_topology_uses_its_compiler():
    if not has_compiler("tpu"):
        pytest.skip(f"NO COMPILER for tpu, no plan compiled: pip install --no-deps {WHEELS['tpu']}")
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": _python_path()}
    command = [sys.executable, "-m", "gradjax.main", "--plan", "--topology=v5e-16", "--limit=16"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    own, said = done.stdout.split("compiled    by XLA for v5e: ")
    assert "16 (data:16,fsdp:1,tensor:1) of v5e" in own
    for part in ("workspace", "programs", "together", "by XLA's estimates of cycles"):
        assert part in said


def _python_path() -> str:
    return os.pathsep.join([str(ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)])


def main(platform: str) -> None:
    """Prints the figures of a platform's programs as JSON."""
    device, _ = parse_topology({"tpu": "v5e-8", "gpu": "h100-8"}[platform])
    absent, found = absent_devices(device, 8), {}
    for count, text in MESHES.items():
        mesh = make_mesh(parse_mesh(text), absent[:count])
        for name, program in programs(shape_config("demo"), mesh, count, 64).items():
            try:
                found[f"{count} {name}"] = dataclasses.asdict(compiled(program))
            except Exception as error:
                found[f"{count} {name}"] = f"{type(error).__name__}: {error}"[:500]
    mesh = make_mesh(parse_mesh("data:1"), absent[:1])
    large = programs(shape_config("qwen2.5_7b"), mesh, 1, LARGE, "bfloat16")
    for name in LARGEST:
        found[f"large {name}"] = dataclasses.asdict(compiled(large[name]))
    print(json.dumps(found), flush=True)
    os._exit(0)  # libtpu may wait for minutes when it is unloaded


if __name__ == "__main__":
    main(sys.argv[1])
