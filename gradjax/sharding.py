"""Many devices: the mesh, where weights lie on it, and how a block's products are shared out.

A mesh has three axes. Every device holds its own examples of a batch, whichever axis it is on:
gradients of different examples never meet, so that attention, factors, spectra and cosines need no
communication at all. Weights are split along `fsdp` (gathered when they are used) and along
`tensor` (each device multiplies its part, for all examples of its tensor group, and activations
change hands instead). The functions below run inside `jax.shard_map`, and on whole weights they are
plain matrix products.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from gradjax.errors import GradjaxError
from gradjax.model.config import DecoderConfig
from gradjax.model.layers import linear, linear_transpose
from gradjax.model.parameters import Parameter, all_parameters

DATA, FSDP, TENSOR = AXES = ("data", "fsdp", "tensor")
# Rows of a batch: each device has its own.
EXAMPLES = PartitionSpec(AXES)
# Split columns of the examples of a tensor group.
GROUP = PartitionSpec((DATA, FSDP), None, TENSOR)
EVERYWHERE = PartitionSpec()
# Weight axis -> mesh axis. Vectors (norms, biases) are small and stay whole.
_RULES = {"D": FSDP, "V": TENSOR, "Q": TENSOR, "C": TENSOR, "F": TENSOR, "1": TENSOR}


def parse_mesh(text: str) -> dict[str, int]:
    """`data:4,fsdp:2` -> the size of every axis; those not named are 1.

    Raises:
      GradjaxError: if the text is not of this form.
    """
    part = rf"({'|'.join(AXES)}):([1-9]\d*)"
    sizes = dict.fromkeys(AXES, 1)
    named = re.findall(part, text)
    if not re.fullmatch(rf"{part}(,{part})*", text) or len(dict(named)) < len(named):
        raise GradjaxError(
            f"--mesh={text}: expected sizes of some of the axes {', '.join(AXES)}, each once, as "
            "in data:4,fsdp:2"
        )
    return sizes | {axis: int(size) for axis, size in named}


def make_mesh(sizes: dict[str, int], devices: Sequence[Any]) -> Mesh:
    """A mesh of the given axis sizes over as many devices.

    Raises:
      GradjaxError: if there are not exactly as many.
    """
    shape = [sizes.get(axis, 1) for axis in AXES]
    if np.prod(shape) != len(devices):
        wanted = ",".join(f"{axis}:{size}" for axis, size in zip(AXES, shape, strict=True))
        raise GradjaxError(
            f"--mesh={wanted} is for {np.prod(shape)} devices, and there are {len(devices)} "
            f"({devices[0].device_kind}); give sizes whose product is {len(devices)}"
        )
    return Mesh(np.asarray(devices).reshape(shape), AXES)


def one_device() -> Mesh:
    """The mesh of a program that uses the default device only."""
    return make_mesh({}, jax.local_devices()[:1])


def split_axes(
    sizes: Mapping[str, int], config: DecoderConfig, parameter: Parameter
) -> tuple[str | None, ...]:
    """The mesh axis that each axis of a weight is split along, None where it stays whole."""
    shape = parameter.shape(config)
    if len(shape) == 1:
        return (None,)
    axes = (_RULES[axis] for axis in parameter.axes)
    return tuple(
        axis if size % sizes[axis] == 0 else None for axis, size in zip(axes, shape, strict=True)
    )


def weight_spec(mesh: Mesh, config: DecoderConfig, parameter: Parameter) -> PartitionSpec:
    """Which mesh axis each axis of a weight is split along: none that does not divide it."""
    return PartitionSpec(*split_axes(mesh.shape, config, parameter))


def weight_sharding(mesh: Mesh, config: DecoderConfig, parameter: Parameter) -> NamedSharding:
    """Where the parts of a weight lie."""
    return NamedSharding(mesh, weight_spec(mesh, config, parameter))


def log_unsplit(mesh: Mesh, config: DecoderConfig) -> None:
    """Says which weight axes stay whole because a mesh axis does not divide them."""
    kinds = {(p.axes, p.shape(config)) for p in all_parameters(config).values()}
    sizes = {axis: n for axes, shape in kinds for axis, n in zip(axes, shape, strict=True)}
    for axis, size in sorted(sizes.items()):
        parts = mesh.shape[_RULES[axis]]
        if size % parts:
            logging.warning(
                "Weight axis %s of %d does not divide by %s:%d and stays whole on each device",
                axis,
                size,
                _RULES[axis],
                parts,
            )


def place_examples(mesh: Mesh, array: np.ndarray) -> jax.Array:
    """A batch's array [B, ...] on the mesh; each process places its devices' examples."""
    sharding = NamedSharding(mesh, EXAMPLES)
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def local_slots(mesh: Mesh, size: int) -> list[int]:
    """The examples of a batch of `size` that this process's devices hold, ascending."""
    places = NamedSharding(mesh, EXAMPLES).addressable_devices_indices_map((size,))
    parts = [index[0] for index in places.values() if index]
    return sorted(slot for part in parts for slot in range(*part.indices(size)))


def local_examples(array: jax.Array) -> np.ndarray:
    """This process's examples of an array [B, ...], as `local_slots` orders them."""
    if array.is_fully_addressable:
        return np.asarray(array)
    shards = sorted(array.addressable_shards, key=lambda shard: shard.index[0].start or 0)
    return np.concatenate([shard.data for shard in shards])


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
