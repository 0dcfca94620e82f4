"""--model -> a local checkpoint directory: registered names, directories, the Hub."""

import dataclasses
import hashlib
import json
import re
import tempfile
from contextlib import suppress
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from absl import logging
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from gradjax.checkpoints.orbax import ORIGIN, read_origin
from gradjax.device import cache_directory
from gradjax.errors import GradjaxError, did_you_mean, first_line
from gradjax.storage.filesystem import url_to_fs

DEMO = "demo"
_DEMO_DIRECTORY = Path(__file__).parent.parent / "demo" / "model"

REGISTRY: dict[str, str] = {
    "qwen2.5_0.5b": "Qwen/Qwen2.5-0.5B",
    "qwen2.5_0.5b_instruct": "Qwen/Qwen2.5-0.5B-Instruct",
    "qwen2.5_1.5b": "Qwen/Qwen2.5-1.5B",
    "qwen2.5_1.5b_instruct": "Qwen/Qwen2.5-1.5B-Instruct",
    "qwen2.5_3b": "Qwen/Qwen2.5-3B",
    "qwen2.5_3b_instruct": "Qwen/Qwen2.5-3B-Instruct",
    "qwen2.5_7b": "Qwen/Qwen2.5-7B",
    "qwen2.5_7b_instruct": "Qwen/Qwen2.5-7B-Instruct",
    "qwen2.5_14b": "Qwen/Qwen2.5-14B",
    "qwen2.5_14b_instruct": "Qwen/Qwen2.5-14B-Instruct",
    "qwen2.5_32b": "Qwen/Qwen2.5-32B",
    "qwen2.5_32b_instruct": "Qwen/Qwen2.5-32B-Instruct",
    "qwen2.5_72b": "Qwen/Qwen2.5-72B",
    "qwen2.5_72b_instruct": "Qwen/Qwen2.5-72B-Instruct",
    "llama3.1_8b": "meta-llama/Llama-3.1-8B",
    "llama3.1_8b_instruct": "meta-llama/Llama-3.1-8B-Instruct",
    "llama3.1_70b": "meta-llama/Llama-3.1-70B",
    "llama3.1_70b_instruct": "meta-llama/Llama-3.1-70B-Instruct",
    "llama3.2_1b": "meta-llama/Llama-3.2-1B",
    "llama3.2_1b_instruct": "meta-llama/Llama-3.2-1B-Instruct",
    "llama3.2_3b": "meta-llama/Llama-3.2-3B",
    "llama3.2_3b_instruct": "meta-llama/Llama-3.2-3B-Instruct",
    "gemma2_2b": "google/gemma-2-2b",
    "gemma2_2b_instruct": "google/gemma-2-2b-it",
    "gemma2_9b": "google/gemma-2-9b",
    "gemma2_9b_instruct": "google/gemma-2-9b-it",
    "gemma2_27b": "google/gemma-2-27b",
    "gemma2_27b_instruct": "google/gemma-2-27b-it",
    "smollm2_135m": "HuggingFaceTB/SmolLM2-135M",
    "smollm2_135m_instruct": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "smollm2_360m": "HuggingFaceTB/SmolLM2-360M",
    "smollm2_360m_instruct": "HuggingFaceTB/SmolLM2-360M-Instruct",
    "smollm2_1.7b": "HuggingFaceTB/SmolLM2-1.7B",
    "smollm2_1.7b_instruct": "HuggingFaceTB/SmolLM2-1.7B-Instruct",
    "qwen3_0.6b": "Qwen/Qwen3-0.6B-Base",
    "qwen3_0.6b_instruct": "Qwen/Qwen3-0.6B",
    "qwen3_1.7b": "Qwen/Qwen3-1.7B-Base",
    "qwen3_1.7b_instruct": "Qwen/Qwen3-1.7B",
    "qwen3_4b": "Qwen/Qwen3-4B-Base",
    "qwen3_4b_instruct": "Qwen/Qwen3-4B",
    "qwen3_8b": "Qwen/Qwen3-8B-Base",
    "qwen3_8b_instruct": "Qwen/Qwen3-8B",
    "qwen3_14b": "Qwen/Qwen3-14B-Base",
    "qwen3_14b_instruct": "Qwen/Qwen3-14B",
    "qwen3_32b_instruct": "Qwen/Qwen3-32B",
    "mistral_7b": "mistralai/Mistral-7B-v0.3",
    "mistral_7b_instruct": "mistralai/Mistral-7B-Instruct-v0.3",
    "olmo_1b": "allenai/OLMo-1B-hf",
    "olmo_7b": "allenai/OLMo-7B-hf",
    "olmo_7b_instruct": "allenai/OLMo-7B-Instruct-hf",
    "olmo2_1b": "allenai/OLMo-2-0425-1B",
    "olmo2_1b_instruct": "allenai/OLMo-2-0425-1B-Instruct",
    "olmo2_7b": "allenai/OLMo-2-1124-7B",
    "olmo2_7b_instruct": "allenai/OLMo-2-1124-7B-Instruct",
    "olmo2_13b": "allenai/OLMo-2-1124-13B",
    "olmo2_13b_instruct": "allenai/OLMo-2-1124-13B-Instruct",
    "olmo2_32b": "allenai/OLMo-2-0325-32B",
    "olmo2_32b_instruct": "allenai/OLMo-2-0325-32B-Instruct",
    "gemma3_270m": "google/gemma-3-270m",
    "gemma3_270m_instruct": "google/gemma-3-270m-it",
    "gemma3_1b": "google/gemma-3-1b-pt",
    "gemma3_1b_instruct": "google/gemma-3-1b-it",
}

