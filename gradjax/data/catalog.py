"""The data sets of the paper by name: where each lies, under which licence, how its rows read."""

import dataclasses
import re
from collections.abc import Callable, Mapping
from pathlib import Path

from gradjax.errors import GradjaxError, first_line

# 16-3=<<16-3=13>>13: what GSM8K's authors gave to a calculator.
_CALCULATION = re.compile(r"<<[^<>]*>>")


@dataclasses.dataclass(frozen=True)
class RegisteredDataset:
    """A public data set, and how its rows become rows that `gradjax.data.examples` reads."""

    name: str
    repo: str | None  # on the Hub; None where no copy there is known
    revision: str  # a commit, or a branch
    files: str  # those of the training split, relative to the repository; may have *
    licence: str
    columns: tuple[str, ...]  # what a row is made of
    convert: Callable[..., dict[str, str]] | None = None  # of their texts; None: as they stand
    note: str = ""

    @property
    def page(self) -> str:
        """Where its card and its licence are."""
        return f"https://huggingface.co/datasets/{self.repo}"

    def to_row(self, row: object) -> object:
        """A row of the source as gradjax reads it.

        Where texts are converted, a row that lacks one is none of this data set, though gradjax
        may be able to read it: its only field says which, so that it has status `invalid_row`.
        """
        if not self.convert or not isinstance(row, Mapping):
            return row
        for column in self.columns:
            if not isinstance(row.get(column), str):
                return {f"no {column}": row}
        return self.convert(*map(row.get, self.columns))


def _thinking_and_answer(question: str, thinking: str, answer: str) -> dict[str, str]:
    # As in the paper's file, where three empty lines part the two in every row.
    parts = [thinking.strip(), answer.strip()]
    return {"instruction": question, "output": "\n\n\n\n".join(parts) if all(parts) else ""}


def _bare_answer(question: str, answer: str) -> dict[str, str]:
    _, _, number = answer.partition("####")
    return {"instruction": question, "output": number.strip()}


def _worked_answer(question: str, answer: str) -> dict[str, str]:
    return {"instruction": question, "output": _CALCULATION.sub("", answer).strip()}


_GSM8K_FAST = RegisteredDataset(
    name="gsm8k_fast",
    repo="openai/gsm8k",
    revision="740312add88f781978c0658806c59bc2815b9866",
    files="main/train-*.parquet",
    licence="mit",
    columns=("question", "answer"),
    convert=_bare_answer,
    note="output: what follows ####",
)

DATASETS: dict[str, RegisteredDataset] = {
    dataset.name: dataset
    for dataset in (
        RegisteredDataset(
            name="wizardlm",
            repo="WizardLMTeam/WizardLM_evol_instruct_70k",
            revision="d2ab8176a42d3fc250b290a89c90a792e94869f9",
            files="alpaca_evol_instruct_70k.json",
            licence="mit",
            columns=("instruction", "output"),
            note="the paper does not say which release of WizardLM; this one has its columns",
        ),
        RegisteredDataset(
            name="magpie",
            repo="Magpie-Align/Magpie-Pro-300K-Filtered",
            revision="b82dff315a8a85318ee80e116b4df200f88127df",
            files="data/train-*.parquet",
            licence="llama3",
            columns=("conversations",),
        ),
        RegisteredDataset(
            name="openhermes2.5",
            repo="teknium/OpenHermes-2.5",
            revision="b82037821055c377bed0d495e72e46de3bc72e84",
            files="openhermes2_5.json",
            licence="none stated",
            columns=("conversations",),
            note="conversations of several turns keep them: --prompt_format=chat reads those, "
            "--plain leaves them out",
        ),
        RegisteredDataset(
            name="s1.1",
            repo="simplescaling/s1K-1.1",
            revision="main",
            files="data/train-*.parquet",
            licence="mit",
            columns=("question", "deepseek_thinking_trajectory", "deepseek_attempt"),
            convert=_thinking_and_answer,
            note="output: DeepSeek-R1's thinking, then its answer",
        ),
        RegisteredDataset(
            name="gsm8k_r1",
            repo=None,
            revision="",
            files="gsm8k_R1.json",
            licence="mit (questions), mit (DeepSeek-R1)",
            columns=("instruction", "output"),
            note="no copy on the Hub is known; the paper's 200 rows are "
            "_data/10k_version/reasoning/gsm8k_R1.json of github.com/MingLiiii/Gradient_Unified",
        ),
        _GSM8K_FAST,
        dataclasses.replace(
            _GSM8K_FAST,
            name="gsm8k_slow",
            convert=_worked_answer,
            note="output: the whole answer without its <<calculator annotations>>; the paper "
            "does not say whether it kept them",
        ),
    )
}


def fetch(dataset: RegisteredDataset, flags: str = "") -> Path:
    """The Hub's files of a data set, in a directory that its commit names; cached ones offline.

    Args:
      dataset: which.
      flags: what to give gradjax prepare besides the data set and a source, for the advice.

    Raises:
      GradjaxError: if it has no repository or cannot be had; says what to fetch by hand.
    """
    prepare = f"gradjax prepare --dataset={dataset.name}"
    flags = flags or f"--output={dataset.name}.jsonl"
    if not dataset.repo:
        raise GradjaxError(
            f"{dataset.name} has to be fetched by hand ({dataset.note}): get a file of rows with "
            f"{' and '.join(dataset.columns)}, then {prepare} --source=FILE {flags}"
        )
    from huggingface_hub import snapshot_download  # slow to load, and --help needs none of it

    try:
        return Path(
            snapshot_download(
                dataset.repo,
                repo_type="dataset",
                revision=dataset.revision,
                allow_patterns=dataset.files,
            )
        )
    except Exception as error:  # network, access, cache: the client raises many kinds
        raise GradjaxError(
            f"{dataset.name} cannot be fetched from the Hub ({first_line(error)}): accept its "
            f"terms ({dataset.licence}, {dataset.page}) and set HF_TOKEN if it is gated; or, where "
            f"there is a network, hf download {dataset.repo} --repo-type dataset --revision "
            f"{dataset.revision} --include '{dataset.files}' --local-dir DIR, then {prepare} "
            f"--source=DIR {flags}"
        ) from error
