"""Spectra of the gradients that single fine-tuning examples induce in a model's attention.

Loads a Qwen2.5, Llama 3 or Gemma 2 checkpoint, computes for every row of the data the gradient
of its loss in the q, k, v and o matrices, and stores singular values, nuclear norm, effective
rank and cosines as Parquet tables. Called again with the same flags it goes on where it stopped.

  python -m gradjax.main
  python -m gradjax.main --model=gemma2_2b --data=good=high.json --data=bad=low.json
  python -m gradjax.main --flagfile=configs/qwen2.5_1.5b.flags --data=rows.jsonl --limit=10
"""

from pathlib import Path
from typing import get_args

from absl import flags

from gradjax import config
from gradjax.structs import PROJECTIONS

MODEL = "registered name (gemma2_2b), Hub repo (google/gemma-2-2b) or local directory"
DATA = """[GROUP=]SOURCE, repeatable. SOURCE: a .json, .jsonl or .parquet file, a saved datasets
directory, a Hub data set (ORG/NAME), one of gradjax.prepare --list, or demo.
GROUP: the file's stem if not given"""
OUTPUT_DIR = """the store's directory; a run that stopped there goes on (default: runs/{model},
runs/demo for the embedded model)"""
PROMPT_FORMAT = """plain: instruction, newline, output, as in the paper; chat: the tokenizer's
template, loss on every assistant turn"""
TRUNCATION = "rows beyond --max_length: cut (right), leave out (drop) or stop (error)"
TARGET_TOKENS = "cut every response to its first N tokens; shorter ones are left out"
SPECTRUM = """factored: exact, from token factors, at about the cost of a backward pass;
dense: jax.grad per example and a whole SVD"""
ROUTE = "of the factored path: gram in float64, qr in float32, auto by backend"
SIMILARITY = "layer pairs whose gradients are compared, per projection"
BATCH_TOKENS = "padded tokens computed at once per device (default: 2048 on a CPU, else 16384)"
PLAN = "print batches, memory per device, work and time, and end; reads no weights"
MESH = """sizes of the axes data (examples), fsdp and tensor (both split the weights) whose product
is the number of devices, as in data:4,fsdp:2 (default: data alone if the model fits one device,
else fsdp alone)"""
PROCESSES = """with several processes: the whole model in each, on its own devices, with its own
rows (independent), or one model over the devices of all (sharded)"""
COORDINATOR = """of several processes: HOST:PORT of process 0, the same for all, or auto on a TPU
pod, under Slurm, Open MPI or Kubernetes"""
RANDOM_INIT = "fresh weights of the model's shape instead of its own"
STORE_VALUES = "store the singular values, not only what sums them up"

flags.DEFINE_string("model", "demo", MODEL)
flags.DEFINE_multi_string("data", ["demo"], DATA)
flags.DEFINE_string("output_dir", None, OUTPUT_DIR)
flags.DEFINE_enum("prompt_format", "plain", get_args(config.PromptFormat), PROMPT_FORMAT)
flags.DEFINE_integer("max_length", 4096, "tokens per row")
flags.DEFINE_enum("truncation", "right", get_args(config.Truncation), TRUNCATION)
flags.DEFINE_integer("limit", None, "use the first N rows of each group (default: all)")
flags.DEFINE_enum("dtype", "float32", get_args(config.Dtype), "of weights and activations")
flags.DEFINE_enum("spectrum", "factored", get_args(config.SpectrumMethod), SPECTRUM)
flags.DEFINE_enum("spectrum_route", "auto", get_args(config.SpectrumRoute), ROUTE)
flags.DEFINE_integer("target_tokens", None, TARGET_TOKENS)
flags.DEFINE_string("layers", "all", "all, or numbers and ranges from 0, as in 0-5,8")
flags.DEFINE_list("projections", list(PROJECTIONS), "some of q,k,v,o")
flags.DEFINE_enum("similarity", "adjacent", get_args(config.LayerPairs), SIMILARITY)
flags.DEFINE_integer("batch_tokens", None, BATCH_TOKENS)
flags.DEFINE_boolean("plan", False, PLAN)
flags.DEFINE_string("mesh", None, MESH)
flags.DEFINE_enum("processes", "independent", get_args(config.ProcessKind), PROCESSES)
flags.DEFINE_string("coordinator_address", None, COORDINATOR)
flags.DEFINE_integer("num_processes", None, "how many there are")
flags.DEFINE_integer("process_id", None, "which one this is, from 0")
flags.DEFINE_boolean("random_init", False, RANDOM_INIT)
flags.DEFINE_integer("seed", 0, "of the fresh weights")
flags.DEFINE_boolean("store_singular_values", True, STORE_VALUES)
flags.DEFINE_boolean("overwrite", False, "replace the run in --output_dir")


def run_config() -> config.RunConfig:
    """The flags as a checked config; raises GradjaxError naming the flag at fault."""
    values = flags.FLAGS.flag_values_dict()
    tokens = config.select(config.TokenConfig, values)
    spectra = config.select(config.SpectraConfig, values)
    return config.select(config.RunConfig, values, tokens=tokens, spectra=spectra)


def main(_: list[str]) -> None:
    """Runs, then prints the table of groups and the store's path on standard output."""
    wanted = run_config()
    import jax  # loaded once the flags are known to be right

    from gradjax.runs.run import print_plan, run
    from gradjax.storage.results import format_table, group_means, rows_to_come, unused_rows

    if flags.FLAGS.plan:
        print_plan(wanted)
        return
    directory = run(wanted)
    if wanted.processes == "sharded" and jax.process_index():
        return  # sharded processes end together, and the first one speaks for them
    if missing := rows_to_come(directory):
        print(f"This process is done; {missing} rows of the run's other processes are to come.")
    else:
        table = group_means(directory)
        print("\n".join([format_table(table), *unused_rows(directory)]))
        if len(table) == 2 and table["rows", "used"].all():
            print_comparison(directory, *table.index)
        if len(table) > 1:
            print(f"\nTables, figures and verdicts: python -m gradjax.report --run={directory}")
        else:
            ranked = f"--scores={directory} --by=effective_rank --top=10%"
            print(f"\nIts rows by their gradients: python -m gradjax.select {ranked}")
    print(f"\nThe store is in {directory}")


def print_comparison(directory: str | Path, high: str, low: str) -> None:
    """The groups' gaps with their intervals, and whether they are more than length."""
    from gradjax.report.compare import compare, format_gaps, sentence
    from gradjax.storage.results import read_values

    comparison = compare(read_values(directory), high, low)
    print(f"\n{format_gaps(comparison)}\n{sentence(comparison)}")
