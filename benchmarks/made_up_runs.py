"""Runs whose numbers are given, written through the store itself."""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import gradjax
from gradjax.storage.store import open_store
from gradjax.structs import (
    ATTENTION,
    SAME_LAYER_PAIRS,
    Example,
    ExampleResult,
    Similarity,
    Spectrum,
    TokenizedExample,
)

SIDES = (13, 17)  # of every gradient
Numbers = Sequence[float] | np.ndarray


@dataclasses.dataclass(frozen=True)
class Group:
    """A group's rows: tokens, and what their nuclear norms and effective ranks are about."""

    target: Numbers
    prompt: Numbers
    norms: Numbers
    ranks: Numbers
    empty: int = 0  # rows without a response, after the others


def write_run(
    directory: Path,
    groups: dict[str, Group],
    *,
    layers: int = 3,
    target_tokens: int | None = None,
    singular_values: int = 5,
    **manifest: Any,
) -> Path:
    """Writes a finished run; `manifest` replaces what it says otherwise."""
    settings = {
        "model": "sha256:made up",
        "layers": list(range(layers)),
        "projections": list(ATTENTION),
        "target_tokens": target_tokens,
        "store_singular_values": True,
    }
    with open_store(directory, settings) as store:
        store.write_manifest(
            {
                "settings": settings,
                "model": {"name": "made-up"},
                "data": {n: {"rows": len(g.target) + g.empty} for n, g in groups.items()},
                "gradient_shapes": dict.fromkeys(ATTENTION, SIDES),
                "versions": {"gradjax": gradjax.__version__},
                **manifest,
            }
        )
        for name, group in groups.items():
            store.append(_results(name, group, layers, singular_values))
    return directory


def _results(name: str, group: Group, layers: int, values: int) -> Iterator[ExampleResult]:
    rng = np.random.default_rng(len(name))
    rows = zip(group.target, group.prompt, group.norms, group.ranks, strict=True)
    for number, (target, prompt, norm, rank) in enumerate(rows):
        tokenized = _tokenized(name, number, int(prompt), int(target))
        spectra = tuple(
            _spectrum(layer, projection, norm, rank, values, rng)
            for layer in range(layers)
            for projection in ATTENTION
        )
        same = [(f"{a}-{b}", i, i) for i in range(layers) for a, b in SAME_LAYER_PAIRS]
        cross = [(p, i, i + 1) for i in range(layers - 1) for p in ATTENTION]
        similarity = (
            *(Similarity("same_layer", *pair, rng.normal(scale=0.01)) for pair in same),
            *(Similarity("cross_layer", *pair, rng.normal(scale=0.01)) for pair in cross),
        )
        yield ExampleResult(tokenized, "ok", "", float(norm) * 2, spectra, similarity)
    for number in range(len(group.target), len(group.target) + group.empty):
        tokenized = dataclasses.replace(_tokenized(name, number, 5, 0), status="empty_response")
        yield ExampleResult(tokenized, "empty_response", "the response is empty")


def _tokenized(name: str, number: int, prompt: int, target: int) -> TokenizedExample:
    example = Example(name, number, f"hash {number}", f"<b>{name}</b> {number}?", "σ" * target)
    tokens = np.zeros(prompt + target, np.int32)
    return TokenizedExample(example, tokens, np.arange(prompt + target) >= prompt)


def _spectrum(
    layer: int, projection: Any, norm: float, rank: float, values: int, rng: np.random.Generator
) -> Spectrum:
    factor = (1 + layer / 7) * (1 + ATTENTION.index(projection) / 5)
    return Spectrum(
        layer,
        projection,
        nuclear_norm=float(norm * factor),
        effective_rank=float(rank * factor),
        frobenius_norm=float(norm),
        spectral_norm=float(norm),
        mean=0.0,
        max=1.0,
        min=-1.0,
        singular_values=np.sort(rng.random(values).astype(np.float32))[::-1],
    )
