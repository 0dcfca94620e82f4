"""Which tokens a gradient is a sum over: known from targets and causality, before any number is.

In exact arithmetic every other token has a zero cotangent. What a processor computes for it may be
zero or a rounding error of 1e-7, which would be one more singular value: so it is never looked at.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool

from gradjax.structs import Projection

# projection -> whether a token contributes to its gradient, each [B, T]
Contributing = dict[Projection, Bool[np.ndarray, "B T"]]


def contributing_tokens(
    targets: Bool[np.ndarray, "B T"], windows: Sequence[int | None]
) -> list[Contributing]:
    """The tokens whose cotangents are not zero by causality, per layer.

    The token before a target predicts it. What the top layer gives for other tokens goes nowhere;
    a layer below matters where the layers above look at it. A query that sees one token only gives
    it the weight 1, whatever its score is: its q and the k that it sees have no gradient of it.

    Args:
      targets: true at the tokens that the loss is the mean over.
      windows: tokens that each layer's attention sees, itself included, [L]; None: all.

    Returns:
      One entry per layer, from the first.
    """
    needed = np.zeros_like(targets)  # tokens whose output of the layer reaches the loss
    needed[:, :-1] = targets[:, 1:]
    layers: list[Contributing] = []
    for window in reversed([window or targets.shape[1] for window in windows]):
        choosing = needed.copy()  # queries with more than one token to see
        choosing[:, : 1 if window > 1 else None] = False
        seen = _seen(needed, window)
        attention: Contributing = {"q": choosing, "k": _seen(choosing, window), "v": seen}
        layers.append(attention | dict.fromkeys(("o", "gate", "up", "down"), needed))
        needed = seen
    return layers[::-1]


def _seen(queries: Bool[np.ndarray, "B T"], window: int) -> Bool[np.ndarray, "B T"]:
    """The tokens that some of the queries see: themselves and the `window - 1` before them."""
    length = queries.shape[1]
    before = np.pad(queries.cumsum(axis=1), ((0, 0), (1, 0)))  # queries before each token
    end = np.minimum(np.arange(length) + window, length)
    return before[:, end] > before[:, :-1]