# What a model is made of here: no pickles, no code, no second copy in another format.
_HUB_FILES = ["*.json", "*.jinja"]
_HUB_WEIGHTS = "model*.safetensors"
_TOKENIZER_FILE = "tokenizer.json"
# Texts that tokenizers treat differently: spaces, digits, lines, scripts, forms of one letter.
_PROBES = (
    "a",
    "  two  spaces,\ttab 3,141,592.65 in 2024\n\n\nlines\r\nx",
    "naïve e\u0301 ﬁ ｗｉｄｅ, 数据和한국어 العربية, 😀👩‍👩‍👧",
    'don\'t print("x")  # <b>_</b> ▁',
)


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A model on this machine."""

    name: str  # short, fit for a folder's name
    directory: Path  # config.json, safetensors and tokenizer files
    source: str  # where it came from: a Hub repo or a path
    revision: str | None  # the Hub's commit hash; None for a local directory
    origin: dict[str, str | None] | None = None  # of a converted checkpoint: what it was made from


def resolve(model: str, *, flag: str = "model", revision: str | None = None) -> Checkpoint:
    """The checkpoint that `--model`, or another flag, names; downloads config and tokenizer.

    `model` is a registered name, else an existing directory, else a Hub repo `org/name`.
    A Hub repo's cached copy is used where the Hub cannot be reached. Weights are left to
    `fetch_weights`.

    `revision` is a Hub repo's commit, tag or branch (its main branch if None).

    Raises GradjaxError for an unknown name, for a repo that is missing, gated, or neither
    reachable nor cached, and for a revision of what is no Hub repo.
    """
    if model in REGISTRY:
        return _from_hub(model, REGISTRY[model], flag, revision=revision)
    is_repo = re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", model)
    if revision and (not is_repo or Path(model).expanduser().is_dir()):
        raise GradjaxError(
            f"--revision={revision}: --{flag}={model} is no Hub repo; leave --revision out"
        )
    if model == DEMO:
        return Checkpoint(DEMO, _DEMO_DIRECTORY, DEMO, None)
    directory = Path(model).expanduser()
    if model and directory.is_dir():
        path = directory.resolve()
        return Checkpoint(_folder_name(path.name), path, str(path), None, read_origin(path))
    if "://" in model:
        return _from_object_store(model, flag)
    if is_repo:
        return _from_hub(_folder_name(model), model, flag, revision=revision)
    raise _unknown(model, flag)


def fetch_weights(checkpoint: Checkpoint, *, flag: str = "model") -> Checkpoint:
    """The same checkpoint with its weights in its directory, downloaded where they have to be.

    Raises GradjaxError as `resolve`.
    """
    if "://" in checkpoint.source:
        return _from_object_store(checkpoint.source, flag, weights=True)
    if checkpoint.revision:
        return _from_hub(
            checkpoint.name, checkpoint.source, flag, weights=True, revision=checkpoint.revision
        )
    return checkpoint


def hub_digests(checkpoint: Checkpoint) -> dict[str, str] | None:
    """SHA-256 of a Hub checkpoint's weight files by name; None if the Hub cannot be asked."""
    try:
        info = HfApi().model_info(
            checkpoint.source, revision=checkpoint.revision, files_metadata=True, timeout=10
        )
    except Exception:  # the client's HTTP library has errors of its own
        return None
    files = [file for file in info.siblings or [] if fnmatch(file.rfilename, _HUB_WEIGHTS)]
    digests = {file.rfilename: file.lfs.sha256 for file in files if file.lfs}
    return digests if files and len(digests) == len(files) else None


