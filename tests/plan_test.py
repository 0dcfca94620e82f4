"""What a plan says, against what compiled programs and a real run hold."""

import dataclasses
import json
import math
import re
import weakref
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gradjax.config import RunConfig, SpectraConfig, TokenConfig
from gradjax.data.batches import BatchSpec
from gradjax.device import Device, container_memory, parse_topology
from gradjax.errors import GradjaxError
from gradjax.gradients import factored
from gradjax.model.config import DecoderConfig, qwen2_config
from gradjax.model.decoder import random_decoder
from gradjax.runs import compilers, cost
from gradjax.runs.compilers import Figures
from gradjax.runs.cost import batch_flops, batch_memory, spectra_flops
from gradjax.runs.inputs import read_inputs
from gradjax.runs.programs import Program, abstract_decoder, programs
from gradjax.runs.run import print_plan, run
from gradjax.runs.windows import read_windows
from gradjax.sharding import one_device, parse_mesh
from gradjax.spectra.batch import LAYERS_AHEAD, BatchConfig, batch_spectra
from gradjax.structs import ATTENTION, PROJECTIONS, Projection, TokenBatch

ALONE = parse_mesh("data:1")


def make_config(num_layers: int, **changes) -> DecoderConfig:
    sizes = {"vocab_size": 8009, "hidden_size": 256, "mlp_size": 704} | changes
    heads = {"num_heads": 8, "num_kv_heads": 2, "rope_theta": 1e4}
    return qwen2_config(num_layers=num_layers, **heads, **sizes)


def nbytes(tree) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def compiled_bytes(
    model: DecoderConfig,
    rows: int,
    length: int,
    *,
    keep: bool,
    projections: tuple[Projection, ...] = ATTENTION,
) -> dict[str, int]:
    """The parts of a plan's memory, from the memory analysis of the compiled programs."""
    found = programs(model, one_device(), rows, length, projections=projections)
    memory = {
        name: found[name].lower().compile().memory_analysis()
        for name in ("head", "block_backward", "form_gradients")
    }
    _, _, _, _, kept, x, *_ = found["block_backward"].arguments
    factors, _ = found["form_gradients"].arguments
    again = 0 if keep else nbytes(kept)
    head = memory["head"]
    return {
        "weights": nbytes(abstract_decoder(model, one_device(), jnp.float32)),
        "block_inputs": model.num_layers * (nbytes(kept) if keep else nbytes(x)),
        "factors": (LAYERS_AHEAD + 1) * nbytes(factors)
        + (LAYERS_AHEAD + 1) * memory["form_gradients"].output_size_in_bytes,
        "workspace": max(
            head.temp_size_in_bytes + head.output_size_in_bytes + nbytes(x),
            again + memory["block_backward"].temp_size_in_bytes + 2 * nbytes(x),
        ),
    }


@pytest.mark.parametrize("projections", [ATTENTION, PROJECTIONS, ("down",)], ids="-".join)
@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize(("rows", "length"), [(3, 416), (1, 2048)])
def test_memory_is_what_the_compiled_programs_hold(rows, length, keep, projections):
    model = make_config(num_layers=7)
    batch = BatchSpec(tuple(range(rows)), length, rows)
    config = SpectraConfig(projections=projections)
    found = batch_memory(model, config, batch, 4, ALONE, "cpu", keep_activations=keep)
    compiled = compiled_bytes(model, rows, length, keep=keep, projections=projections)
    assert found.total - found.host == pytest.approx(sum(compiled.values()), rel=0.15)
    for part, expected in compiled.items():
        assert getattr(found, part) == pytest.approx(expected, rel=0.25), part


def test_memory_grows_with_depth_by_the_block_inputs_alone():
    rows, length = 2, 512
    totals = {}
    for num_layers in (4, 16, 32):
        model = make_config(num_layers)
        found = compiled_bytes(model, rows, length, keep=False)
        planned = batch_memory(
            model,
            SpectraConfig(),
            BatchSpec((0, 1), length, rows),
            4,
            ALONE,
            "cpu",
            keep_activations=False,
        )
        assert planned.total - planned.host == pytest.approx(sum(found.values()), rel=0.15)
        totals[num_layers] = sum(found.values()) - found["weights"] - found["block_inputs"]
        assert found["block_inputs"] == num_layers * rows * length * model.hidden_size * 4
    assert len(set(totals.values())) == 1


