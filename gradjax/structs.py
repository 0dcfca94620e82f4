"""The values that flow through gradjax, and the one legend of axis names.

Axis legend (used in shapes, einsums and the weight table):

  B  examples in a batch          N  query heads
  T  tokens (as queries)          K  key/value heads
  S  tokens (as keys)             G  query heads per key/value head, N // K
  D  model width (hidden size)    H  width of one head
  F  MLP width                    V  vocabulary
  L  layers                       P  projections
  Q  N * H, joined query heads    C  K * H, joined key/value heads
  O  rows of a gradient (outputs of the projection)
  I  columns of a gradient (inputs of the projection)
  R  singular values kept, min(tokens that contribute, O, I)
  W  a width that the text names
  Bg examples of a tensor group (sharding.py)

Gradients have PyTorch's orientation (out, in): `G = Δᵀ X`.
"""

import dataclasses
import json
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import numpy as np

if TYPE_CHECKING:
    import jax  # flags and their help need the names of this file, and nothing of JAX

Projection = Literal["q", "k", "v", "o", "gate", "up", "down"]
PROJECTIONS: tuple[Projection, ...] = get_args(Projection)
# What the paper measures, and what is measured unless others are named.
ATTENTION: tuple[Projection, ...] = ("q", "k", "v", "o")
# The projections' inputs, as fields of `Factors`.
INPUTS: dict[Projection, str] = {
    "q": "x_qkv",
    "k": "x_qkv",
    "v": "x_qkv",
    "o": "x_o",
    "gate": "x_mlp",
    "up": "x_mlp",
    "down": "x_down",
}
# Same-layer pairs of the paper (eq. 3), named as in the store.
SAME_LAYER_PAIRS: tuple[tuple[Projection, Projection], ...] = (("q", "o"), ("k", "v"))

Status = Literal[
    "ok",
    "no_target_tokens",
    "empty_response",
    "invalid_row",
    "too_long",
    "too_short",
    "non_finite",
]
# Of rows that a gradient was asked of.
COMPUTED: tuple[Status, ...] = ("ok", "non_finite")


_EXTRA_TEXTS = ("tool_calls", "reasoning_content", "thinking")


@dataclasses.dataclass(frozen=True)
class Message:
    """One turn of a conversation; roles are `system`, `user`, `assistant` and `tool`."""

    role: str
    content: str
    extra: str = ""  # JSON of what else a turn has, for chat templates

    @property
    def extra_texts(self) -> dict[str, Any]:
        """What the turn says beside its content: tool calls and thoughts, by key."""
        extra = json.loads(self.extra) if self.extra else {}
        return {key: extra[key] for key in _EXTRA_TEXTS if extra.get(key)}

    def to_dict(self) -> dict[str, Any]:
        """The turn as chat templates and data sets have it."""
        extra = json.loads(self.extra) if self.extra else {}
        return {**extra, "role": self.role, "content": self.content}


@dataclasses.dataclass(frozen=True, slots=True)  # there may be millions
class Example:
    """One input row.

    `instruction` includes a row's `input` (after a newline, as in the paper). A row
    that cannot be used keeps its place with a status other than `ok` and a reason.
    """

    group: str
    example_id: int  # row number in its source, from 0
    row_hash: str  # of the row as it stands in the source
    instruction: str = ""
    output: str = ""
    messages: tuple[Message, ...] = ()  # the turns in order; empty for an unusable row
    ignored: tuple[str, ...] = ()  # columns of the row that were not read
    status: Status = "ok"
    reason: str = ""

    @property
    def key(self) -> tuple[str, int]:
        """What the row is called in a store."""
        return self.group, self.example_id


@dataclasses.dataclass(frozen=True, slots=True)
class TokenizedExample:
    """An example as token ids, with the tokens that the loss is taken over marked."""

    example: Example
    tokens: np.ndarray  # int32 [T]
    targets: np.ndarray  # bool [T]; true where the token is part of a response
    truncated: bool = False
    status: Status = "ok"
    reason: str = ""

    @property
    def num_tokens(self) -> int:
        """Tokens kept, prompt and response together."""
        return len(self.tokens)

    @property
    def num_target_tokens(self) -> int:
        """Tokens that the loss is the mean over."""
        return int(self.targets.sum())


