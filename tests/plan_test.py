"""What a plan says, against what compiled programs and a real run hold."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gradjax.config import RunConfig, SpectraConfig, TokenConfig
from gradjax.data.batches import BatchSpec
from gradjax.errors import GradjaxError
from gradjax.gradients import factored
from gradjax.model.config import DecoderConfig, qwen2_config
from gradjax.model.decoder import random_decoder
from gradjax.runs import cost
from gradjax.runs.cost import batch_flops, batch_memory, spectra_flops
from gradjax.runs.run import print_plan, run
from gradjax.sharding import one_device, parse_mesh
from gradjax.spectra import measures
from gradjax.spectra.batch import LAYERS_AHEAD
from gradjax.structs import PROJECTIONS

ALONE = parse_mesh("data:1")


def make_config(num_layers: int, **changes) -> DecoderConfig:
    sizes = {"vocab_size": 8009, "hidden_size": 256, "mlp_size": 704} | changes
    heads = {"num_heads": 8, "num_kv_heads": 2, "rope_theta": 1e4}
    return qwen2_config(num_layers=num_layers, **heads, **sizes)


def nbytes(tree) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def compiled_bytes(model: DecoderConfig, rows: int, length: int, *, keep: bool) -> dict[str, int]:
    """The parts of a plan's memory, from the memory analysis of the compiled programs."""
    mesh = one_device()
    decoder = jax.eval_shape(lambda: random_decoder(model, 0, jnp.float32, mesh))
    block = decoder.blocks[0]

    def array(*shape, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(shape, dtype)

    x, rope = array(rows, length, model.hidden_size), array(2, length, model.head_dim // 2)
    rest = (rope, array(dtype=jnp.int32))
    tokens, targets = array(rows, length, dtype=jnp.int32), array(rows, length, dtype=jnp.bool_)
    table, final = array(model.vocab_size, model.hidden_size), array(model.hidden_size)

    def shapes(function, *arguments):
        return jax.eval_shape(lambda *arrays: function(mesh, model, *arrays), *arguments)

    def memory(function, *arguments) -> Any:
        return function.lower(*arguments).compile().memory_analysis()

    _, kept = shapes(factored._block_forward, block, x, *rest)
    _, factors = shapes(factored._block_backward, block, kept, x, *rest)
    backward = memory(factored._block_backward, mesh, model, block, kept, x, *rest)
    head = memory(factored._head_gradient, mesh, model, final, table, x, tokens, targets)
    forming = memory(measures.form_gradients, factors, PROJECTIONS)
    again = 0 if keep else nbytes(kept)
    return {
        "weights": nbytes(decoder),
        "block_inputs": model.num_layers * (nbytes(kept) if keep else nbytes(x)),
        "factors": (LAYERS_AHEAD + 1) * nbytes(factors) + 2 * forming.output_size_in_bytes,
        "workspace": max(
            head.temp_size_in_bytes + head.output_size_in_bytes + nbytes(x),
            again + backward.temp_size_in_bytes + 2 * nbytes(x),
        ),
    }


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize(("rows", "length"), [(3, 416), (1, 2048)])
def test_memory_is_what_the_compiled_programs_hold(rows, length, keep):
    model = make_config(num_layers=7)
    batch = BatchSpec(tuple(range(rows)), length, rows)
    config = SpectraConfig()
    found = batch_memory(model, config, batch, 4, ALONE, keep_activations=keep)
    compiled = compiled_bytes(model, rows, length, keep=keep)
    assert found.total == pytest.approx(sum(compiled.values()), rel=0.15)
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
            keep_activations=False,
        )
        assert planned.total == pytest.approx(sum(found.values()), rel=0.15)
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
    _, layers = factored.attention_gradients(
        decoder, jnp.asarray(tokens), jnp.asarray(targets), keep_activations=False
    )
    highest, size = 0, 0
    for _, factors in layers:
        highest = max(highest, sum(array.nbytes for array in jax.live_arrays()) - before)
        size = nbytes(factors)
        del factors
    stream = rows * length * model.hidden_size * 4
    windows_and_rope = 64 * num_layers + 4 * length * model.head_dim
    assert highest <= num_layers * stream + size + 2 * stream + 5 * tokens.size + windows_and_rope


def test_mesh_splits_weights_and_rows():
    model, config = make_config(3), SpectraConfig()
    batch = BatchSpec(tuple(range(8)), 256, 8)
    alone = batch_memory(model, config, batch, 4, ALONE, keep_activations=False)
    data = batch_memory(model, config, batch, 4, parse_mesh("data:8"), keep_activations=False)
    fsdp = batch_memory(model, config, batch, 4, parse_mesh("fsdp:8"), keep_activations=False)
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
        (16, "--batch_tokens=1024"),
        (2, "--dtype=bfloat16 --batch_tokens=1"),
        (1, "larger or more devices"),
    ],
)
def test_run_that_cannot_fit_is_refused_with_what_would_help(
    mebibytes, remedy, monkeypatch, tmp_path
):
    monkeypatch.setattr(cost, "device_memory", lambda: mebibytes * 2**20)
    config = RunConfig(limit=30, output_dir=tmp_path / "run", spectra=SpectraConfig(layers="3"))
    with pytest.raises(GradjaxError, match=remedy):
        run(config)
    assert not (tmp_path / "run").exists()


def test_weights_of_registered_sizes():
    model = dataclasses.replace(make_config(28), tied_embeddings=False)
    sizes = {"vocab_size": 152064, "hidden_size": 3584, "mlp_size": 18944}
    model = dataclasses.replace(model, **sizes, num_heads=28, num_kv_heads=4, head_dim=128)
    assert cost.weight_bytes(model, 2, ALONE) == 2 * 7_615_616_512  # Qwen2.5-7B


def test_truncated_rows_are_planned_as_cut(capsys):
    config = RunConfig(limit=1, tokens=TokenConfig(max_length=33))
    print_plan(config)
    assert "of 3 × 40 tokens" in capsys.readouterr().out