@pytest.mark.parametrize("num_layers", [4, 16])
def test_live_arrays_during_the_backward_pass_are_block_inputs_and_one_block(num_layers):
    model, rows, length = make_config(num_layers, vocab_size=257), 1, 640
    decoder = random_decoder(model, seed=0)
    tokens = np.random.default_rng(0).integers(0, 257, (rows, length)).astype(np.int32)
    targets = np.arange(length)[None, :] > 5
    before = sum(array.nbytes for array in jax.live_arrays())
    _, layers = factored.layer_factors(
        decoder, jnp.asarray(tokens), jnp.asarray(targets), keep_activations=False
    )
    highest, size = 0, 0
    for _, factors in layers:
        highest = max(highest, sum(array.nbytes for array in jax.live_arrays()) - before)
        size = nbytes(factors)
        del factors
    stream = rows * length * model.hidden_size * 4
    rope = 4 * length * model.head_dim
    assert highest <= num_layers * stream + size + 2 * stream + 5 * tokens.size + rope


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"store_singular_values": False},
        {"spectra": SpectraConfig(layers="1-2", projections=("q", "k", "down"), similarity="all")},
    ],
    ids=["all", "no values", "some"],
)
def test_disk_is_about_what_a_store_takes(tmp_path, changes):
    config = RunConfig(output_dir=tmp_path / "run", **changes)
    inputs = read_inputs(config)
    (window,) = read_windows(config, inputs)
    planned = cost.disk_bytes(
        inputs.model,
        config.spectra,
        window.tokenized,
        window.texts.num_bytes,
        singular_values=config.store_singular_values,
    )
    directory = Path(run(config))
    files = [*directory.rglob("*.parquet")]
    assert planned == pytest.approx(sum(file.stat().st_size for file in files), rel=0.25)


@pytest.mark.parametrize("similarity", ["none", "adjacent", "all"])
def test_gradients_of_as_many_layers_exist_as_the_plan_says(similarity):
    model, length = make_config(5, vocab_size=257), 19
    refs: list[weakref.ref] = []  # one gradient of each layer
    most = 0

    def decompose(_factors, formed, contributing):
        nonlocal most
        held = [formed]  # as a pool holds what it works on
        refs.append(weakref.ref(formed[0]["q"]))
        most = max(most, sum(ref() is not None for ref in refs))

        def wait():
            held.clear()
            return {p: [np.ones(1)] * len(mask) for p, mask in contributing.items()}

        return wait

    tokens = np.arange(length, dtype=np.int32)[None]
    config = SpectraConfig(similarity=similarity)
    settings = BatchConfig(
        layers=tuple(range(5)),
        projections=config.projections,
        similarity=similarity,
        decompose=decompose,
        keep_activations=False,
        dense_chunk=1,
    )
    batch = TokenBatch((0,), tokens, tokens > 5, np.array([length]))
    batch_spectra(random_decoder(model, seed=0), batch, settings)()
    assert most == cost.layers_held(model, config)


def test_mesh_splits_weights_and_rows():
    model, config = make_config(3, vocab_size=8008), SpectraConfig()
    batch = BatchSpec(tuple(range(8)), 256, 8)
    alone = batch_memory(model, config, batch, 4, ALONE, "cpu", keep_activations=False)
    data = batch_memory(
        model, config, batch, 4, parse_mesh("data:8"), "cpu", keep_activations=False
    )
    fsdp = batch_memory(
        model, config, batch, 4, parse_mesh("fsdp:8"), "cpu", keep_activations=False
    )
    assert data.weights == alone.weights
    assert data.block_inputs == alone.block_inputs // 8
    assert fsdp.weights == pytest.approx(alone.weights / 8, rel=0.01)
    assert fsdp.workspace > data.workspace  # a block's weights are gathered when they are used


def test_flops_of_the_floor_are_four_per_weight_and_token():
    model = make_config(5)
    tokens = 3 * 64
    block = 2 * 256 * (256 + 64) + 3 * 256 * 704  # q, o, k, v and the MLP
    attention = 7 * 256 * 64 * tokens  # two products forward, five back, half of the pairs
    gradients = 2 * tokens * 2 * 256 * (256 + 64)
    found = batch_flops(model, SpectraConfig(), BatchSpec((0, 1, 2), 64, 3), True)
    expected = 5 * (4 * block * tokens + attention + gradients)
    assert found == pytest.approx(expected, rel=0.01)  # but for norms and biases
    recomputed = batch_flops(model, SpectraConfig(), BatchSpec((0, 1, 2), 64, 3), False)
    assert recomputed - found == pytest.approx(5 * (2 * block + 2 * 256 * 64) * tokens, rel=0.01)


def test_spectra_cost_stops_growing_fast_beyond_the_smaller_side():
    model, config = make_config(1), SpectraConfig(projections=("k",))
    flops = [spectra_flops(model, config, length) for length in (1000, 2000, 4000)]
    growth = flops[2] - flops[1], flops[1] - flops[0]
    assert growth[0] == pytest.approx(2 * growth[1])  # linear


