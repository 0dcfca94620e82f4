"""The metrics that are asked for: what their numbers depend on, and how they are computed."""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from absl import logging

from gradjax.checkpoints.pretrained import identity
from gradjax.checkpoints.resolve import load_tokenizer, resolve
from gradjax.errors import GradjaxError, extras
from gradjax.hashing import sha256
from gradjax.score.budget import Budget
from gradjax.score.config import FAMILIES, JUDGED, Done, JudgedMetric, Score, ScoreConfig
from gradjax.score.ifd import score_ifd, score_perplexity
from gradjax.score.judge import fill, own_prompt, read_prompt, score_difficulty, score_instag
from gradjax.score.language_model import (
    language_window,
    load_language_model,
    resolve_language_model,
)
from gradjax.score.reward import load_reward_model, score_reward
from gradjax.structs import Example

if TYPE_CHECKING:
    from gradjax.score.endpoint import Judge

# Scores rows, and says how many are done meanwhile.
Scorer = Callable[[Sequence[Example], Done], list[Score]]


@dataclasses.dataclass(frozen=True)
class Family:
    """Columns that are computed together.

    `settings` is what their numbers depend on beside the rows: equal, or not the same numbers.
    `load` makes what scores, once there are rows to score.
    """

    name: str
    settings: dict[str, Any]
    load: Callable[[], Scorer]

    @property
    def columns(self) -> tuple[str, ...]:
        """Of scores/."""
        return FAMILIES[self.name]


def asked_families(config: ScoreConfig, judge: "Judge | None") -> list[Family]:
    """What the config asks for; models are looked up, no weight is read.

    Raises:
      GradjaxError: if there is no such model or prompt.
    """
    return [_family(name, config, judge) for name in config.families]


def make_judge(config: ScoreConfig) -> "Judge | None":
    """What judges, None if nothing is to be judged.

    Raises:
      GradjaxError: if a flag is wrong, answers cannot be kept in the output directory, or the
        extra `score` is not installed.
    """
    if not config.judged:
        return None
    if not isinstance(config.output_dir, Path):
        raise GradjaxError(
            f"--output_dir={config.output_dir}: answers are kept in a file on a local disk; give "
            "a local directory for judged metrics"
        )
    with extras():
        from gradjax.score.endpoint import Judge
    return Judge(
        base_url=config.judge_base_url,
        model=config.judge_model or "",
        cache=config.output_dir / "judge.sqlite",
        prompt=read_prompt(config.judge_prompt) if config.judge_prompt else None,
        concurrency=config.judge_concurrency,
        max_tokens=config.judge_max_tokens,
        budget=Budget(config.judge_budget or {}),
    )


def _family(name: str, config: ScoreConfig, judge: "Judge | None") -> Family:
    if name in JUDGED:
        assert judge is not None
        prompt = judge.prompt or own_prompt(cast(JudgedMetric, name))
        # Of the prompt as it is asked: the tags around a row belong to it.
        settings = {
            "endpoint": judge.endpoint,
            "model": judge.model,
            "prompt": sha256(fill(prompt, "")),
        }
        score = score_instag if name == "instag" else score_difficulty
        return Family(name, settings, lambda: lambda rows, done: score(judge, rows, done=done))
    if name == "reward":
        checkpoint = resolve(config.reward_model, flag="reward_model")
    else:
        checkpoint = resolve_language_model(config.ifd_model)
    tokenizer = load_tokenizer(checkpoint.directory)
    settings: dict[str, Any] = {
        "model": identity(checkpoint),
        "tokenizer": sha256(tokenizer.backend_tokenizer.to_str()),
    }
    if name == "reward":
        settings["template"] = sha256(str(tokenizer.chat_template or ""))
        return Family(name, settings, partial(_load_reward, config.reward_model))
    settings["max_length"] = config.max_length or language_window(checkpoint.directory)
    score = score_ifd if name == "ifd" else score_perplexity
    return Family(name, settings, partial(_load_losses, score, config))


def _load_reward(model: str) -> Scorer:
    logging.info("Loading %s", model)
    loaded = load_reward_model(model)
    return lambda rows, done: score_reward(loaded, rows, done=done)


def _load_losses(score: Callable[..., list[Score]], config: ScoreConfig) -> Scorer:
    logging.info("Loading %s", config.ifd_model)
    model = load_language_model(config.ifd_model)
    return lambda rows, done: score(model, rows, config.max_length, done=done)
