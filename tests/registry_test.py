import csv
import dataclasses
import hashlib
import json
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
from gradjax.checkpoints.resolve import REGISTRY, load_tokenizer, resolve
from gradjax.errors import GradjaxError
from gradjax.model.config import DecoderConfig, RopeScaling
from gradjax.model.decoder import logits, random_decoder
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
    assert expected == REGISTRY


@pytest.mark.parametrize("name", PUBLISHED)
def test_registered_sizes_have_their_published_shapes(tmp_path, name):
    row = PUBLISHED[name]
    (tmp_path / "config.json").write_text(json.dumps(published_config(row)))
    config = read_config(tmp_path)
    assert config.tied_embeddings == (row["tied"] == "1")
    assert config.rope_theta == float(row["rope_theta"])
    assert (config.rope_scaling is not None) == (row["rope_scaling"] != "")

    decoder = jax.eval_shape(partial(random_decoder, config, 0))
    assert sum(leaf.size for leaf in jax.tree.leaves(decoder)) == int(row["parameters"])
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
    assert all(name.removesuffix("_instruct") in str(raised.value) for name in REGISTRY)
    assert "_instruct" in str(raised.value)


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

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = urlparse(self.path).path
        repo = "/".join(path.removeprefix("/api/models").split("/")[1:3])
        if repo == "org/missing":
            return self.reply(*MISSING_ERROR)
        if path.endswith("/revision/main"):
            return self.reply_json({"id": repo, "sha": COMMIT, "siblings": []})
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
        headers = {"ETag": f'"{self.etag(data)}"', "X-Repo-Commit": COMMIT}
        return self.reply(200, headers, data)

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


def test_hub_repos_download_and_errors_and_the_cache(tmp_path):
    source = save_checkpoint(make_hf_model("qwen2"), tmp_path / "source", max_shard_size="20KB")
    unwanted = ["pytorch_model.bin", "consolidated.safetensors", "code.py"]
    Hub.files = dict.fromkeys(unwanted, b"") | {
        path.name: path.read_bytes() for path in source.iterdir()
    }
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()

    def run(*models: str) -> list:
        run = subprocess.run(
            [sys.executable, "-c", RESOLVE, *models],
            capture_output=True,
            text=True,
            check=True,
            env=os.environ
            | {
                "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
                "HF_HOME": str(tmp_path / "home"),
                "HF_HUB_OFFLINE": "0",
                "TRANSFORMERS_OFFLINE": "0",
                "HF_HUB_DISABLE_TELEMETRY": "1",
                "PYTHONPATH": str(Path(__file__).parent.parent),
            },
        )
        return [json.loads(line) for line in run.stdout.splitlines()]

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
    cached, uncached, partial = run("org/tiny.model", "qwen2.5_1.5b", "llama3.2_1b")
    assert cached == found
    assert "Qwen/Qwen2.5-1.5B is not in the local cache" in uncached
    assert "hf download Qwen/Qwen2.5-1.5B" in uncached
    assert "give the directory of a local copy as --model" in uncached
    assert "meta-llama/Llama-3.2-1B is not in the local cache (or only in part)" in partial