def test_plan_of_the_demo_reads_no_weights_and_writes_nothing(monkeypatch, capsys, tmp_path):
    def fail(*_, **__):
        raise AssertionError("weights were read")

    monkeypatch.setattr("gradjax.runs.run.load_weights", fail)
    monkeypatch.chdir(tmp_path)  # where a run would write to runs/demo
    print_plan(RunConfig(limit=5, batch_tokens=256, mesh="data:2,fsdp:2"))
    text = capsys.readouterr().out
    words = ("rows        15", "padding", "batches", "4 (data:2,fsdp:2,tensor:1)", "weights")
    for word in (*words, "shapes      1; 3 would pad"):
        assert word in text
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("mebibytes", "remedy"),
    [
        (12, "--batch_tokens=512"),
        (3, "--dtype=bfloat16 --batch_tokens=1"),
        (1, "larger or more devices"),
    ],
)
def test_run_that_cannot_fit_is_refused_with_what_would_help(
    mebibytes, remedy, monkeypatch, tmp_path
):
    device = Device("cpu", "cpu", mebibytes * 2**20)
    monkeypatch.setattr(cost, "_PROCESS", 0)
    monkeypatch.setattr("gradjax.runs.run.local_device", lambda: device)
    config = RunConfig(limit=30, output_dir=tmp_path / "run", spectra=SpectraConfig(layers="3"))
    with pytest.raises(GradjaxError, match=remedy):
        run(config)
    assert not (tmp_path / "run").exists()


def test_weights_of_registered_sizes():
    model = dataclasses.replace(make_config(28), tied_embeddings=False)
    sizes = {"vocab_size": 152064, "hidden_size": 3584, "mlp_size": 18944}
    model = dataclasses.replace(model, **sizes, num_heads=28, num_kv_heads=4, head_dim=128)
    assert cost.weight_bytes(model, 2, ALONE) == 2 * 7_615_616_512  # Qwen2.5-7B


def test_a_plan_says_which_rows_are_not_usable(capsys, tmp_path):
    path = tmp_path / "rows.jsonl"
    turns = [{"role": role, "content": "5"} for role in ("user", "assistant") * 2]
    rows = [{"question": "How many?", "answer": "5"}, {"messages": turns}, {"messages": turns}]
    path.write_text("\n".join(map(json.dumps, rows)) + "\nno JSON")
    print_plan(RunConfig(data=(str(path),)))
    said = capsys.readouterr().out
    assert "not usable  rows: 3 invalid_row (row 1: 4 turns have no plain form;" in said


@pytest.mark.parametrize(
    ("limits", "memory"),
    [
        ({}, math.inf),
        ({"a/b": "max", "a": "max"}, math.inf),
        ({"a/b": "7000"}, 7000),
        ({"a/b": "7000", "a": "5000", "": "9000"}, 5000),  # a group is limited by those above it
    ],
)
def test_a_containers_memory_is_its_groups(tmp_path, limits, memory):
    (tmp_path / "own").write_text("9:memory:/old\n0::/a/b\n")
    (tmp_path / "groups" / "a" / "b").mkdir(parents=True)
    for group, limit in limits.items():
        (tmp_path / "groups" / group / "memory.max").write_text(f"{limit}\n")
    assert container_memory(tmp_path / "groups", tmp_path / "own") == memory
    assert container_memory(tmp_path / "none", tmp_path / "none") == math.inf


def test_truncated_rows_are_planned_as_cut(capsys):
    config = RunConfig(limit=1, tokens=TokenConfig(max_length=33))
    print_plan(config)
    assert "of 3 × 40 tokens" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "kind", "devices", "gibibytes"),
    [
        ("v5e-16", "v5e", 16, 15.75),
        ("v5litepod-16", "v5e", 16, 15.75),
        ("v5p-8", "v5p", 4, 95.74),  # named by cores, two a chip
        ("v6e-8", "v6e", 8, 31.25),
        ("H100-8", "h100", 8, 0.75 * 80e9 / 2**30),
    ],
)
def test_a_topology_is_a_kind_and_a_number_of_devices(text, kind, devices, gibibytes):
    device, count = parse_topology(text)
    assert (device.kind, count) == (kind, devices)
    assert device.memory == pytest.approx(gibibytes * 2**30, rel=1e-6)


@pytest.mark.parametrize("text", ["", "v5e", "v5e-0", "v7-8", "v5p-3", "v5e-16x"])
def test_an_unknown_topology_is_refused(text):
    with pytest.raises(GradjaxError, match=rf"--topology={text}: expected KIND-N"):
        parse_topology(text)


