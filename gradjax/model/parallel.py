"""A block's products over a mesh: weights split by column or by row, as in tensor parallelism.

Weights are split along `fsdp` (gathered when they are used) and along `tensor` (each device
multiplies its part, for all examples of its tensor group, and activations change hands instead).
Tables over the vocabulary are split along both by rows: the head is gathered, and of the embedding
the rows of tokens change hands. Where rows do not divide they are split along `fsdp` by columns,
and gathered. The products run inside `jax.shard_map`, and on whole weights they
are plain matrix products.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from absl import logging
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from gradjax.model.config import DecoderConfig
from gradjax.model.layers import linear, linear_transpose
from gradjax.model.parameters import Parameter, all_parameters
from gradjax.sharding import MESH_AXES, TENSOR, split_axes


def weight_spec(mesh: Mesh, config: DecoderConfig, parameter: Parameter) -> PartitionSpec:
    """Which mesh axes each axis of a weight is split along: none that do not divide it."""
    split = split_axes(mesh.shape, parameter.axes, parameter.shape(config))
    return PartitionSpec(*(mesh_axes or None for mesh_axes in split))


def weight_sharding(mesh: Mesh, config: DecoderConfig, parameter: Parameter) -> NamedSharding:
    """Where the parts of a weight lie."""
    return NamedSharding(mesh, weight_spec(mesh, config, parameter))


def abstract_weights(
    config: DecoderConfig, mesh: Mesh, dtype: DTypeLike
) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes of a model's weights by path, and where their parts lie."""
    return {
        path: jax.ShapeDtypeStruct(
            parameter.shape(config),
            jnp.dtype(dtype),
            sharding=weight_sharding(mesh, config, parameter),
        )
        for path, parameter in all_parameters(config).items()
    }


def log_unsplit(mesh: Mesh, config: DecoderConfig) -> None:
    """Says which weight axes stay whole because a mesh axis does not divide them."""
    kinds = {(p.axes, p.shape(config)) for p in all_parameters(config).values()}
    sizes = {axis: n for axes, shape in kinds for axis, n in zip(axes, shape, strict=True)}
    for axis, size in sorted(sizes.items()):
        parts = {mesh_axis: mesh.shape[mesh_axis] for mesh_axis in MESH_AXES[axis]}
        if size % math.prod(parts.values()):
            logging.warning(
                "Weight axis %s of %d does not divide by %s and stays whole on each device",
                axis,
                size,
                " times ".join(f"{mesh_axis}:{n}" for mesh_axis, n in parts.items()),
            )


@dataclasses.dataclass(frozen=True)
class Matrix:
    """One of a block's matrices between the stream and some split axis, as a device holds it."""

    weight: Float[Array, "..."]  # the stream's axis is whole
    stream_axis: int  # 1: (out, in) with the stream as input; 0: as output
    split: bool  # whether the other axis is this device's part only


def matrix(weight: Array, parameter: Parameter, config: DecoderConfig) -> Matrix:
    """A block's weight for use, its parts along `fsdp` gathered."""
    axis = parameter.axes.index("D")
    shape = parameter.shape(config)
    whole = _whole(weight, axis, shape[axis], MESH_AXES["D"])
    return Matrix(whole, axis, weight.shape[1 - axis] != shape[1 - axis])


def whole_table(config: DecoderConfig, table: Float[Array, "_rows _width"]) -> Float[Array, "V D"]:
    """The embedding table or output head, gathered."""
    rows = _whole(table, 0, config.vocab_size, MESH_AXES["V"])
    return _whole(rows, 1, config.hidden_size, MESH_AXES["D"])


def table_rows(
    config: DecoderConfig, table: Float[Array, "_rows _width"], tokens: Int[Array, "B T"]
) -> Float[Array, "B T D"]:
    """The table's rows of own tokens: where it is split, of whichever device holds them.

    Exact: every other device of the group adds zeros. In as many turns as there are devices, so
    that what changes hands at a time is no larger than the result.
    """
    if len(table) == config.vocab_size:
        return jnp.take(whole_table(config, table), tokens, axis=0)
    group = MESH_AXES["V"]
    first = jax.lax.axis_index(group) * len(table)

    def turn(tokens: Int[Array, " _n"]) -> Float[Array, "_n D"]:
        local = jax.lax.all_gather(tokens, group, tiled=True) - first
        held = (local >= 0) & (local < len(table))
        rows = jnp.where(held[:, None], jnp.take(table, local, axis=0, mode="clip"), 0)
        return jax.lax.psum_scatter(rows, group, tiled=True)

    devices = config.vocab_size // len(table)
    turns = jnp.pad(tokens.reshape(-1), (0, -tokens.size % devices)).reshape(devices, -1)
    rows = jax.lax.map(turn, turns).reshape(-1, table.shape[1])
    return rows[: tokens.size].reshape(*tokens.shape, -1)


def from_stream(x: Float[Array, "B T D"], *matrices: Matrix) -> list[Float[Array, "_B T _part"]]:
    """The product of own examples with each matrix: where split, own columns of the group's."""
    group = x
    if any(matrix.split for matrix in matrices):
        group = jax.lax.all_gather(x, TENSOR, axis=0, tiled=True)
    return [_product(group if m.split else x, m, m.stream_axis == 1) for m in matrices]


def to_stream(*pairs: tuple[Float[Array, "_B T _part"], Matrix]) -> Float[Array, "B T D"]:
    """The sum of products back to the stream's width, of own examples."""
    whole = [_product(y, m, m.stream_axis == 0) for y, m in pairs if not m.split]
    parts = [_product(y, m, m.stream_axis == 0) for y, m in pairs if m.split]
    if parts:
        whole.append(jax.lax.psum_scatter(sum(parts[1:], parts[0]), TENSOR, tiled=True))
    return sum(whole[1:], whole[0])


def own_examples(y: Float[Array, "_B T _part"], matrix: Matrix) -> Float[Array, "B T W"]:
    """All columns of own examples, from own columns of the group's."""
    if not matrix.split:
        return y
    return jax.lax.all_to_all(y, TENSOR, split_axis=0, concat_axis=2, tiled=True)


def own_columns(y: Float[Array, "B T W"], matrix: Matrix) -> Float[Array, "_B T _part"]:
    """The reverse of `own_examples`."""
    if not matrix.split:
        return y
    return jax.lax.all_to_all(y, TENSOR, split_axis=2, concat_axis=0, tiled=True)


def _product(x: Array, matrix: Matrix, weight_is_out_in: bool) -> Array:
    return (linear if weight_is_out_in else linear_transpose)(x, matrix.weight)


def _whole(weight: Array, axis: int, size: int, mesh_axes: tuple[str, ...]) -> Array:
    if weight.shape[axis] == size:
        return weight
    return jax.lax.all_gather(weight, mesh_axes, axis=axis, tiled=True)
