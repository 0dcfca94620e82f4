"""The programs of a run with abstract arguments: what can be compiled without a device.

The one list of them: plans and benchmarks/deviceless.py compile it for TPUs and GPUs, tests lower
it and compare plans with it.
"""

import dataclasses
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.stages import Lowered
from jax.typing import DTypeLike

from gradjax.gradients import dense, factored
from gradjax.gradients.factored import HEAD_CHUNKS
from gradjax.model.attention import CHUNKS
from gradjax.model.config import DecoderConfig
from gradjax.model.decoder import BlockActivations, Decoder, layer_windows
from gradjax.model.layers import rope_tables
from gradjax.model.parallel import abstract_weights
from gradjax.sharding import DATA, EVERYWHERE, EXAMPLES
from gradjax.spectra import measures
from gradjax.spectra.batch import dense_singular_values
from gradjax.spectra.decompose import (
    allowed_routes,
    device_values,
    row_operand,
    row_product,
    row_triangle,
)
from gradjax.spectra.singular_values import PANEL
from gradjax.structs import ATTENTION, Projection

# What each device computes of its own examples, without any other.
PER_EXAMPLE = ("mask_factors", "form_gradients", "entry_measures", "cosine")


@dataclasses.dataclass(frozen=True)
class Program:
    """A jitted function and what a run calls it with."""

    function: Any  # of jax.jit
    arguments: tuple[Any, ...]  # static ones, and trees of ShapeDtypeStruct on the mesh
    part: Literal["passes", "spectra", "dense"] = "passes"  # of the work
    calls: int = 1  # in a batch
    float64: bool = False
    # Mean number of turns of loops whose length the compiler does not know.
    turns: float = 1.0

    def results(self) -> Any:
        """The shapes of what it returns."""
        return self.function.trace(*self.arguments).out_info

    def lower(self, platform: str | None = None) -> Lowered:
        """For a platform (`tpu`, `cuda`, `cpu`); for that of the mesh's devices if None."""
        with jax.enable_x64(self.float64), jax.default_matmul_precision("highest"):
            traced = self.function.trace(*self.arguments)
            return traced.lower(lowering_platforms=(platform,) if platform else None)


def programs(
    config: DecoderConfig,
    mesh: Mesh,
    rows: int,
    length: int,
    dtype: DTypeLike = jnp.float32,
    platform: str | None = None,
    projections: tuple[Projection, ...] = ATTENTION,
) -> dict[str, Program]:
    """Every program that a batch [rows, length] may take, by name.

    Args:
      rows: of all devices together.
      platform: `cpu`, `gpu` or `tpu`, whose routes to singular values are taken; that of the
        mesh's devices if None.
      projections: whose gradients are measured.
    """
    platform = platform or str(mesh.devices.flat[0].platform)
    decoder = abstract_decoder(config, mesh, dtype)
    block, layers = decoder.blocks[0], config.num_layers

    def array(*shape: int, dtype: DTypeLike = dtype, spec: PartitionSpec = EXAMPLES) -> Any:
        sharding = NamedSharding(mesh, spec)
        return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=sharding)

    def place(tree: Any, spec: PartitionSpec = EXAMPLES) -> Any:
        return jax.tree.map(lambda x: array(*x.shape, dtype=x.dtype, spec=spec), tree)

    tokens = array(rows, length, dtype=jnp.int32)
    mask = array(rows, length, dtype=jnp.bool_)
    masks = dict.fromkeys(projections, mask)
    x = array(rows, length, config.hidden_size)
    rope = array(2, length, config.head_dim // 2, dtype=jnp.float32, spec=EVERYWHERE)
    window = layer_windows(config, length)[0]
    embedding = decoder.embedding.get_value()
    table = embedding if config.tied_embeddings else decoder.head.get_value()
    final = decoder.final_norm.get_value()

    forward = Program(factored.block_forward_on_mesh, (mesh, config, block, x, rope, window))
    kept = forward.results()[1]
    specs: Any = factored.activation_specs(mesh, config)
    kept = BlockActivations(*map(place, kept, specs))
    backward = Program(
        factored.block_backward_on_mesh, (mesh, config, projections, block, kept, x, rope, window)
    )
    factors = place(backward.results()[1])
    formed = Program(measures.form_gradients, (factors, projections))
    gradients, scales = place(formed.results())
    angles = jax.jit(
        rope_tables,
        static_argnums=(0, 1),
        out_shardings=NamedSharding(mesh, EVERYWHERE),
    )
    head = (mesh, config, final, table, x, tokens, mask)
    # As if all tokens were targets.
    head_chunks = -(-rows * length // mesh.size // HEAD_CHUNKS[platform])

    per_layer = partial(Program, calls=layers)
    chunks = -(-length // CHUNKS[platform])
    through_block = partial(per_layer, turns=(chunks - 1) / 2)  # key chunks before a query chunk
    widest = max(projections, key=lambda projection: gradients[projection].size)
    # Two within a layer, and of each projection with the layer above.
    cosines = (2 + len(projections)) * layers
    found = {
        "rope_tables": Program(angles, (config, length)),
        "embed": Program(factored.embed_on_mesh, (mesh, config, embedding, tokens)),
        "block_forward": through_block(forward.function, forward.arguments),
        "head": Program(factored.head_on_mesh, head, turns=head_chunks),
        "block_backward": through_block(backward.function, backward.arguments),
        "mask_factors": per_layer(factored.mask_factors, (factors, masks)),
        "form_gradients": per_layer(formed.function, formed.arguments),
        "entry_measures": per_layer(measures.entry_measures, (gradients, scales)),
        # The largest of a layer's cosines: two within it, four with the layer above.
        "cosine": Program(measures.cosine, (gradients[widest], gradients[widest]), calls=cosines),
    }
    if "gram" in allowed_routes(platform):
        gram = (mesh, projections, factors, (gradients, scales))
        found["spectra_gram"] = per_layer(device_values, gram, "spectra", float64=True)
    # Of each row X and Δ of all projections, or the gradients that are not square.
    matrices = [array for array in factors if array is not None]
    if length > config.hidden_size:
        matrices = [g for g in gradients.values() if g.shape[1] != g.shape[2]] or [
            *gradients.values()
        ]
    matrix, each = max(matrices, key=lambda matrix: matrix.size), len(matrices)
    of_rows = partial(Program, part="spectra", calls=each * layers * rows // mesh.size)
    operand = of_rows(row_operand, (mesh, matrix, None, 0))
    unit = place(operand.results()[0])
    panels = -(-min(matrix.shape[1:]) // PANEL)
    triangle = of_rows(row_triangle, (mesh, unit, panels), turns=panels)
    core = place(triangle.results())
    found |= {
        "spectra_qr_operand": operand,
        "spectra_qr_triangle": triangle,
        "spectra_qr_product": of_rows(row_product, (mesh, core, core)),
    }
    if mesh.size == mesh.shape[DATA]:  # it needs all weights on each device
        arguments = (decoder, tokens, mask, tuple(range(layers)), projections)
        found["dense_gradients"] = Program(dense.dense_gradients, arguments, "dense")
    arguments = (mesh, gradients[widest])
    found["spectra_dense"] = per_layer(dense_singular_values, arguments, "dense")
    return found


def abstract_decoder(config: DecoderConfig, mesh: Mesh, dtype: DTypeLike) -> Decoder:
    """A decoder whose weights are shapes on a mesh."""
    return Decoder(config, abstract_weights(config, mesh, dtype), mesh)