def load_tokenizer(directory: Path) -> PreTrainedTokenizerFast:
    """The tokenizer of a checkpoint's tokenizer.json, whatever class its configuration declares.

    Names of special tokens and the chat template are those of tokenizer_config.json; no code of
    the checkpoint runs. Raises GradjaxError where tokenizer.json is missing, cannot be read or
    gives other ids than the loaded tokenizer.
    """
    directory = Path(directory)
    file = directory / _TOKENIZER_FILE
    if not file.is_file():
        raise GradjaxError(
            f"{directory} has no {_TOKENIZER_FILE}: put the model's tokenizer files "
            f"({_TOKENIZER_FILE}, tokenizer_config.json) there, as save_pretrained of its fast "
            "tokenizer writes them."
        )
    try:
        truth = Tokenizer.from_file(str(file))
        truth.no_truncation()
        truth.no_padding()
        # Not AutoTokenizer: classes that it takes rebuild some files by rules of their own.
        tokenizer = PreTrainedTokenizerFast.from_pretrained(directory, local_files_only=True)
    except Exception as error:  # tokenizers raises bare Exception for a malformed file
        raise GradjaxError(
            f"{directory}: the tokenizer ({_TOKENIZER_FILE}, tokenizer_config.json) cannot be read "
            f"({first_line(error)}): download or save it again."
        ) from error
    added = "".join(token.content for token in truth.get_added_tokens_decoder().values())
    for text in (*_PROBES, added):
        found = tokenizer(text, add_special_tokens=False).input_ids
        if found != (expected := truth.encode(text, add_special_tokens=False).ids):
            raise GradjaxError(
                f"{directory}: transformers gives {text!r} other ids than {_TOKENIZER_FILE} itself "
                f"({found[:8]} instead of {expected[:8]}): tokenizer_config.json adds or changes "
                "tokens; make it agree with the file, which the model was trained with."
            )
    _warn_of_ends(directory, tokenizer)
    return tokenizer


