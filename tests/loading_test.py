import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from gradjax.checkpoints.hf_config import read_config
from gradjax.checkpoints.safetensors import load_decoder, weights_hash
from gradjax.errors import GradjaxError
from tests.checkpoints import make_hf_model, save_checkpoint

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
EMBEDDING = "model.embed_tokens.weight"
Q = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture
def tied(tmp_path) -> Path:
    return save_checkpoint(make_hf_model("qwen2"), tmp_path / "tied")


@pytest.fixture
def untied(tmp_path) -> Path:
    model = make_hf_model("llama", num_hidden_layers=2)
    return save_checkpoint(model, tmp_path / "untied")


@pytest.fixture
def sharded(tmp_path) -> Path:
    model = make_hf_model("qwen2", num_hidden_layers=2)
    return save_checkpoint(model, tmp_path / "sharded", max_shard_size="11KB")


def load(directory: Path, dtype=jnp.float32):
    return load_decoder(directory, read_config(directory), dtype)


def message(directory: Path, dtype=jnp.float32) -> str:
    with pytest.raises(GradjaxError) as raised:
        load(directory, dtype)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def edit(file: Path, **changes: torch.Tensor | None) -> None:
    """Set (a tensor) or remove (None) tensors of a file; dots of names are written `__`."""
    tensors = load_file(file)
    for name, tensor in changes.items():
        name = name.replace("__", ".")
        tensors.pop(name, None)
        if tensor is not None:
            tensors[name] = tensor.contiguous()
    save_file(tensors, file, metadata={"format": "pt"})


def edit_named(file: Path, name: str, tensor: torch.Tensor | None) -> None:
    edit(file, **{name.replace(".", "__"): tensor})


def shard_of(directory: Path, name: str) -> Path:
    index = json.loads((directory / INDEX).read_text())
    return directory / index["weight_map"][name]


def edit_index(directory: Path, **files: str | None) -> None:
    index = json.loads((directory / INDEX).read_text())
    for name, file in files.items():
        name = name.replace("__", ".")
        index["weight_map"].pop(name, None)
        if file is not None:
            index["weight_map"][name] = file
    (directory / INDEX).write_text(json.dumps(index))


DISK_DTYPES = {
    "float64": np.float64,
    "float32": np.float32,
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
    "float8_e4m3fn": ml_dtypes.float8_e4m3fn,
    "float8_e5m2": ml_dtypes.float8_e5m2,
}


@pytest.mark.parametrize("disk", DISK_DTYPES)
def test_any_float_on_disk_becomes_the_dtype_asked_for(tmp_path, disk):
    model = make_hf_model("llama", num_hidden_layers=1)
    save_checkpoint(model, tmp_path, dtype=getattr(torch, disk))
    original = model.get_parameter("model.layers.0.mlp.down_proj.weight").detach().numpy()
    for dtype in (jnp.float32, jnp.bfloat16):
        expected = original.astype(DISK_DTYPES[disk]).astype(dtype)
        found = load(tmp_path, dtype).blocks[0].down[...]
        assert found.dtype == dtype
        np.testing.assert_array_equal(np.asarray(found), expected)


def test_every_tensor_goes_to_its_place(untied):
    decoder = load(untied)
    tensors = {name: tensor.numpy() for name, tensor in load_file(untied / SINGLE).items()}
    layer = "model.layers.1."
    block = decoder.blocks[1]
    for name, found in {
        EMBEDDING: decoder.embedding,
        "model.norm.weight": decoder.final_norm,
        "lm_head.weight": decoder.head,
        f"{layer}input_layernorm.weight": block.attention_norm,
        f"{layer}self_attn.q_proj.weight": block.q,
        f"{layer}self_attn.k_proj.weight": block.k,
        f"{layer}self_attn.v_proj.weight": block.v,
        f"{layer}self_attn.o_proj.weight": block.o,
        f"{layer}post_attention_layernorm.weight": block.mlp_norm,
        f"{layer}mlp.gate_proj.weight": block.gate,
        f"{layer}mlp.up_proj.weight": block.up,
        f"{layer}mlp.down_proj.weight": block.down,
    }.items():
        np.testing.assert_array_equal(np.asarray(found[...]), tensors[name])