@dataclasses.dataclass(frozen=True)
class TokenBatch:
    """Examples of similar length, padded on the right to one shape.

    `rows` are positions in the list that was batched; slots beyond `len(rows)` are
    filler without target tokens. Padding carries no loss and, the decoder being causal,
    reaches no real token, so a row's numbers do not depend on the rest of its batch.
    """

    rows: tuple[int, ...]
    tokens: np.ndarray  # int32 [B, T]
    targets: np.ndarray  # bool [B, T]
    lengths: np.ndarray  # int32 [B]; 0 for filler


class Factors(NamedTuple):
    """What one layer's gradients are made of: `G = Δᵀ X` per projection and example.

    q, k and v share their input, and so do gate and up. None: not asked for, and no leaf of the
    tree that JAX sees.
    """

    x_qkv: "jax.Array | None" = None  # [B, T, D] input of q, k and v
    x_o: "jax.Array | None" = None  # [B, T, Q] input of o
    x_mlp: "jax.Array | None" = None  # [B, T, D] input of gate and up
    x_down: "jax.Array | None" = None  # [B, T, F] input of down
    q: "jax.Array | None" = None  # [B, T, Q] cotangent of q's output
    k: "jax.Array | None" = None  # [B, T, C]
    v: "jax.Array | None" = None  # [B, T, C]
    o: "jax.Array | None" = None  # [B, T, D]
    gate: "jax.Array | None" = None  # [B, T, F]
    up: "jax.Array | None" = None  # [B, T, F]
    down: "jax.Array | None" = None  # [B, T, D]

    def of(self, projection: Projection) -> "tuple[jax.Array, jax.Array]":
        """(X [B, T, I], Δ [B, T, O]) of one projection that was asked for."""
        return getattr(self, INPUTS[projection]), getattr(self, projection)

    @property
    def batch_shape(self) -> tuple[int, int]:
        """B and T."""
        rows, tokens, _ = next(array for array in self if array is not None).shape
        return rows, tokens


def factor_names(projections: tuple[Projection, ...]) -> set[str]:
    """The fields of `Factors` that projections have."""
    return {*projections, *(INPUTS[projection] for projection in projections)}


def sharing_inputs(projections: tuple[Projection, ...]) -> list[tuple[Projection, ...]]:
    """The projections by their input, in order."""
    groups: dict[str, tuple[Projection, ...]] = {}
    for projection in projections:
        name = INPUTS[projection]
        groups[name] = (*groups.get(name, ()), projection)
    return list(groups.values())


@dataclasses.dataclass(frozen=True)
class Spectrum:
    """One example's gradient in one projection of one layer: a row of `spectra/`.

    A zero gradient has nuclear norm 0 and no effective rank.
    """

    layer: int
    projection: Projection
    nuclear_norm: float
    effective_rank: float | None
    frobenius_norm: float
    spectral_norm: float
    mean: float  # of the gradient's entries, as are max and min
    max: float
    min: float
    singular_values: np.ndarray  # [R] descending, at least one; further ones are zero


@dataclasses.dataclass(frozen=True)
class Similarity:
    """The cosine of two of an example's gradients: a row of `similarity/`.

    None where either gradient is zero.
    """

    kind: Literal["same_layer", "cross_layer"]
    projection: str  # `q-o` and `k-v` in one layer; q, k, v or o across layers
    layer_a: int
    layer_b: int
    cosine: float | None


@dataclasses.dataclass(frozen=True)
class ExampleResult:
    """What a run says about one example. Only `ok` examples have a loss and spectra."""

    tokenized: TokenizedExample
    status: Status
    reason: str = ""
    loss: float | None = None
    spectra: tuple[Spectrum, ...] = ()
    similarity: tuple[Similarity, ...] = ()
