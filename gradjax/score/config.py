"""What a scoring is asked to do, checked before anything is loaded."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal, get_args

from gradjax.config import Reading, SpectraConfig, as_directory
from gradjax.errors import GradjaxError, did_you_mean
from gradjax.score.budget import Budget
from gradjax.structs import ATTENTION, Projection, Status

# What is computed together, and the columns of scores/ that come of it.
FAMILIES: Mapping[str, tuple[str, ...]] = {
    "ifd": (
        "ifd",
        "ifd_loss_ratio",
        "perplexity_with_instruction",
        "perplexity_without_instruction",
    ),
    "perplexity": ("perplexity", "loss", "num_tokens", "num_target_tokens"),
    "reward": ("reward",),
    "instag": ("instag",),
    "difficulty": ("difficulty",),
}
JudgedMetric = Literal["instag", "difficulty"]
JUDGED: tuple[JudgedMetric, ...] = get_args(JudgedMetric)
# What only a run of gradjax spectra can tell.
RUN_METRICS = (
    *("nuclear_norm", "effective_rank", "normalized_effective_rank", "frobenius_norm"),
    *("spectral_norm", "entry_mean", "entry_max", "entry_min"),
    *("same_layer_cosine", "cross_layer_cosine"),
)
METRICS = tuple(column for columns in FAMILIES.values() for column in columns)


@dataclasses.dataclass(frozen=True)
class ScoreConfig:
    """The flags of `gradjax score`.

    Raises:
      GradjaxError: naming the flag, what was found and what was expected.
    """

    metrics: tuple[str, ...] = ()
    data: tuple[str, ...] = ()  # none: the run's
    output_dir: str | Path = "scores"
    limit: int | None = None  # rows per group
    run: str | None = None  # adds what a run of the same rows measured
    layers: str = "all"
    projections: tuple[Projection, ...] = ATTENTION
    ifd_model: str = "gpt2"
    reward_model: str = "sfairXC/FsfairX-LLaMA3-RM-v0.1"
    max_length: int | None = None  # tokens; None: the model's window
    judge_base_url: str = "https://api.openai.com/v1"
    judge_model: str | None = None
    judge_prompt: str | None = None
    judge_concurrency: int = 8
    judge_max_tokens: int = 4096  # of an answer
    judge_budget: Mapping[str, float] | None = None  # requests and tokens of a call
    judge_prices: tuple[float, float] | None = None  # per million tokens in, out
    judge_batch: str | None = None
    judge_batch_results: str | None = None
    overwrite: bool = False
    reading: Reading = dataclasses.field(default_factory=Reading)

    def __post_init__(self) -> None:
        for name in ("metrics", "data", "projections"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        object.__setattr__(self, "output_dir", as_directory(self.output_dir))
        known = METRICS + RUN_METRICS if self.run else METRICS
        if unknown := [name for name in self.metrics if name not in known]:
            raise GradjaxError(
                f"--metrics={unknown[0]}: expected some of {', '.join(METRICS)}"
                f"{did_you_mean(unknown[0], known)}; gradient statistics come with --run=DIR, a "
                "run of gradjax spectra"
            )
        if not self.metrics and not self.run:
            raise GradjaxError(
                f"--metrics is empty: expected some of {', '.join(METRICS)}, or --run=DIR for what "
                "a run of gradjax spectra measured"
            )
        if not self.data and not self.run:
            raise GradjaxError("--data is missing: expected [GROUP=]SOURCE, or --run=DIR")
        if not self.data and self.reading != Reading():
            raise GradjaxError(
                "--columns, --field, --response_marker, --data_revision and --strict say how "
                "--data is read, which is not given; rows of --run are read as the run read them"
            )
        for name, least in (("limit", 1), ("max_length", 2)):
            if (value := getattr(self, name)) is not None and value < least:
                raise GradjaxError(f"--{name}={value}: expected a number of at least {least}")
        SpectraConfig(layers=self.layers, projections=self.projections)  # or it says what is wrong
        if not self.run and (self.layers, self.projections) != ("all", ATTENTION):
            raise GradjaxError("--layers and --projections are of --run, which is not given")
        self._require_judge()

    @property
    def families(self) -> tuple[str, ...]:
        """What has to be computed; a run brings losses and lengths with it."""
        asked = [name for name, columns in FAMILIES.items() if set(columns) & set(self.metrics)]
        return tuple(name for name in asked if not (name == "perplexity" and self.run))

    @property
    def judged(self) -> tuple[JudgedMetric, ...]:
        """The families that a chat model judges."""
        return tuple(name for name in JUDGED if name in self.families)

    def _require_judge(self) -> None:
        if self.judge_budget and self.judge_batch:
            raise GradjaxError(
                f"--judge_budget={Budget(self.judge_budget)} is for questions that are asked now, "
                "and --judge_batch only writes them: give one of them, or fewer rows (--limit)"
            )
        Budget(self.judge_budget or {})  # or it says what is wrong
        judged = self.judged
        if judged and not self.judge_model:
            raise GradjaxError(
                f"--metrics={judged[0]} is judged by a chat model: name it with --judge_model, and "
                "an OpenAI-compatible endpoint with --judge_base_url if it is not OpenAI's"
            )
        flags = ("judge_prompt", "judge_batch", "judge_batch_results")
        for name in (name for name in flags if getattr(self, name)):
            if len(judged) != 1:
                raise GradjaxError(
                    f"--{name}={getattr(self, name)}: expected with one judged metric, "
                    f"{' or '.join(JUDGED)}, found {', '.join(judged) or 'none'}"
                )


@dataclasses.dataclass(frozen=True)
class Score:
    """One row's numbers of one family of metrics."""

    values: dict[str, float | None]  # by column of scores/; None where undefined, never 0
    status: Status = "ok"
    reason: str = ""  # why a value is None


# Is told of rows that have been scored, or parts of some.
Done = Callable[[float], object]


def nobody(rows: float) -> None:
    """Where nobody shows progress."""
