import csv
import dataclasses
import hashlib
import json
import math
import os
import subprocess
import sys
import threading
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlparse

import jax
import jax.numpy as jnp
import pytest
from tokenizers import (
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from gradjax.checkpoints.hf_config import read_config
from gradjax.checkpoints.pretrained import identity
from gradjax.checkpoints.resolve import REGISTRY, load_tokenizer, resolve
from gradjax.errors import GradjaxError
from gradjax.model.config import DecoderConfig, RopeScaling
from gradjax.model.decoder import logits, random_decoder
from gradjax.model.parameters import all_parameters
from tests.checkpoints import make_hf_model, save_checkpoint
from tests.tokenizers import FAMILIES, make_tokenizer

with (Path(__file__).parent / "data" / "model_shapes.csv").open() as file:
    PUBLISHED = {row["name"]: row for row in csv.DictReader(file)}


def published_config(row: dict[str, str]) -> dict:
    """config.json as it stands on the Hub, with the attributes of its time."""
    values = {
        "attention_dropout": 0.0,
        "bos_token_id": 2,
        "eos_token_id": 1,
        "hidden_size": int(row["hidden"]),
        "initializer_range": 0.02,
        "intermediate_size": int(row["mlp"]),
        "num_attention_heads": int(row["heads"]),
        "num_hidden_layers": int(row["layers"]),
        "num_key_value_heads": int(row["kv_heads"]),
        "rms_norm_eps": float(row["rms_norm_eps"]),
        "rope_theta": float(row["rope_theta"]),
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": int(row["vocab"]),
        "model_type": row["family"],
    }
    match row["family"]:
        case "qwen2":
            values |= {
                "architectures": ["Qwen2ForCausalLM"],
                "hidden_act": "silu",
                "max_position_embeddings": 131072,
                "max_window_layers": int(row["layers"]),
                "sliding_window": 131072,
                "tie_word_embeddings": row["tied"] == "1",
                "transformers_version": "4.40.1",
                "use_mrope": False,
                "use_sliding_window": False,
            }
        case "llama" if not row["rope_scaling"]:  # SmolLM2
            values |= {
                "architectures": ["LlamaForCausalLM"],
                "attention_bias": False,
                "hidden_act": "silu",
                "initializer_range": 0.041666666666666664,
                "is_llama_config": True,
                "max_position_embeddings": 8192,
                "mlp_bias": False,
                "pad_token_id": 2,
                "pretraining_tp": 1,
                "rope_interleaved": False,
                "rope_scaling": None,
                "tie_word_embeddings": True,
                "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}},
                "transformers_version": "4.42.3",
            }
        case "qwen3":
            values |= {
                "architectures": ["Qwen3ForCausalLM"],
                "attention_bias": False,
                "head_dim": int(row["head_dim"]),
                "hidden_act": "silu",
                "max_position_embeddings": 40960,
                "max_window_layers": int(row["layers"]),
                "rope_scaling": None,
                "sliding_window": None,
                "tie_word_embeddings": row["tied"] == "1",
                "transformers_version": "4.51.0",
                "use_sliding_window": False,
            }
        case "mistral":
            values |= {
                "architectures": ["MistralForCausalLM"],
                "hidden_act": "silu",
                "max_position_embeddings": 32768,
                "sliding_window": None,
                "tie_word_embeddings": False,
                "transformers_version": "4.42.0.dev0",
            }
        case "olmo":
            del values["rms_norm_eps"]
            values |= {
                "architectures": ["OlmoForCausalLM"],
                "attention_bias": False,
                "clip_qkv": None,
                "hidden_act": "silu",
                "max_position_embeddings": 2048,
                "pad_token_id": 1,
                "rope_scaling": None,
                "tie_word_embeddings": row["tied"] == "1",
                "transformers_version": "4.40.0.dev0",
            }
        case "olmo2":
            values |= {
                "architectures": ["Olmo2ForCausalLM"],
                "attention_bias": False,
                "hidden_act": "silu",
                "max_position_embeddings": 4096,
                "pad_token_id": 100277,
                "rope_scaling": None,
                "tie_word_embeddings": False,
                "transformers_version": "4.47.0.dev0",
            }
        case "gemma3_text":
            values |= {
                "architectures": ["Gemma3ForCausalLM"],
                "attention_bias": False,
                "attn_logit_softcapping": None,
                "cache_implementation": "hybrid",
                "eos_token_id": [1, 106],
                "final_logit_softcapping": None,
                "head_dim": int(row["head_dim"]),
                "hidden_activation": "gelu_pytorch_tanh",
                "max_position_embeddings": 32768,
                "pad_token_id": 0,
                "query_pre_attn_scalar": 256,
                "rope_local_base_freq": 10000,
                "rope_scaling": None,
                "sliding_window": 512,
                "sliding_window_pattern": 6,
                "transformers_version": "4.50.0.dev0",
            }
        case "llama":
            values |= {
                "architectures": ["LlamaForCausalLM"],
                "attention_bias": False,
                "eos_token_id": [128001, 128008, 128009],
                "head_dim": int(row["head_dim"]),
                "hidden_act": "silu",
                "max_position_embeddings": 131072,
                "mlp_bias": False,
                "pretraining_tp": 1,
                "rope_scaling": {
                    "factor": float(row["rope_scaling"].split("factor=")[1].split()[0]),
                    "high_freq_factor": 4.0,
                    "low_freq_factor": 1.0,
                    "original_max_position_embeddings": 8192,
                    "rope_type": "llama3",
                },
                "tie_word_embeddings": row["tied"] == "1",
                "transformers_version": "4.45.0.dev0",
            }
        case "gemma2":
            values |= {
                "_attn_implementation": "eager",
                "architectures": ["Gemma2ForCausalLM"],
                "attention_bias": False,
                "attn_logit_softcapping": 50.0,
                "cache_implementation": "hybrid",
                "final_logit_softcapping": 30.0,
                "head_dim": int(row["head_dim"]),
                "hidden_act": "gelu_pytorch_tanh",
                "hidden_activation": "gelu_pytorch_tanh",
                "max_position_embeddings": 8192,
                "pad_token_id": 0,
                "query_pre_attn_scalar": 144 if row["name"] == "gemma2_27b" else 256,
                "sliding_window": 4096,
                "sliding_window_size": 4096,
                "transformers_version": "4.42.0.dev0",
            }
    return values


def test_registered_repos_are_the_published_ones():
    expected = {name: row["hub_repo"] for name, row in PUBLISHED.items()} | {
        f"{name}_instruct": row["hub_repo_instruct"] for name, row in PUBLISHED.items()
    }
    assert {name: repo for name, repo in expected.items() if repo} == REGISTRY


@pytest.mark.parametrize("name", PUBLISHED)
def test_registered_sizes_have_their_published_shapes(tmp_path, name):
    row = PUBLISHED[name]
    (tmp_path / "config.json").write_text(json.dumps(published_config(row)))
    config = read_config(tmp_path)
    assert config.tied_embeddings == (row["tied"] == "1")
    assert config.rope_theta == float(row["rope_theta"])
    assert (config.rope_scaling is not None) == (row["rope_scaling"] != "")

    decoder = jax.eval_shape(partial(random_decoder, config, 0))
    table = all_parameters(config).values()
    stored = sum(math.prod(p.shape(config)) for p in table if p.hf_key)
    assert stored == int(row["parameters"])
    hidden, mlp, head_dim = int(row["hidden"]), int(row["mlp"]), int(row["head_dim"])
    assert len(decoder.blocks) == int(row["layers"])
    for block in decoder.blocks:
        assert block.q.shape == (int(row["heads"]) * head_dim, hidden)
        assert block.k.shape == (int(row["kv_heads"]) * head_dim, hidden)
        assert block.v.shape == block.k.shape
        assert block.o.shape == block.q.shape[::-1]
        assert block.down.shape == (hidden, mlp)
    assert decoder.embedding.shape == (int(row["vocab"]), hidden)

    upper = dataclasses.replace(config, num_layers=2, windows=config.windows[-2:])
    tokens = jax.ShapeDtypeStruct((3, 17), jnp.int32)
    scores = jax.eval_shape(logits, jax.eval_shape(partial(random_decoder, upper, 0)), tokens)
    assert scores.shape == (3, 17, int(row["vocab"]))


# config.json of others, as they stand on the Hub.
LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu"}
OTHERS: dict[str, tuple[dict, int]] = {
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0": (
        LLAMA
        | {
            "attention_bias": False, "bos_token_id": 1, "eos_token_id": 2, "hidden_size": 2048,
            "initializer_range": 0.02, "intermediate_size": 5632, "max_position_embeddings": 2048,
            "num_attention_heads": 32, "num_hidden_layers": 22, "num_key_value_heads": 4,
            "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": None,
            "rope_theta": 10000.0, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
            "transformers_version": "4.35.0", "use_cache": True, "vocab_size": 32000,
        },
        1_100_048_384,
    ),
    "01-ai/Yi-1.5-6B": (
        LLAMA
        | {
            "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 1,
            "eos_token_id": 2, "hidden_size": 4096, "initializer_range": 0.02,
            "intermediate_size": 11008, "max_position_embeddings": 4096,
            "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 4,
            "pad_token_id": 0, "pretraining_tp": 1, "rms_norm_eps": 1e-06, "rope_scaling": None,
            "rope_theta": 5000000.0, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
            "transformers_version": "4.37.2", "use_cache": False, "vocab_size": 64000,
        },
        6_061_035_520,
    ),
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B": (
        {
            "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0,
            "bos_token_id": 151643, "eos_token_id": 151643, "hidden_act": "silu",
            "hidden_size": 1536, "initializer_range": 0.02, "intermediate_size": 8960,
            "max_position_embeddings": 131072, "max_window_layers": 21, "model_type": "qwen2",
            "num_attention_heads": 12, "num_hidden_layers": 28, "num_key_value_heads": 2,
            "rms_norm_eps": 1e-06, "rope_theta": 10000, "sliding_window": 4096,
            "tie_word_embeddings": False, "torch_dtype": "bfloat16",
            "transformers_version": "4.44.0", "use_cache": True, "use_mrope": False,
            "use_sliding_window": False, "vocab_size": 151936,
        },
        1_777_088_000,
    ),
    "deepseek-ai/DeepSeek-R1-Distill-Llama-8B": (
        LLAMA
        | {
            "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 128000,
            "eos_token_id": 128001, "hidden_size": 4096, "initializer_range": 0.02,
            "intermediate_size": 14336, "max_position_embeddings": 131072, "mlp_bias": False,
            "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8,
            "pretraining_tp": 1, "rms_norm_eps": 1e-05,
            "rope_scaling": {
                "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192, "rope_type": "llama3",
            },
            "rope_theta": 500000.0, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
            "transformers_version": "4.43.0.dev0", "use_cache": True, "vocab_size": 128256,
        },
        8_030_261_248,
    ),
    "lmsys/vicuna-7b-v1.3": (
        LLAMA
        | {
            "_name_or_path": "vicuna-7b-v1.3", "bos_token_id": 1, "eos_token_id": 2,
            "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 11008,
            "max_position_embeddings": 2048, "max_sequence_length": 2048,
            "num_attention_heads": 32, "num_hidden_layers": 32, "pad_token_id": 0,
            "rms_norm_eps": 1e-06, "tie_word_embeddings": False, "torch_dtype": "float16",
            "transformers_version": "4.28.1", "use_cache": True, "vocab_size": 32000,
        },
        6_738_415_616,
    ),
    "lmsys/vicuna-7b-v1.5": (
        LLAMA
        | {
            "_name_or_path": "vicuna-7b-v1.5", "bos_token_id": 1, "eos_token_id": 2,
            "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 11008,
            "max_position_embeddings": 4096, "num_attention_heads": 32, "num_hidden_layers": 32,
            "num_key_value_heads": 32, "pad_token_id": 0, "pretraining_tp": 1,
            "rms_norm_eps": 1e-05, "rope_scaling": None, "tie_word_embeddings": False,
            "torch_dtype": "float16", "transformers_version": "4.31.0", "use_cache": True,
            "vocab_size": 32000,
        },
        6_738_415_616,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_published_configs_of_others_are_read(tmp_path, name):
    values, parameters = OTHERS[name]
    (tmp_path / "config.json").write_text(json.dumps(values))
    decoder = jax.eval_shape(partial(random_decoder, read_config(tmp_path), 0))
    assert sum(leaf.size for leaf in jax.tree.leaves(decoder)) == parameters


def test_published_gemma_and_llama_details(tmp_path):
    def read(name: str) -> DecoderConfig:
        (tmp_path / "config.json").write_text(json.dumps(published_config(PUBLISHED[name])))
        return read_config(tmp_path)

    gemma = read("gemma2_27b")
    assert gemma.query_scale == 144**-0.5
    assert gemma.windows == (4096, None) * 23
    assert gemma.embedding_scale == 4608**0.5
    assert read("llama3.2_1b").rope_scaling == RopeScaling(32.0, 1.0, 4.0, 8192)
    assert read("qwen2.5_7b").windows == (None,) * 28
    gemma = read("gemma3_1b")
    assert gemma.windows == (*([512] * 5 + [None]) * 4, 512, 512)
    assert (gemma.rope_theta, gemma.window_rope_theta) == (1e6, 1e4)


@pytest.mark.parametrize(
    ("spelling", "meant"),
    [
        ("gemma2_2B", "gemma2_2b"),
        ("qwen2.5-7b", "qwen2.5_7b"),
        ("llama3.1_8b_instrct", "llama3.1_8b_instruct"),
        ("dmo", "demo"),
    ],
)
def test_an_unknown_name_is_answered_with_the_closest(spelling, meant):
    with pytest.raises(GradjaxError) as raised:
        resolve(spelling)
    assert f"did you mean {meant}?" in str(raised.value)
    assert all(name in str(raised.value) for name in REGISTRY)


@pytest.mark.parametrize("model", ["zzz", "/no/such/directory", "a/b/c", "../up", "./here", ""])
def test_what_cannot_be_a_repo_is_unknown(model):
    with pytest.raises(GradjaxError, match="neither a registered name nor an existing directory"):
        resolve(model)


def test_a_local_directory_is_itself(tmp_path, monkeypatch):
    directory = tmp_path / "org" / "My model"
    directory.mkdir(parents=True)
    checkpoint = resolve(str(directory))
    assert checkpoint.directory == directory
    assert checkpoint.source == str(directory)
    assert checkpoint.revision is None
    assert checkpoint.name == "My-model"
    monkeypatch.chdir(tmp_path)  # a directory comes before a Hub repo of that name
    assert resolve("org/My model") == checkpoint
    monkeypatch.chdir(directory)
    assert resolve(".") == checkpoint


def test_demo_is_part_of_the_package():
    checkpoint = resolve("demo")
    assert (checkpoint.name, checkpoint.revision) == ("demo", None)
    assert checkpoint.directory.parts[-3:] == ("gradjax", "demo", "model")


@pytest.mark.parametrize("family", ["qwen2", "llama", "gemma2"])
def test_a_tokenizer_is_read_from_its_directory(tmp_path, family):
    tokenizer = make_tokenizer(family)
    save_checkpoint(make_hf_model(family), tmp_path, tokenizer=tokenizer)
    text = "How many apples?\nSeven, as 3 + 4 = 7."
    assert load_tokenizer(tmp_path)(text).input_ids == tokenizer(text).input_ids


TEXTS = (
    "  two  spaces, 3,141,592.65 and\t2024\n\n\nlines\r\n",
    "数据和ｆｕｌｌ－ｗｉｄｔｈ, naïve café, e\u0301, 😀👩‍👩‍👧",
    "text",
    " text",
)


def deepseek_like() -> Tokenizer:
    """Digits in threes, CJK apart, no normalizer: not what the class of model_type qwen2 makes."""
    tokenizer = Tokenizer.from_str(make_tokenizer("qwen2").backend_tokenizer.to_str())
    tokenizer.normalizer = normalizers.Sequence([])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\p{N}{1,3}"), "isolated"),
            pre_tokenizers.Split(Regex("[一-龥]+"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    return tokenizer


def yi_like() -> Tokenizer:
    """SentencePiece's BPE with spaces as "▁", but none in front of a text."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))],
        show_progress=False,
    )
    tokenizer.train_from_iterator([" some text of two spaces"] * 9, trainer)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback()])
    return tokenizer


@pytest.mark.parametrize(
    ("make", "model_type", "tokenizer_class"),
    [
        (deepseek_like, "qwen2", "LlamaTokenizerFast"),
        (deepseek_like, "qwen2", "Qwen2Tokenizer"),
        (yi_like, "llama", "LlamaTokenizer"),
    ],
)
def test_ids_are_those_of_tokenizer_json_whatever_class_is_declared(
    tmp_path, make, model_type, tokenizer_class
):
    truth = make()
    truth.save(str(tmp_path / "tokenizer.json"))
    declared = {"tokenizer_class": tokenizer_class, "legacy": True}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(declared))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    tokenizer = load_tokenizer(tmp_path)
    for text in TEXTS:
        assert tokenizer(text).input_ids == truth.encode(text).ids


@pytest.mark.parametrize("family", FAMILIES)
def test_ids_of_the_fixtures_are_those_of_their_file(tmp_path, family):
    save_checkpoint(make_hf_model(family), tmp_path, tokenizer=make_tokenizer(family))
    truth, tokenizer = (
        Tokenizer.from_file(str(tmp_path / "tokenizer.json")),
        load_tokenizer(tmp_path),
    )
    for text in (*TEXTS, "".join(tokenizer.get_added_vocab())):
        assert tokenizer(text).input_ids == truth.encode(text).ids


def test_a_bos_that_tokenizer_json_does_not_add_is_warned_of(tmp_path, caplog):
    deepseek_like().save(str(tmp_path / "tokenizer.json"))
    declared = {"bos_token": "<|endoftext|>", "add_bos_token": True, "add_eos_token": False}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(declared))
    with caplog.at_level("WARNING"):
        tokenizer = load_tokenizer(tmp_path)
    assert tokenizer("text").input_ids == deepseek_like().encode("text").ids
    assert "add_bos_token is true, but tokenizer.json adds none" in caplog.text
    assert "add_eos_token" not in caplog.text


def test_a_tokenizer_that_the_library_alters_is_refused(tmp_path, monkeypatch):
    make_tokenizer("qwen2").save_pretrained(tmp_path)
    original = PreTrainedTokenizerFast.from_pretrained

    def altered(*arguments, **options):
        tokenizer = original(*arguments, **options)
        tokenizer.backend_tokenizer.normalizer = normalizers.Prepend("_")
        return tokenizer

    monkeypatch.setattr(PreTrainedTokenizerFast, "from_pretrained", altered)
    with pytest.raises(GradjaxError, match=r"other ids than .*tokenizer\.json"):
        load_tokenizer(tmp_path)


def test_a_directory_without_tokenizer_is_refused(tmp_path):
    with pytest.raises(GradjaxError, match=r"has no tokenizer\.json"):
        load_tokenizer(tmp_path)


def test_a_malformed_tokenizer_is_refused(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(GradjaxError, match=r"the tokenizer \(tokenizer\.json.* cannot be read"):
        load_tokenizer(tmp_path)


def test_code_of_a_tokenizer_does_not_run(tmp_path):
    make_tokenizer("qwen2").save_pretrained(tmp_path)
    code = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": [None, "own.Own"]}}
    edit_json(tmp_path / "tokenizer_config.json", code)
    marker = tmp_path / "ran"
    (tmp_path / "own.py").write_text(f"open({str(marker)!r}, 'w').close()")
    assert load_tokenizer(tmp_path)("text").input_ids == make_tokenizer("qwen2")("text").input_ids
    assert not marker.exists()


def edit_json(path: Path, changes: dict) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


COMMIT = "0123456789abcdef0123456789abcdef01234567"
LICENCE_ERROR = (403, {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted."})
MISSING_ERROR = (401, {"X-Error-Code": "RepoNotFound"})


class Hub(BaseHTTPRequestHandler):
    """As much of the Hub's protocol as a download needs."""

    files: dict[str, bytes]
    fetched: list[str]  # names of files, as they are downloaded

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = urlparse(self.path).path
        repo = "/".join(path.removeprefix("/api/models").split("/")[1:3])
        if repo == "org/missing":
            return self.reply(*MISSING_ERROR)
        if "/revision/" in path:
            commit = path.rsplit("/", 1)[1]
            names = self.files if "blobs=" in self.path else {}
            siblings = [{"rfilename": name, **self.blob(name)} for name in names]
            sha = COMMIT if commit == "main" else commit
            return self.reply_json({"id": repo, "sha": sha, "siblings": siblings})
        if repo == "google/gemma-2-2b":
            return self.reply(*LICENCE_ERROR)
        if "/tree/" in path:
            return self.reply_json(
                [
                    {"type": "file", "path": name, "size": len(data), "oid": self.etag(data)}
                    for name, data in self.files.items()
                ]
            )
        if repo == "meta-llama/Llama-3.2-1B":  # metadata is public, files are not
            return self.reply(*LICENCE_ERROR)
        data = self.files[path.rsplit("/", 1)[1]]
        if self.command == "GET":
            self.fetched.append(path.rsplit("/", 1)[1])
        headers = {"ETag": f'"{self.etag(data)}"', "X-Repo-Commit": path.split("/")[-2]}
        return self.reply(200, headers, data)

    def blob(self, name: str) -> dict:
        """What the Hub says of a file: SHA-256 of those that it stores as large ones."""
        if not name.endswith(".safetensors"):
            return {}
        digest, size = hashlib.sha256(self.files[name]).hexdigest(), len(self.files[name])
        return {"size": size, "lfs": {"sha256": digest, "size": size, "pointerSize": 134}}

    @staticmethod
    def etag(data: bytes) -> str:
        return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()

    def reply_json(self, value) -> None:
        self.reply(200, {"Content-Type": "application/json"}, json.dumps(value).encode())

    def reply(self, status: int, headers: dict[str, str], body: bytes = b"") -> None:
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_):
        pass


RESOLVE = """
import json, sys
from gradjax.errors import GradjaxError
from gradjax.checkpoints.resolve import fetch_weights, resolve

for model in sys.argv[1:]:
    try:
        checkpoint = fetch_weights(resolve(model))
        found = [checkpoint.name, str(checkpoint.directory), checkpoint.source, checkpoint.revision]
    except GradjaxError as error:
        found = str(error)
    print(json.dumps(found))
"""


IDENTITY = """
import json, sys
from gradjax.checkpoints.pretrained import identity
from gradjax.checkpoints.resolve import fetch_weights, resolve

model, *revisions = sys.argv[1:]
for revision in revisions:
    checkpoint = resolve(model, revision=revision)
    before = identity(checkpoint)
    print(json.dumps([before, sorted(p.name for p in checkpoint.directory.glob("*.safetensors"))]))
    assert identity(fetch_weights(checkpoint)) == before
"""


def serve(files: dict[str, bytes], source: Path) -> ThreadingHTTPServer:
    """A hub with these files, and those of a directory, in every repo."""
    Hub.files = files | {path.name: path.read_bytes() for path in source.iterdir()}
    Hub.fetched = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


def run_with_hub(
    server: ThreadingHTTPServer, home: Path, script: str, *arguments: str, **environment: str
) -> list:
    """What a script prints, a JSON value per line."""
    run = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ
        | {
            "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
            "HF_HOME": str(home),
            "HF_HUB_OFFLINE": "0",
            "TRANSFORMERS_OFFLINE": "0",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "PYTHONPATH": str(Path(__file__).parent.parent),
        }
        | environment,
    )
    return [json.loads(line) for line in run.stdout.splitlines()]


def test_a_model_is_what_its_weights_are_wherever_they_lie(tmp_path):
    source = save_checkpoint(make_hf_model("qwen2"), tmp_path / "source", max_shard_size="20KB")
    make_tokenizer("qwen2").save_pretrained(source)
    server = serve({"README.md": b"first"}, source)
    ask = partial(run_with_hub, server, tmp_path / "home", IDENTITY, "org/tiny")
    (first, there), (second, _) = ask("main", "f" * 40)  # another commit, the same weights
    assert there == []  # known before anything is downloaded
    assert first == second == identity(resolve(str(source)))
    assert "README.md" not in Hub.fetched
    ((offline, _),) = ask("main", HF_HUB_OFFLINE="1")
    assert offline == first
    server.shutdown()
    server.server_close()


def test_a_revision_is_of_hub_repos_only(tmp_path):
    for model in ("demo", str(tmp_path)):
        with pytest.raises(GradjaxError, match=r"--revision=v1: --model=.* is no Hub repo"):
            resolve(model, revision="v1")


def test_hub_repos_download_and_errors_and_the_cache(tmp_path):
    source = save_checkpoint(make_hf_model("qwen2"), tmp_path / "source", max_shard_size="20KB")
    unwanted = ["pytorch_model.bin", "consolidated.safetensors", "code.py"]
    server = serve(dict.fromkeys(unwanted, b""), source)
    run = partial(run_with_hub, server, tmp_path / "home", RESOLVE)
    found, registered, gated, files_gated, missing = run(
        "org/tiny.model", "qwen2.5_0.5b", "gemma2_2b", "llama3.2_1b", "org/missing"
    )
    name, directory, repo, revision = found
    assert (name, repo, revision) == ("org--tiny.model", "org/tiny.model", COMMIT)
    assert {path.name: path.read_bytes() for path in Path(directory).iterdir()} == {
        path.name: path.read_bytes() for path in source.iterdir()
    }
    read_config(Path(directory))
    assert (registered[0], registered[2]) == ("qwen2.5_0.5b", "Qwen/Qwen2.5-0.5B")
    for text, page in ((gated, "google/gemma-2-2b"), (files_gated, "meta-llama/Llama-3.2-1B")):
        assert f"accept its licence on https://huggingface.co/{page}" in text
        assert "HF_TOKEN" in text
    assert "neither an existing directory nor a public repo" in missing
    assert "https://huggingface.co/org/missing" in missing
    assert "HF_TOKEN" in missing

    server.shutdown()
    server.server_close()
    cached, uncached, partly = run("org/tiny.model", "qwen2.5_1.5b", "llama3.2_1b")
    assert cached == found
    assert "Qwen/Qwen2.5-1.5B is not in the local cache" in uncached
    assert "hf download Qwen/Qwen2.5-1.5B" in uncached
    assert "give the directory of a local copy as --model" in uncached
    assert "meta-llama/Llama-3.2-1B is not in the local cache (or only in part)" in partly
