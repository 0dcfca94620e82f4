"""The plain reading of the method: one `jax.grad` per example, gradients as whole matrices.

What the factored path is checked against, and `--spectrum=dense`.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from gradjax.model import decoder
from gradjax.model.decoder import Decoder
from gradjax.sharding import EVERYWHERE, EXAMPLES
from gradjax.structs import Projection

# layer -> projection -> the array, a pytree
AttentionWeights = dict[int, dict[Projection, Array]]


def attention_weights(
    model: Decoder, layers: tuple[int, ...], projections: tuple[Projection, ...]
) -> AttentionWeights:
    """The matrices that gradients are taken of, each [O, I]."""
    return {i: {p: getattr(model.blocks[i], p)[...] for p in projections} for i in layers}


@partial(jax.jit, static_argnames=("layers", "projections", "chunk"))
def dense_gradients(
    model: Decoder,
    tokens: Int[Array, "B T"],
    targets: Bool[Array, "B T"],
    layers: tuple[int, ...],
    projections: tuple[Projection, ...],
    chunk: int = 1,
) -> tuple[Float[Array, " B"], AttentionWeights]:
    """Losses, and the gradient of each example's loss: arrays [B, O, I].

    Each device of the model's mesh, which must hold all weights, works on its own examples, of
    which `chunk` are vmapped at a time.
    """

    def own(model: Decoder, tokens: Array, targets: Array) -> tuple[Array, AttentionWeights]:
        def one(example: tuple[Array, Array]) -> tuple[Array, AttentionWeights]:
            loss = partial(example_loss, model, tokens=example[0], targets=example[1])
            return jax.value_and_grad(loss)(attention_weights(model, layers, projections))

        return jax.lax.map(one, (tokens, targets), batch_size=chunk)

    in_specs = (EVERYWHERE, EXAMPLES, EXAMPLES)
    on_mesh = jax.shard_map(
        own, mesh=model.mesh, in_specs=in_specs, out_specs=EXAMPLES, check_vma=False
    )
    return on_mesh(model, tokens, targets)


def example_loss(
    model: Decoder,
    weights: AttentionWeights,
    tokens: Int[Array, " T"],
    targets: Bool[Array, " T"],
) -> Float[Array, ""]:
    """Mean loss over the target tokens (paper, eq. 1), with `weights` in the model's place."""
    replaced = jax.tree.map(lambda leaf: leaf, model)  # a new container over the same arrays
    for layer, matrices in weights.items():
        for projection, matrix in matrices.items():
            getattr(replaced.blocks[layer], projection)[...] = matrix
    x = decoder.hidden_states(replaced, tokens[None])
    scores = decoder.project_logits(
        model.config, model.final_norm[...], model.output_table, x[0, :-1]
    )
    terms = decoder.token_losses(scores, tokens[1:])
    predicts = targets[1:]
    count = jnp.maximum(predicts.sum(), 1).astype(terms.dtype)
    return jnp.where(predicts, terms, 0).sum() / count