def test_weights_do_not_depend_on_the_file_once_loaded(tied):
    decoder = load(tied)
    before = np.array(decoder.embedding[...])
    file = tied / SINGLE
    with file.open("r+b") as raw:
        raw.seek(file.stat().st_size // 2)
        raw.write(b"\0" * (file.stat().st_size // 2))
    np.testing.assert_array_equal(np.asarray(decoder.embedding[...]), before)


def test_all_misfits_are_named_at_once(sharded):
    k, down, norm = (
        f"model.layers.0.{name}.weight"
        for name in ("self_attn.k_proj", "mlp.down_proj", "input_layernorm")
    )
    files = {name: shard_of(sharded, name) for name in (Q, k, down, norm, EMBEDDING)}
    others = sorted(set(sharded.glob("*.safetensors")) - set(files.values()))
    # Unfilled: in neither index nor file. Lost: in the index only. Extra: in both.
    edit_named(files[Q], Q, None)
    edit_index(sharded, **{Q.replace(".", "__"): None})
    edit_named(files[k], k, None)
    edit_named(files[norm], "extra.weight", torch.ones(3))
    edit_index(sharded, extra__weight=files[norm].name)
    edit_named(files[norm], "unlisted.weight", torch.ones(3))
    # Misshapen; in two shards; not where the index says.
    edit_named(files[norm], norm, torch.ones(35))
    edit_named(others[0], EMBEDDING, load_file(files[EMBEDDING])[EMBEDDING])
    edit_index(sharded, **{down.replace(".", "__"): others[0].name})

    text = message(sharded)
    two = sorted([others[0].name, files[EMBEDDING].name])
    for expected in (
        f"missing: {k}, {Q}",
        f"{k} is in {INDEX} but in no shard",
        "not part of this model: extra.weight, unlisted.weight",
        f"unlisted.weight is in {files[norm].name} but not in {INDEX}",
        f"{norm} is [35], by the config [36]",
        f"{EMBEDDING} is in both {two[0]} and {two[1]}",
        f"{down} is in {files[down].name}, by {INDEX} in {others[0].name}",
    ):
        assert expected in text


def test_integer_tensors_are_refused(tied):
    edit_named(tied / SINGLE, Q, torch.ones(36, 36, dtype=torch.int8))
    assert f"{Q} is I8, expected one of F64" in message(tied)


def test_rotary_frequencies_are_ignored(tied):
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    edit_named(tied / SINGLE, name, torch.ones(3))
    load(tied)


def test_a_tied_models_head_must_be_its_embedding(tied):
    embedding = load_file(tied / SINGLE)[EMBEDDING]
    edit(tied / SINGLE, lm_head__weight=embedding.clone())
    load(tied)
    edit(tied / SINGLE, lm_head__weight=embedding + 1e-3)
    assert f"lm_head.weight differs from {EMBEDDING}" in message(tied)
    edit(tied / SINGLE, lm_head__weight=embedding[:-1].clone())
    assert "lm_head.weight is [100, 36], by the config [101, 36]" in message(tied)


def test_an_untied_model_needs_its_head(untied):
    edit(untied / SINGLE, lm_head__weight=None)
    assert "missing: lm_head.weight" in message(untied)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_weight_that_is_not_finite_is_named(sharded, value):
    file = shard_of(sharded, Q)
    weight = load_file(file)[Q]
    weight[5, 7] = value
    edit_named(file, Q, weight)
    assert f"{file}: {Q} holds NaN or infinite values (as float32)" in message(sharded)


def test_a_weight_beyond_the_dtypes_range_is_named(tied):
    weight = load_file(tied / SINGLE)[Q].double()
    weight[5, 7] = 1e39
    edit_named(tied / SINGLE, Q, weight)
    assert f"{Q} holds NaN or infinite values (as bfloat16)" in message(tied, jnp.bfloat16)


@pytest.mark.parametrize("size", [0, 5, 900, -1])
def test_a_truncated_file_is_named(sharded, size):
    file = shard_of(sharded, Q)
    os.truncate(file, size if size >= 0 else file.stat().st_size + size)
    assert f"{file} is damaged or incomplete" in message(sharded)


def test_a_missing_shard_is_named(sharded):
    file = shard_of(sharded, Q)
    file.unlink()
    assert f"lacks {file.name}" in message(sharded)


def test_a_shard_that_the_index_does_not_list_is_named(sharded):
    stray = sharded / "model-00099-of-00099.safetensors"
    save_file({"stray.weight": torch.ones(3)}, stray)
    assert f"stray.weight is in {stray.name} but not in {INDEX}" in message(sharded)


@pytest.mark.parametrize(
    "index",
    [
        "{",
        "[]",
        "{}",
        '{"weight_map": []}',
        '{"weight_map": {"a": 1}}',
        '{"weight_map": {"a": "../elsewhere/model.safetensors"}}',
        '{"weight_map": {"a": "/etc/model.safetensors"}}',
    ],
)
def test_a_malformed_index_is_named(sharded, index):
    (sharded / INDEX).write_text(index)
    assert f"{sharded / INDEX} is not an index" in message(sharded)


def test_a_file_beside_an_index_is_refused(sharded, tied):
    (sharded / SINGLE).write_bytes((tied / SINGLE).read_bytes())
    assert f"has both {SINGLE} and {INDEX}" in message(sharded)


def test_pickles_are_refused_with_the_way_out(tied):
    (tied / SINGLE).rename(tied / "pytorch_model.bin")
    text = message(tied)
    assert "pytorch_model.bin" in text
    assert f"expected {SINGLE}" in text
    assert "save_pretrained" in text


def test_a_directory_without_weights_is_refused(tied):
    (tied / SINGLE).unlink()
    assert "has no weights" in message(tied)


def test_weights_hash_is_of_config_and_safetensors(sharded):
    listing = "".join(
        f"{hashlib.sha256((sharded / name).read_bytes()).hexdigest()}  {name}\n"
        for name in ["config.json", *sorted(path.name for path in sharded.glob("*.safetensors"))]
    )
    before = weights_hash(sharded)
    assert before == hashlib.sha256(listing.encode()).hexdigest()
    (sharded / "tokenizer.json").write_text("{}")
    assert weights_hash(sharded) == before
    edit_named(shard_of(sharded, Q), Q, torch.ones(36, 36))
    assert weights_hash(sharded) != before


def test_weights_hash_is_of_what_is_read_whatever_its_name(tied):
    file, index = tied / "weights-1.safetensors", {"weight_map": {}}
    (tied / SINGLE).rename(file)
    with safe_open(file, "np") as opened:
        index["weight_map"] = dict.fromkeys(opened.keys(), file.name)
    (tied / "model.safetensors.index.json").write_text(json.dumps(index))
    before = weights_hash(tied)
    edit_named(file, Q, torch.ones(36, 36))
    assert weights_hash(tied) != before


_MEASURE = """
import sys, threading, time
from pathlib import Path
import jax, jax.numpy as jnp
from gradjax.checkpoints.hf_config import read_config
from gradjax.checkpoints.safetensors import load_decoder

def anonymous():
    for line in open("/proc/self/status"):
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024

jax.block_until_ready(jnp.zeros(1))
start = peak = anonymous()
done = threading.Event()
def watch():
    global peak
    while not done.is_set():
        peak = max(peak, anonymous())
        time.sleep(0.0005)
watcher = threading.Thread(target=watch)
watcher.start()
directory = Path(sys.argv[1])
decoder = jax.block_until_ready(load_decoder(directory, read_config(directory), sys.argv[2]))
done.set()
watcher.join()
sizes = [leaf.nbytes for leaf in jax.tree.leaves(decoder)]
print(peak - start, sum(sizes), max(sizes))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
@pytest.mark.parametrize(("disk", "dtype"), [("bfloat16", "float32"), ("float32", "bfloat16")])
def test_loading_needs_little_more_memory_than_the_model(tmp_path, disk, dtype):
    sizes = {"vocab_size": 20011, "hidden_size": 510, "intermediate_size": 5003}
    model = make_hf_model("llama", num_hidden_layers=2, **sizes)
    save_checkpoint(model, tmp_path, dtype=getattr(torch, disk), max_shard_size="60MB")
    run = subprocess.run(
        [sys.executable, "-c", _MEASURE, str(tmp_path), dtype],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)},
    )
    peak, total, largest = map(int, run.stdout.split())
    print(f"peak {peak / 2**20:.0f} MiB, model {total / 2**20:.0f}, largest {largest / 2**20:.0f}")
    assert peak < 1.1 * total + largest
