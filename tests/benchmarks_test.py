"""The benchmark of accelerators on the CPU, at the size of the embedded model."""

import ast
import csv
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from benchmarks import mutations, ways
from benchmarks.kernels import KERNELS, measure_kernel
from benchmarks.profiles import idle_time
from benchmarks.shapes import shape_config
from gradjax.errors import GradjaxError
from gradjax.model.decoder import random_decoder
from gradjax.model.parameters import all_parameters
from gradjax.runs.compilers import estimated_cycles

ROOT = Path(__file__).parent.parent
with (ROOT / "tests" / "data" / "model_shapes.csv").open() as file:
    PUBLISHED = list(csv.DictReader(file))


@pytest.mark.parametrize("row", PUBLISHED, ids=lambda row: row["name"])
def test_a_shape_has_the_published_number_of_parameters(row):
    config = shape_config(row["name"])
    table = all_parameters(config).values()
    stored = (p for p in table if p.hf_key)
    assert sum(math.prod(p.shape(config)) for p in stored) == int(row["parameters"])


def test_fewer_layers_keep_the_share_of_the_head():
    whole, half = shape_config("qwen2.5_7b"), shape_config("qwen2.5_7b", layers=14)
    assert (half.num_layers, len(half.windows), half.vocab_size) == (14, 14, 152_064 // 2)
    assert half.hidden_size == whole.hidden_size
    with pytest.raises(GradjaxError, match="29"):
        shape_config("qwen2.5_7b", layers=29)
    with pytest.raises(GradjaxError, match="qwen2"):
        shape_config("qwen2_7b")


@pytest.mark.parametrize("way", ways.WAYS)
def test_each_way_gives_its_time_memory_and_accuracy(way, tmp_path):
    decoder = random_decoder(shape_config("demo", layers=2), seed=0)
    batch = ways.random_batch(decoder, rows=1, length=31)
    found = ways.measure(way, decoder, batch, repeats=2, deadline=math.inf, held=0)
    assert found["repeats"] == 2
    assert 0 < found["fastest_seconds"] <= found["seconds"] <= found["slowest_seconds"]
    assert found["peak_bytes"] > 0
    if way in ways.SPECTRA:
        errors = ways.largest_errors(way, decoder, batch, tmp_path / "reference.npz")
        assert errors["nuclear_norm_error"] < (1e-6 if way in ("gram", "host") else 1e-5)
        assert errors["effective_rank_error"] < 1e-4


def test_a_passed_deadline_is_said():
    decoder = random_decoder(shape_config("demo", layers=1), seed=0)
    batch = ways.random_batch(decoder, rows=1, length=31)
    with pytest.raises(ways.NotMeasuredError, match="budget"):
        ways.measure("pass", decoder, batch, repeats=1, deadline=0, held=0)


@pytest.mark.parametrize("shape", [(5, 17, 11), (13, 17, 11), (23, 17, 11)])
def test_exact_values_are_those_of_the_product(shape):
    tokens, outputs, inputs = shape
    rng = np.random.default_rng(0)
    x, delta = rng.standard_normal((tokens, inputs)), rng.standard_normal((tokens, outputs))
    values = ways.exact_values(x, delta)
    assert len(values) == min(shape)
    expected = np.linalg.svd(delta.T @ x, compute_uv=False)[: len(values)]
    np.testing.assert_allclose(values, expected, rtol=1e-12)


@pytest.mark.parametrize("name", KERNELS)
def test_each_kernel_runs(name):
    assert measure_kernel(name, batch=1, tokens=13, width=37, repeats=1)["seconds"] > 0


# Two streams at once, a gap of 30 ns, a copy within it; the host's own lines do not count.
TRACE = """
planes { name: "/host:CPU" lines { name: "python" events { metadata_id: 1 duration_ps: 900000 } }
  event_metadata { key: 1 value { id: 1 name: "f" } } }
planes { name: "/device:GPU:0"
  lines { name: "Stream #1(Compute)"
    events { metadata_id: 1 offset_ps: 10000 duration_ps: 20000 }
    events { metadata_id: 1 offset_ps: 70000 duration_ps: 40000 } }
  lines { name: "Stream #2(Compute,MemcpyD2H)"
    events { metadata_id: 1 offset_ps: 20000 duration_ps: 20000 }
    events { metadata_id: 2 offset_ps: 45000 duration_ps: 10000 } }
  lines { name: "XLA Modules" events { metadata_id: 1 duration_ps: 900000 } }
  event_metadata { key: 1 value { id: 1 name: "gemm" } }
  event_metadata { key: 2 value { id: 2 name: "MemcpyD2H" } } }
"""


def test_idle_time_is_between_the_first_and_the_last_kernel():
    data = jax.profiler.ProfileData
    trace = data.from_serialized_xspace(data.text_proto_to_serialized_xspace(TRACE))
    assert idle_time(trace) == pytest.approx(
        {"idle_share": 0.3, "longest_idle_seconds": 30e-9}, rel=1e-6
    )


# A loop of 5 turns, in it one of unknown length; branches of which one is taken; a plain operation.
HLO = """
%inner_body (p: (s32[])) -> (s32[]) {
  %a = f32[8]{0} fusion(%p), kind=kLoop, calls=%f, backend_config={"estimated_cycles":"7"}
}
%inner_condition (p: (s32[], s32[])) -> pred[] {
  ROOT %lt = pred[] compare(%turn, %last), direction=LT, metadata={}
}
%outer_body (p: (s32[])) -> (s32[]) {
  %b = f32[8]{0} fusion(%p), kind=kLoop, calls=%f, backend_config={"estimated_cycles":"10"}
  %w = (s32[]) while(%p), condition=%inner_condition, body=%inner_body, metadata={}
}
%outer_condition (p: (s32[])) -> pred[] {
  %five = s32[]{:T(128)} constant(5)
  ROOT %lt.1 = pred[]{:T(512)} compare(%turn, %five), direction=LT, metadata={}
}
%short (p: (s32[])) -> (s32[]) {
  %c = f32[8]{0} add(%p), backend_config={"estimated_cycles":"1"}
}
%long (p: (s32[])) -> (s32[]) {
  %d = f32[8]{0} add(%p), backend_config={"estimated_cycles":"1000"}
}
ENTRY %main (p: s32[]) -> s32[] {
  %w.1 = (s32[]) while(%p), condition=%outer_condition, body=%outer_body
  %none = f32[8]{0} fusion(%p), calls=%f, backend_config={"estimated_cycles":"18446744073709551615"}
  %e = f32[8]{0} conditional(%p, %q), branch_computations={%short, %long}
  ROOT %g = f32[8]{0} fusion(%p), kind=kLoop, calls=%f, backend_config={"estimated_cycles":"100"}
}
"""


def test_cycles_count_as_often_as_their_loop_turns():
    assert estimated_cycles(HLO, turns=2.5) == (5 * (10 + 2.5 * 7) + 1000 + 100, True)


FORMULA = """
def spread(rest, rank: int = 2):
    \"""In words.\"""
    if len(rest) <= rank:
        return None
    return np.sqrt(rest / max(len(rest) - rank, 1))
"""


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("np.sqrt(rest / max(len(rest) - rank, 1))", "rest / max(len(rest) - rank, 1)"),
        ("rest / max(len(rest) - rank, 1)", "rest"),
        ("rest / max(len(rest) - rank, 1)", "rest * max(len(rest) - rank, 1)"),
        ("max(len(rest) - rank, 1)", "(len(rest) - rank)"),
        ("len(rest) - rank", "len(rest)"),
        ("len(rest) - rank", "len(rest) + rank"),
        ("max(len(rest) - rank, 1)", "max(len(rest) - rank, 0)"),
        ("len(rest) <= rank", "len(rest) < rank"),
        ("len(rest) <= rank", "False"),
        ("rank: int = 2", "rank: int = 1"),
    ],
)
def test_a_mutant_has_one_fault(old, new):
    found = mutations.mutants(mutations.Target("f.py", ()), FORMULA)
    changed = FORMULA.replace(old, new).strip()
    assert ast.unparse(ast.parse(changed)) in [one.text for one in found]
    assert all(one.diff.count("\n-") + one.diff.startswith("-") == 1 for one in found)
    assert not mutations.mutants(mutations.Target("f.py", (), ("another",)), FORMULA)


def accelerator(*flags: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "benchmarks.accelerator", "--shape=demo", *flags]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.slow
def test_the_program_keeps_what_it_measured_and_says_what_failed(tmp_path):
    output = tmp_path / "figures.jsonl"
    run = accelerator(
        *("--layers=1", "--ways=host", "--tokens=31,37", "--dtypes=float32,float8"),
        *("--rows=1", "--repeats=1", f"--output={output}"),
    )
    assert run.returncode == 0, run.stderr
    records = [json.loads(line) for line in output.read_text().splitlines()]
    cells = {(r["way"], r["dtype"], r["tokens"]): r for r in records if "way" in r}
    assert len(cells) == 4
    for (_, dtype, _), record in cells.items():
        assert ("failed: " in record.get("missing", "")) == (dtype == "float8")
    assert "1 of 4 layers were measured" in run.stdout
    assert "float32, T=37" in run.stdout


def test_an_empty_budget_leaves_everything_unmeasured(tmp_path):
    run = accelerator("--ways=pass", "--tokens=31", "--dtypes=float32", "--budget_s=0")
    assert run.returncode == 0, run.stderr
    assert "not measured: the time budget was used up" in run.stdout
