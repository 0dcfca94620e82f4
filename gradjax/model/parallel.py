"""A block's products over a mesh: weights split by column or by row, as in tensor parallelism.

Weights are split along `fsdp` (gathered when they are used) and along `tensor` (each device
multiplies its part, for all examples of its tensor group, and activations change hands instead).
The products run inside `jax.shard_map`, and on whole weights they are plain matrix products.
"""

import dataclasses

import jax
from absl import logging
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from gradjax.model.config import DecoderConfig
from gradjax.model.layers import linear, linear_transpose
from gradjax.model.parameters import Parameter, all_parameters
from gradjax.sharding import FSDP, MESH_AXES, TENSOR, split_axes


def weight_spec(mesh: Mesh, config: DecoderConfig, parameter: Parameter) -> PartitionSpec:
    """Which mesh axis each axis of a weight is split along: none that does not divide it."""
    return PartitionSpec(*split_axes(mesh.shape, parameter.axes, parameter.shape(config)))


def weight_sharding(mesh: Mesh, config: DecoderConfig, parameter: Parameter) -> NamedSharding:
    """Where the parts of a weight lie."""
    return NamedSharding(mesh, weight_spec(mesh, config, parameter))


def log_unsplit(mesh: Mesh, config: DecoderConfig) -> None:
    """Says which weight axes stay whole because a mesh axis does not divide them."""
    kinds = {(p.axes, p.shape(config)) for p in all_parameters(config).values()}
    sizes = {axis: n for axes, shape in kinds for axis, n in zip(axes, shape, strict=True)}
    for axis, size in sorted(sizes.items()):
        parts = mesh.shape[MESH_AXES[axis]]
        if size % parts:
            logging.warning(
                "Weight axis %s of %d does not divide by %s:%d and stays whole on each device",
                axis,
                size,
                MESH_AXES[axis],
                parts,
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
    return Matrix(
        _whole(weight, axis, shape[axis], FSDP), axis, weight.shape[1 - axis] != shape[1 - axis]
    )


def whole_table(config: DecoderConfig, table: Float[Array, "..."]) -> Float[Array, "V D"]:
    """The embedding table or output head, gathered."""
    return _whole(_whole(table, 1, config.hidden_size, FSDP), 0, config.vocab_size, TENSOR)


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


def _whole(weight: Array, axis: int, size: int, mesh_axis: str) -> Array:
    if weight.shape[axis] == size:
        return weight
    return jax.lax.all_gather(weight, mesh_axis, axis=axis, tiled=True)
