"""A finished run or selection as a data set of the Hugging Face Hub, with a card."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

from gradjax import strict_json
from gradjax.errors import GradjaxError, first_line
from gradjax.storage.store import TABLES, read_manifest

_REPO = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)


def require_repo(repo: str, directory: str | Path | None) -> None:
    """Refuses what could not be pushed before anything is computed.

    Raises:
      GradjaxError: if the repo has no such name, the directory is a URL, or nobody is logged in.
    """
    if not _REPO.fullmatch(repo):
        raise GradjaxError(f"--push_to_hub={repo}: expected ORG/NAME of a data set")
    if "://" in str(directory or ""):
        raise GradjaxError(
            f"--push_to_hub={repo}: {directory} is a URL; only what lies on this machine is pushed"
        )
    from huggingface_hub import get_token

    if not get_token():
        raise GradjaxError(
            f"--push_to_hub={repo}: nobody is logged in; set HF_TOKEN to a token that may write, "
            "or call `hf auth login`"
        )


def push_run(directory: str | Path, repo: str, shown: str) -> str:
    """Uploads a finished run's tables, a card and its manifest; returns where they are.

    The manifest goes without what tells of machines: paths, hosts, flags.

    Args:
      shown: the table of groups, for the card.

    Raises:
      GradjaxError: if the Hub does not take it.
    """
    manifest = read_manifest(directory)
    data = {
        group: of | {"source": PurePath(str(of["source"])).name}
        for group, of in manifest["data"].items()
    }
    manifest = manifest | {"data": data, "invocations": []}
    facts = {name: manifest[name] for name in ("model", "settings", "data", "versions")}
    card = _card(
        f"Gradient spectra through {manifest['model']['name']}",
        {table: f"{table}/*.parquet" for table in TABLES},
        shown,
        facts,
    )
    extra = {"run.json": strict_json.dumps(manifest, indent=1), "README.md": card}
    return _push(directory, repo, [f"{table}/*.parquet" for table in TABLES], extra)


def push_selection(directory: Path, repo: str, by: str, shown: str) -> str:
    """Uploads a selection's rows and a card; returns where they are.

    Args:
      by: the metrics that it was made by.
      shown: its summary, for the card.

    Raises:
      GradjaxError: if the Hub does not take it.
    """
    parts = sorted(path.stem for path in directory.glob("*.jsonl"))
    card = _card(
        f"Rows selected by {by}", {part: f"{part}.parquet" for part in parts}, shown, {"by": by}
    )
    files = [f"{part}.{kind}" for part in parts for kind in ("jsonl", "parquet")]
    return _push(directory, repo, files, {"README.md": card})


def _push(directory: str | Path, repo: str, files: Sequence[str], extra: Mapping[str, str]) -> str:
    """Uploads files of a directory by patterns, then texts by name; a new repo is private."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    api, kind = HfApi(), "dataset"
    try:
        url = api.create_repo(repo, repo_type=kind, private=True, exist_ok=True)
        api.upload_folder(
            repo_id=repo,
            repo_type=kind,
            folder_path=directory,
            allow_patterns=list(files),
            commit_message="Tables",
        )
        for name, text in extra.items():
            api.upload_file(
                path_or_fileobj=text.encode(),
                path_in_repo=name,
                repo_id=repo,
                repo_type=kind,
                commit_message=name,
            )
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise GradjaxError(
            f"--push_to_hub={repo}: the Hub does not take it ({first_line(error)}); {directory} is "
            "finished, and the same command pushes it again"
        ) from error
    return str(url)


def _card(title: str, tables: Mapping[str, str], shown: str, facts: Mapping[str, Any]) -> str:
    """README.md: the tables for `load_dataset`, what is in them, how they were made."""
    configs = "".join(
        f"- config_name: {name}\n  data_files: {json.dumps(files)}\n"
        for name, files in tables.items()
    )
    said = strict_json.dumps(facts, indent=1)
    return (
        f"---\ntags:\n- gradjax\nconfigs:\n{configs}---\n\n# {title}\n\n"
        f"```\n{shown}\n```\n\nMade with gradjax, by the method of "
        f"[arXiv 2504.10766](https://arxiv.org/abs/2504.10766), from\n\n```json\n{said}\n```\n"
    )
