"""Many devices: the mesh, and where examples and weights lie on it. Knows no model.

A mesh has three axes. Every device holds its own examples of a batch, whichever axis it is on:
gradients of different examples never meet, so that attention, factors, spectra and cosines need no
communication at all. Weights are split along `fsdp` and `tensor` (model/parallel.py).
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gradjax.errors import GradjaxError

DATA, FSDP, TENSOR = AXES = ("data", "fsdp", "tensor")
# Rows of a batch: each device has its own.
EXAMPLES = PartitionSpec(AXES)
# Split columns of the examples of a tensor group.
GROUP = PartitionSpec((DATA, FSDP), None, TENSOR)
EVERYWHERE = PartitionSpec()
# Weight axis -> mesh axes. Vectors (norms, biases) are small and stay whole, and so does the width
# of a table over V: gathered along it, a table would have to be transposed.
MESH_AXES = {
    "D": (FSDP,),
    "V": (FSDP, TENSOR),
    "Q": (TENSOR,),
    "C": (TENSOR,),
    "F": (TENSOR,),
    "H": (),
    "1": (TENSOR,),
}


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


def format_mesh(sizes: Mapping[str, int]) -> str:
    """What `parse_mesh` reads, all axes by name."""
    return ",".join(f"{axis}:{sizes.get(axis, 1)}" for axis in AXES)


def make_mesh(sizes: dict[str, int], devices: Sequence[Any]) -> Mesh:
    """A mesh of the given axis sizes over as many devices.

    Raises:
      GradjaxError: if there are not exactly as many.
    """
    shape = [sizes.get(axis, 1) for axis in AXES]
    if np.prod(shape) != len(devices):
        wanted = format_mesh(sizes)
        raise GradjaxError(
            f"--mesh={wanted} is for {np.prod(shape)} devices, and there are {len(devices)} "
            f"({devices[0].device_kind}); give sizes whose product is {len(devices)}"
        )
    return Mesh(np.asarray(devices).reshape(shape), AXES)


def one_device() -> Mesh:
    """The mesh of a program that uses the default device only."""
    return make_mesh({}, jax.local_devices()[:1])


def split_axes(
    sizes: Mapping[str, int], axes: Sequence[str], shape: Sequence[int]
) -> tuple[tuple[str, ...], ...]:
    """The mesh axes that each axis of a weight is split along, none where it stays whole.

    Args:
      sizes: of the mesh axes.
      axes: of the weight, letters of the legend in structs.py.
      shape: of the weight.
    """
    if len(shape) == 1:
        return ((),)
    split = {
        axis: along if size % math.prod(sizes[name] for name in along) == 0 else ()
        for axis, size, along in zip(axes, shape, map(MESH_AXES.__getitem__, axes), strict=True)
    }
    if split.get("V"):
        split["D"] = ()  # a table is split by rows, and along D only where those do not divide
    return tuple(split[axis] for axis in axes)


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


def platform() -> str:
    """`cpu`, `gpu` or `tpu`: what the program being traced is for, the mesh's or the default.

    Inside `jax.shard_map` the default backend says nothing: programs are also compiled for
    devices that this machine lacks.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.platform if device else jax.default_backend()
