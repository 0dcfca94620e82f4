"""Converted checkpoints hold the same numbers to the bit, on any mesh and in an object store."""

import dataclasses
import gc
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from gradjax.checkpoints.hf_config import read_config
from gradjax.checkpoints.pretrained import convert, identity, load_weights
from gradjax.checkpoints.resolve import resolve
from gradjax.checkpoints.safetensors import load_decoder
from gradjax.errors import GradjaxError
from tests.checkpoints import FAMILIES, make_hf_model, save_checkpoint
from tests.eight_devices import run_on_eight_devices


def in_dtype(directory: Path, dtype: str) -> None:
    """Rewrites a checkpoint's file in another dtype."""
    tensors = load_file(directory / "model.safetensors")
    save_file(
        {name: tensor.astype(jnp.dtype(dtype)) for name, tensor in tensors.items()},
        directory / "model.safetensors",
        metadata={"format": "pt"},
    )


def assert_same_weights(found, expected) -> None:
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    for a, b in pairs:
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16"])
def test_weights_are_equal_to_the_bit_in_every_dtype(family, stored, tmp_path):
    source = save_checkpoint(make_hf_model(family, seed=2), tmp_path / "source")
    in_dtype(source, stored)
    convert(str(source), str(tmp_path / "converted"))
    checkpoint = resolve(str(tmp_path / "converted"))
    config = read_config(checkpoint.directory)
    for dtype in ("float32", "bfloat16"):
        found = load_weights(checkpoint, config, dtype)
        assert_same_weights(found, load_decoder(source, config, dtype))
    assert identity(checkpoint) == identity(resolve(str(source)))


def test_any_mesh_restores_its_shards(tmp_path):
    hf_model = make_hf_model("qwen2", seed=3, hidden_size=48, intermediate_size=56)
    source = save_checkpoint(hf_model, tmp_path / "source")
    convert(str(source), str(tmp_path / "converted"))
    splits = json.dumps([[8, 1, 1], [1, 8, 1], [1, 2, 4]])
    folders = (str(source), str(tmp_path / "converted"))
    for split in run_on_eight_devices("restored_and_loaded", *folders, splits):
        assert split["equal"]
        assert split["q is split in"] == split["of"]


def test_object_store(bucket, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    source = save_checkpoint(make_hf_model("llama", seed=4), tmp_path / "source")
    convert(str(source), f"{bucket}/{tmp_path.name}")
    for _ in range(2):  # fetched, and from the cache
        checkpoint = resolve(f"{bucket}/{tmp_path.name}")
        found = load_weights(checkpoint, read_config(checkpoint.directory), "float32")
        assert_same_weights(found, load_decoder(source, read_config(source), "float32"))
    with pytest.raises(GradjaxError, match="not empty"):
        convert(str(source), f"{bucket}/{tmp_path.name}")
    with pytest.raises(GradjaxError, match=r"--model=s3://.*nowhere cannot be fetched"):
        resolve(f"{bucket}/nowhere")


def test_arrays_of_zeros_are_there(tmp_path):
    """Zarr may leave out what equals its fill value."""
    model = make_hf_model("qwen2", seed=7)
    for block in model.model.layers:
        block.self_attn.q_proj.bias.data.zero_()
    source = save_checkpoint(model, tmp_path / "source")
    convert(str(source), str(tmp_path / "converted"))
    checkpoint = resolve(str(tmp_path / "converted"))
    config = read_config(checkpoint.directory)
    found = load_weights(checkpoint, config, "float32")
    assert_same_weights(found, load_decoder(source, config, "float32"))


def test_killed_conversion_is_not_taken(tmp_path):
    source = save_checkpoint(make_hf_model("qwen2", seed=5), tmp_path / "source")
    output = tmp_path / "converted"
    code = "import sys, time; from gradjax.model.decoder import Decoder\n"
    code += "Decoder.weight = lambda *_: time.sleep(60)\n"
    code += "from gradjax.checkpoints.pretrained import convert; convert(*sys.argv[1:])"
    command = [sys.executable, "-c", code, str(source), str(output)]
    process = subprocess.Popen(command, env=os.environ | {"JAX_PLATFORMS": "cpu"})
    while not (output / "config.json").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    checkpoint = resolve(str(output))
    with pytest.raises(GradjaxError, match="has no weights"):
        load_weights(checkpoint, read_config(checkpoint.directory), "float32")


def test_faults_are_named(tmp_path):
    source = save_checkpoint(make_hf_model("gemma2", seed=6), tmp_path / "source")
    output = tmp_path / "converted"
    convert(str(source), str(output))
    with pytest.raises(GradjaxError, match="is not empty"):
        convert(str(source), str(output))
    with pytest.raises(GradjaxError, match="converted already"):
        convert(str(output), str(tmp_path / "again"))
    weights = next((output / "weights" / "blocks.1.k").glob("0*"))
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(
        GradjaxError, match=r"weights is damaged: blocks\.1\.k has \d+ of \d+ bytes: "
    ):
        load_weights(resolve(str(output)), read_config(output), "float32")
    weights.write_bytes(whole)
    damaged = next((output / "weights").glob("blocks.1.q"))
    damaged.rename(output / "elsewhere")
    (output / "weights" / "blocks.0.q" / ".zarray").write_text("{")
    said = r"damaged: blocks\.0\.q cannot be read \(.*; blocks\.1\.q is missing: "
    with pytest.raises(GradjaxError, match=said):
        load_weights(resolve(str(output)), read_config(output), "float32")
    config = dataclasses.replace(read_config(output), mlp_size=7)
    with pytest.raises(
        GradjaxError, match=r"blocks\.0\.gate is \[53, 42\], by config\.json \[7, 42\]"
    ):
        load_weights(resolve(str(output)), config, "float32")
    gc.collect()  # no read of Orbax is left, whose complaint would fail another test
    (output / "gradjax.json").write_text("[1]")
    with pytest.raises(GradjaxError, match=r"gradjax\.json is damaged"):
        resolve(str(output))
