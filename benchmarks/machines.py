"""Which machine for which model: memory per device as `--plan` works it out, from shapes alone.

  python -m benchmarks.machines

One row of 4,096 tokens per device, adjacent similarities, block inputs kept; `devices` is the least
number, in powers of two, over which `--mesh=fsdp:N` fits a device of so many GB.
"""

from benchmarks.shapes import shape_config
from gradjax.checkpoints.resolve import REGISTRY
from gradjax.config import SpectraConfig
from gradjax.data.batches import BatchSpec
from gradjax.model.config import DecoderConfig
from gradjax.runs.cost import Memory, batch_memory
from gradjax.sharding import parse_mesh

TOKENS = 4096
DEVICES_GB = (16, 80, 141)


def needed(model: DecoderConfig, itemsize: int, devices: int) -> Memory:
    """Memory per device of a batch with one row on each."""
    batch = BatchSpec(tuple(range(devices)), TOKENS, devices)
    mesh = parse_mesh(f"fsdp:{devices}")
    config = SpectraConfig()
    return batch_memory(model, config, batch, itemsize, mesh, "gpu", keep_activations=False)


def fewest_devices(model: DecoderConfig, itemsize: int, gigabytes: int) -> str:
    """The least number of devices, 9 tenths of whose memory JAX may use."""
    for devices in (1, 2, 4, 8, 16, 32, 64, 128):
        if needed(model, itemsize, devices).total <= 0.9 * gigabytes * 1e9:
            return str(devices)
    return "–"


def main() -> None:
    """Prints the table as Markdown."""
    heads = [f"{size} GB" for size in DEVICES_GB]
    print(f"| model | dtype | weights | one device in all | {' | '.join(heads)} |")
    print(f"|---|---|--:|--:|{'--:|' * len(heads)}")
    for name in dict.fromkeys(name.removesuffix("_instruct") for name in REGISTRY):
        model = shape_config(name)
        for dtype, itemsize in (("float32", 4), ("bfloat16", 2)):
            memory = needed(model, itemsize, devices=1)
            counts = [fewest_devices(model, itemsize, size) for size in DEVICES_GB]
            print(
                f"| {name} | {dtype} | {memory.weights / 2**30:.1f} GiB"
                f" | {memory.total / 2**30:.1f} GiB | {' | '.join(counts)} |"
            )


if __name__ == "__main__":
    main()