def test_a_plan_for_devices_elsewhere_follows_them(capsys, monkeypatch):
    """The number of devices, tokens in a batch, the route and its place, the time."""
    monkeypatch.setattr("gradjax.runs.run.local_device", None)  # not asked
    monkeypatch.setattr("gradjax.runs.compilers.has_compiler", lambda platform: False)
    config = RunConfig(limit=400)
    print_plan(config, "v5e-4")
    tpu = capsys.readouterr().out
    route = "qr on the device, values on the host"
    install = "compiler    not asked: pip install --no-deps libtpu has v5e's"
    for words in ("4 (data:4,fsdp:1,tensor:1) of v5e", route, "15.75 GiB", "peak", install):
        assert words in tpu
    print_plan(config, "h100-2")
    gpu = capsys.readouterr().out
    for words in ("2 (data:2,fsdp:1,tensor:1) of h100", "gram, on the device", "at least"):
        assert words in gpu


@pytest.mark.parametrize(
    ("kind", "count", "grid"),
    [("v5e", 1, "2x4"), ("v5e", 16, "4x4"), ("v6e", 19, "4x8"), ("v5p", 4, "2x2x1"),
     ("v5p", 16, "2x2x4"), ("v5p", 64, "4x4x4")],
)  # fmt: skip
def test_the_compiler_is_told_a_grid_that_holds_the_chips(kind, count, grid):
    assert compilers._grid(kind, count) == grid


@pytest.fixture
def compiler(monkeypatch) -> Callable[[Callable[[Program], Figures]], None]:
    """Puts a function in the place of the compiler of TPUs."""

    def replace(compile_program: Callable[[Program], Figures]) -> None:
        place = "gradjax.runs.compiled_plan"
        monkeypatch.setattr("gradjax.runs.compilers.has_compiler", lambda platform: True)
        monkeypatch.setattr(f"{place}.absent_devices", lambda device, count: jax.devices()[:count])
        monkeypatch.setattr(f"{place}.compiled", compile_program)

    return replace


def test_compiled_figures_take_the_place_of_the_plans_own(compiler, capsys):
    """Workspace of the fullest program, code of all shapes, cycles as often as programs run."""
    asked = []

    def one_second(program: Program) -> Figures:
        asked.append(program)
        return Figures(1.0, 2**20, 0, 700 * 2**20, 0, 0.0, 1.5e9, False, {}, False)

    compiler(one_second)
    print_plan(RunConfig(limit=1), "v5e-1")
    own, compiled = capsys.readouterr().out.split("compiled    by XLA for v5e: ")
    assert "together" in own
    assert re.search(rf"programs +{len(asked)}\.0 MiB", compiled)
    assert re.search(r"workspace +0\.6[89] GiB", compiled)
    # Of four layers each: forward, backward, masks, gradients, entries, six cosines. Of the batch:
    # angles and embedding, and of its tokens those with loss go through the head.
    seconds = int(re.search(r"time +(\d+) s of the passes", compiled)[1])
    assert 4 * (5 + 6) + 2 <= seconds <= 4 * (5 + 6) + 3


def test_a_program_that_the_compiler_refuses_is_named(compiler):
    def refuse(program: Program) -> Figures:
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: exceeds available HBM.\nmore")

    compiler(refuse)
    expected = "the compiler of v5e refuses the program rope_tables: .*exceeds available HBM"
    with pytest.raises(GradjaxError, match=expected):
        print_plan(RunConfig(limit=2), "v5e-1")


def test_a_model_too_large_for_one_device_is_planned_split(monkeypatch, capsys):
    """The mesh follows the planned devices' memory, not that of this machine."""
    small = Device("h100", "gpu", 2**20, {"float32": 1e12, "float64": 1e12})
    monkeypatch.setattr("gradjax.runs.run.parse_topology", lambda _: (small, 8))
    with pytest.raises(GradjaxError, match=r"a device has 1\.0 MiB"):
        print_plan(RunConfig(limit=400), "h100-8")
    assert "data:1,fsdp:8,tensor:1" in capsys.readouterr().out


def test_a_mesh_of_another_size_than_the_topology_is_refused():
    with pytest.raises(GradjaxError, match=r"--mesh=data:4 is for 4 devices.*v5e-8 has 8"):
        print_plan(RunConfig(limit=1, mesh="data:4"), "v5e-8")


def test_a_route_that_a_platform_cannot_run_is_refused_before_anything_is_read(monkeypatch):
    config = RunConfig(data=("nowhere.jsonl",), spectra=SpectraConfig(spectrum_route="gram"))
    expected = "--spectrum_route=gram needs float64, .*TPU.* expected auto or qr"
    with pytest.raises(GradjaxError, match=expected):
        print_plan(config, "v5e-8")
    tpu = Device("TPU v5 lite", "tpu", 2**34)
    monkeypatch.setattr("gradjax.runs.run.local_device", lambda: tpu)
    with pytest.raises(GradjaxError, match=expected):
        run(config)