def _warn_of_ends(directory: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """Says where BOS or EOS are declared otherwise than tokenizer.json adds them."""
    ends = set(tokenizer("a").input_ids) - set(tokenizer("a", add_special_tokens=False).input_ids)
    try:
        declared = json.loads((directory / "tokenizer_config.json").read_text(encoding="utf-8"))
    except OSError:
        return  # optional
    for name in ("bos_token", "eos_token"):
        asked, adds = declared.get(f"add_{name}"), getattr(tokenizer, f"{name}_id") in ends
        if asked is not None and bool(asked) != adds:
            logging.warning(
                "%s: in tokenizer_config.json add_%s is %s, but %s adds %s: texts are taken as the "
                "latter says, like transformers 5 does",
                directory,
                name,
                json.dumps(asked),
                _TOKENIZER_FILE,
                "one" if adds else "none",
            )


def _from_object_store(url: str, flag: str, *, weights: bool = False) -> Checkpoint:
    """A converted checkpoint, fetched once into this machine's cache."""
    try:
        filesystem, path = url_to_fs(url)
        origin = filesystem.cat_file(f"{path}/{ORIGIN}")
        key = hashlib.sha256(url.encode() + origin).hexdigest()[:16]
        directory = cache_directory() / ("models" if weights else "configs") / key
        if not directory.exists():
            directory.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=directory.parent) as scratch:
                fetched = Path(scratch) / key
                if weights:
                    filesystem.get(f"{path.rstrip('/')}/", f"{fetched}/", recursive=True)
                else:
                    _get_files(filesystem, path, fetched)
                with suppress(FileExistsError, OSError):  # another process was faster
                    fetched.rename(directory)
    except GradjaxError:
        raise
    except Exception as error:  # each filesystem has errors of its own
        raise GradjaxError(
            f"--{flag}={url} cannot be fetched ({first_line(error)}), expected what "
            "gradjax convert wrote there; check the URL, and keys and endpoint in the environment"
        ) from error
    name = _folder_name(url.rstrip("/").rsplit("/", 1)[-1])
    return Checkpoint(name, directory, url, None, read_origin(directory))


def _get_files(filesystem: Any, path: str, target: Path) -> None:
    """Fetches the files of a folder, but none of the folders in it."""
    target.mkdir()
    for entry in filesystem.ls(path, detail=True):
        if entry["type"] == "file":
            filesystem.get_file(entry["name"], str(target / Path(entry["name"]).name))


def _from_hub(
    name: str, repo: str, flag: str, *, weights: bool = False, revision: str | None = None
) -> Checkpoint:
    page = f"https://huggingface.co/{repo}"
    files = [*_HUB_FILES, *([_HUB_WEIGHTS] if weights else [])]
    try:
        directory = Path(snapshot_download(repo, revision=revision, allow_patterns=files))
    except GatedRepoError as error:
        raise GradjaxError(
            f"--{flag}={repo} is gated: accept its licence on {page} and put a token of that "
            "account (https://huggingface.co/settings/tokens) into the variable HF_TOKEN."
        ) from error
    except RepositoryNotFoundError as error:
        raise GradjaxError(
            f"--{flag}={repo} is neither an existing directory nor a public repo ({page}): check "
            "the name, or, where it is private, put a token with access into the variable HF_TOKEN."
        ) from error
    except LocalEntryNotFoundError as error:
        raise GradjaxError(
            f"--{flag}={repo} is not in the local cache (or only in part) and the Hub cannot be "
            f"reached: download it where there is a network (hf download {repo}), or give the "
            f"directory of a local copy as --{flag}."
        ) from error
    except Exception as error:  # the client's HTTP library has errors of its own
        raise GradjaxError(
            f"--{flag}={repo} cannot be downloaded from {page} ({first_line(error)}): try again, "
            f"or give the directory of a local copy as --{flag}."
        ) from error
    return Checkpoint(name, directory, repo, directory.name)


def _unknown(model: str, flag: str) -> GradjaxError:
    hint = did_you_mean(model, [DEMO, *REGISTRY])
    return GradjaxError(
        f"--{flag}={model} is neither a registered name{hint} nor an existing directory nor a Hub "
        f"repo ORG/NAME; registered are {', '.join([DEMO, *REGISTRY])}."
    )


def _folder_name(text: str) -> str:
    """`Qwen/Qwen2.5-0.5B` -> `Qwen--Qwen2.5-0.5B`."""
    return re.sub(r"[^\w.-]", "-", text.replace("/", "--")).lstrip(".") or "model"
