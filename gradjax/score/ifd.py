"""Instruction-following difficulty (IFD) and perplexity, from a language model's losses.

IFD is the perplexity of a response given its instruction, over that of the response alone (Li et
al., arXiv 2308.12032; with GPT-2: Superfiltering, arXiv 2402.00530): near 1 where the instruction
tells nothing about the response. Both texts are the reference's: the instruction, a newline and
the response, cut at the model's window; and the response on its own, cut to the room that the
instruction leaves, plus one token. So both sides predict about as many tokens.

Nothing predicts the first token of a text. With a BOS token, that is no loss. Without one (GPT-2,
Qwen) it is the response's own first token, which is left out of the mean of the response alone,
as in the reference, while the other side has it.
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from gradjax.config import TokenConfig
from gradjax.data.examples import is_single_turn
from gradjax.data.tokens import tokenize_rows
from gradjax.errors import GradjaxError
from gradjax.score.config import FAMILIES, Done, Score, nobody
from gradjax.score.language_model import LanguageModel, mean_losses
from gradjax.structs import Example, TokenizedExample

_IFD_COLUMNS, _PERPLEXITY_COLUMNS = FAMILIES["ifd"], FAMILIES["perplexity"]
_TOO_LARGE = "a perplexity is too large for a float64"


def score_ifd(
    model: LanguageModel,
    examples: Sequence[Example],
    max_length: int | None = None,
    *,
    done: Done = nobody,
) -> list[Score]:
    """IFD of each example, by column:

    - `ifd`: the ratio of the two perplexities
    - `ifd_loss_ratio`: the ratio of the two mean losses
    - `perplexity_with_instruction`, `perplexity_without_instruction`: of the response

    What is undefined is None, with a reason; conversations of several turns have no plain text and
    are `invalid_row`.

    Args:
      max_length: tokens kept of instruction and response together; the model's window if None.

    Raises:
      GradjaxError: if `max_length` is over the window, or as `mean_losses`.
    """

    def half(rows: float) -> None:
        done(rows / 2)

    whole, given = _with_instruction(model, examples, max_length, half)
    alone = [_response_alone(model, tokenized, max_length or model.window) for tokenized in whole]
    losses = zip(given, mean_losses(model, alone, half).tolist(), strict=True)
    return [
        _undefined(tokenized, _IFD_COLUMNS, loss) or _ifd(response, loss, loss_alone)
        for tokenized, response, (loss, loss_alone) in zip(whole, alone, losses, strict=True)
    ]


def score_perplexity(
    model: LanguageModel,
    examples: Sequence[Example],
    max_length: int | None = None,
    *,
    done: Done = nobody,
) -> list[Score]:
    """`loss`, the mean over the response's tokens given the instruction, its exponential
    `perplexity`, and the numbers of tokens, of each example.

    Undefined values, arguments and errors as of `score_ifd`.
    """
    whole, given = _with_instruction(model, examples, max_length, done)
    return [
        _undefined(tokenized, _PERPLEXITY_COLUMNS, loss) or _perplexity(tokenized, loss)
        for tokenized, loss in zip(whole, given, strict=True)
    ]


def _with_instruction(
    model: LanguageModel, examples: Sequence[Example], max_length: int | None, done: Done
) -> tuple[list[TokenizedExample], list[float]]:
    """Instruction and response as tokens, and the mean loss of the response, NaN without one."""
    if max_length is not None and max_length > model.window:
        raise GradjaxError(
            f"--max_length={max_length}: {model.name} takes at most {model.window} tokens: give "
            "that or less."
        )
    settings = TokenConfig(max_length=max_length or model.window)
    whole = [*tokenize_rows(examples, model.tokenizer, settings)]
    for i, example in enumerate(examples):
        if example.status == "ok" and not is_single_turn(example.messages):
            reason = f"{len(example.messages)} turns have no plain form"
            whole[i] = dataclasses.replace(whole[i], reason=reason)
    return whole, mean_losses(model, whole, done).tolist()


def _response_alone(
    model: LanguageModel, whole: TokenizedExample, max_length: int
) -> TokenizedExample:
    """The response on its own, with the tokenizer's special tokens; all but the first count."""
    if whole.status != "ok":
        return whole
    room = max_length - (whole.num_tokens - whole.num_target_tokens)
    encoded = model.tokenizer(whole.example.output, verbose=False).input_ids
    tokens = np.asarray(encoded, np.int32)[: room + 1]
    return dataclasses.replace(whole, tokens=tokens, targets=np.arange(len(tokens)) > 0)


def _undefined(whole: TokenizedExample, columns: tuple[str, ...], loss: float) -> Score | None:
    """The score of an example that has no loss given its instruction."""
    if whole.status != "ok":
        return Score(dict.fromkeys(columns), whole.status, whole.reason)
    if not math.isfinite(loss):
        reason = "the response's loss is NaN or infinite although all weights are finite"
        return Score(dict.fromkeys(columns), "non_finite", reason)
    return None


def _ifd(alone: TokenizedExample, loss: float, loss_alone: float) -> Score:
    above, below = _exp(loss), _exp(loss_alone)
    values: dict[str, float | None] = {
        "ifd": above / below if above and below else None,
        "ifd_loss_ratio": loss / loss_alone if 0 < loss_alone < math.inf else None,
        "perplexity_with_instruction": above,
        "perplexity_without_instruction": below,
    }
    if not alone.num_target_tokens:
        return Score(values, reason="the response alone has no token with one before it")
    if not math.isfinite(loss_alone):
        return Score(values, "non_finite", "the loss of the response alone is NaN or infinite")
    if values["ifd"] is None:
        return Score(values, reason=_TOO_LARGE)
    return Score(values, reason="the loss of the response alone is 0" if loss_alone == 0 else "")


def _perplexity(whole: TokenizedExample, loss: float) -> Score:
    lengths = (whole.num_tokens, whole.num_target_tokens)
    values: dict[str, float | None] = dict(
        zip(_PERPLEXITY_COLUMNS, (_exp(loss), loss, *lengths), strict=True)
    )
    return Score(values, reason="" if values["perplexity"] else _TOO_LARGE)


def _exp(loss: float) -> float | None:
    """The perplexity, or None if it is no finite float64."""
    return math.exp(loss) if loss < 709 else None
