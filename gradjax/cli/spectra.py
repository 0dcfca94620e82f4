"""`gradjax spectra`: spectra of the gradients that single fine-tuning examples induce."""

import json
from pathlib import Path
from typing import Any, get_args

from absl import flags, logging

from gradjax import config, strict_json
from gradjax.cli.command import Command, command_line
from gradjax.cli.data import PUSH, define_data_flags
from gradjax.errors import GradjaxError, extras
from gradjax.structs import ATTENTION

FLAGS = flags.FlagValues()
DEMO = "demo"  # the embedded model, and the embedded data
AUTO = "auto"
MODEL = """registered name (gemma2_2b), Hub repo (google/gemma-2-2b) or local directory; must be
given with --data of your own"""
OUTPUT_DIR = """the store's directory; a run that stopped there goes on (default: runs/demo for
the embedded example, else runs/{model}-{groups})"""
PROMPT_FORMAT = """plain: instruction, newline, output, as in the paper; chat: the tokenizer's
template, loss on every assistant turn"""
TRUNCATION = "rows beyond --max_length: cut (right), leave out (drop) or stop (error)"
TARGET_TOKENS = """cut every response to its first N tokens; rows with shorter ones are left out;
auto: the largest N that leaves 90 % of each group"""
LAYERS = "all, or numbers and ranges from 0, as in 0-5,8"
SPECTRUM = """factored: exact, from token factors, at about the cost of a backward pass;
dense: jax.grad per example and a whole SVD"""
ROUTE = "gram: in float64; qr: cores in float32 on the devices, values on the host; auto by backend"
SIMILARITY = "layer pairs whose gradients are compared, per projection"
BATCH_TOKENS = "padded tokens computed at once per device (default: 2048 on a CPU, else 16384)"
PLAN = "print batches, memory per device, work and time, and end; reads no weights"
TOPOLOGY = """with --plan: plan for devices that are not here, as in v5e-16, v5p-8 or h100-8, of one
process (or of all that are sharded)"""
MESH = """sizes of the axes data (examples), fsdp and tensor (both split the weights) whose product
is the number of devices, as in data:4,fsdp:2 (default: data alone if the model fits one device,
else fsdp alone)"""
PROCESSES = """with several processes: the whole model in each, on its own devices, with its own
rows (independent), or one model over the devices of all (sharded)"""
COORDINATOR = """HOST:PORT of process 0, the same for all processes, or auto on a TPU pod,
under Slurm, Open MPI or Kubernetes"""
PROJECTIONS = "matrices: some of q,k,v,o,gate,up,down; --plan shows what the last three cost"
RANDOM_INIT = "random weights of the model's shape instead of its own"
STORE_VALUES = "store the singular values, not only what sums them up"
PROCESS_ID = "which of them this one is, from 0"
DTYPE = "number format of weights and activations"
SEED = "seed of the random weights"
JSON = "print the table of groups, and what sets two of them apart, as one JSON object"
DTYPES, FORMATS = get_args(config.Dtype), get_args(config.PromptFormat)
TRUNCATIONS, PAIRS = get_args(config.Truncation), get_args(config.LayerPairs)
METHODS, ROUTES = get_args(config.SpectrumMethod), get_args(config.SpectrumRoute)
GROUPS = {
    "Model": [
        flags.DEFINE_string("model", DEMO, MODEL, FLAGS),
        flags.DEFINE_string("revision", None, "commit, tag or branch of a Hub repo", FLAGS),
        flags.DEFINE_enum("dtype", "float32", DTYPES, DTYPE, FLAGS),
        flags.DEFINE_boolean("random_init", False, RANDOM_INIT, FLAGS),
        flags.DEFINE_integer("seed", 0, SEED, flag_values=FLAGS),
    ],
    "Data": [
        *define_data_flags(FLAGS, [DEMO]),
        flags.DEFINE_enum("prompt_format", "plain", FORMATS, PROMPT_FORMAT, FLAGS),
        flags.DEFINE_integer("max_length", 4096, "tokens per row", flag_values=FLAGS),
        flags.DEFINE_enum("truncation", "right", TRUNCATIONS, TRUNCATION, FLAGS),
        flags.DEFINE_string("target_tokens", None, TARGET_TOKENS, FLAGS),
    ],
    "What is measured": [
        flags.DEFINE_string("layers", "all", LAYERS, FLAGS),
        flags.DEFINE_list("projections", list(ATTENTION), PROJECTIONS, FLAGS),
        flags.DEFINE_enum("similarity", "adjacent", PAIRS, SIMILARITY, FLAGS),
        flags.DEFINE_enum("spectrum", "factored", METHODS, SPECTRUM, FLAGS),
        flags.DEFINE_enum("spectrum_route", "auto", ROUTES, ROUTE, FLAGS),
        flags.DEFINE_boolean("store_singular_values", True, STORE_VALUES, FLAGS),
    ],
    "Memory and devices": [
        flags.DEFINE_boolean("plan", False, PLAN, FLAGS),
        flags.DEFINE_string("topology", None, TOPOLOGY, FLAGS),
        flags.DEFINE_integer("batch_tokens", None, BATCH_TOKENS, flag_values=FLAGS),
        flags.DEFINE_string("mesh", None, MESH, FLAGS),
    ],
    "Several processes": [
        flags.DEFINE_enum(
            "processes", "independent", get_args(config.ProcessKind), PROCESSES, FLAGS
        ),
        flags.DEFINE_string("coordinator_address", None, COORDINATOR, FLAGS),
        flags.DEFINE_integer(
            "num_processes", None, "how many processes there are", flag_values=FLAGS
        ),
        flags.DEFINE_integer("process_id", None, PROCESS_ID, flag_values=FLAGS),
    ],
    "Output": [
        flags.DEFINE_string("output_dir", None, OUTPUT_DIR, FLAGS),
        flags.DEFINE_boolean("overwrite", False, "replace the run in --output_dir", FLAGS),
        flags.DEFINE_boolean("json", False, JSON, FLAGS),
        flags.DEFINE_string("push_to_hub", None, PUSH, FLAGS),
    ],
}
DETAILS = """
Loads a Hugging Face checkpoint (Qwen2.5, Qwen3, Llama, Mistral, OLMo, OLMo 2,
Gemma 2 or 3), computes for every row of the data the gradient of its loss in
the q, k, v and o matrices, and stores singular values, nuclear norm, effective
rank and cosines as Parquet tables. Called again with the same flags it goes on
where it stopped. Without any flag it runs the embedded example.
"""


def run_config() -> config.RunConfig:
    """The flags as a checked config; raises GradjaxError naming the flag at fault."""
    values = FLAGS.flag_values_dict()
    own = [given for given in values["data"] if given != DEMO]
    if own and FLAGS["model"].using_default_value:
        raise GradjaxError(
            f"--data={own[0]}: no --model is given; name the model whose gradients are wanted, as "
            "in --model=qwen2.5_0.5b (the embedded one, --model=demo, knows only word problems)"
        )
    if values["topology"] is not None and not values["plan"]:
        raise GradjaxError(
            f"--topology={values['topology']}: expected with --plan only; a run takes the devices "
            "that are here"
        )
    if values["json"] and values["plan"]:
        raise GradjaxError(
            "--json shows a run's results, and --plan has none; leave one of them out"
        )
    auto = values["target_tokens"] == AUTO
    values |= {"target_tokens": _target_tokens(values["target_tokens"]), "auto_target_tokens": auto}
    tokens = config.select(config.TokenConfig, values)
    spectra = config.select(config.SpectraConfig, values)
    reading = config.select(config.Reading, values)
    return config.select(config.RunConfig, values, reading=reading, tokens=tokens, spectra=spectra)


def _target_tokens(given: str | None) -> int | None:
    if given in (None, AUTO):
        return None
    try:
        return int(given)
    except ValueError as error:
        raise GradjaxError(
            f"--target_tokens={given}: expected a number of at least 1, or {AUTO}"
        ) from error


def main() -> None:
    """Runs, then prints the table of groups and the store's path on standard output."""
    wanted = run_config()
    from gradjax.data.sources import parse_data_flags, require_sources
    from gradjax.storage.hub import push_run, require_repo

    require_sources(parse_data_flags(wanted.data, wanted.reading))
    if FLAGS.push_to_hub:
        require_repo(FLAGS.push_to_hub, wanted.output_dir)
    import jax  # loaded once the flags are known to be right

    from gradjax.runs.run import print_plan, run
    from gradjax.storage.results import format_table, group_means, rows_to_come, unused_rows

    if FLAGS.plan:
        print_plan(wanted, FLAGS.topology)
        return
    directory = run(wanted)
    if wanted.processes == "sharded" and jax.process_index():
        return  # sharded processes end together, and the first one speaks for them
    if FLAGS.push_to_hub and rows_to_come(directory) == 0:
        url = push_run(directory, FLAGS.push_to_hub, format_table(group_means(directory)))
        logging.info("Pushed to %s", url)
    if FLAGS.json:
        print(strict_json.dumps(summary(directory)))
        return
    if (missing := rows_to_come(directory)) != 0:
        count = "" if missing is None else f"{missing} "
        print(f"This process is done; {count}rows of the run's other processes are to come.")
    else:
        table = group_means(directory)
        print("\n".join([format_table(table), *unused_rows(directory)]))
        if len(table) == 2 and table["rows", "used"].all():
            print(f"\n{compared(directory, *table.index)}")
        if len(table) > 1:
            report = command_line("report", run=directory)
            print(f"\nTables, figures and verdicts: {report}")
        else:
            best = command_line("select", scores=directory, by="effective_rank", top="10%")
            print(f"\nIts rows by their gradients: {best}")
    print(f"\nThe store is in {directory}")


def summary(directory: str | Path) -> dict[str, Any]:
    """What `--json` prints; null where there is no number.

    `groups` holds what the table shows; `comparison`, of two groups, the rows of the report's
    comparisons.csv, if the extra `report` is installed.
    """
    from gradjax.storage.results import group_means, read_values, rows_to_come

    table = group_means(directory)
    groups: dict[str, Any] = {}
    for group, row in table.iterrows():
        said = groups.setdefault(str(group), {})
        for measure, part in table.columns:
            value = row[measure, part]
            number = None if value != value else float(value)
            number = int(number or 0) if measure == "rows" else number
            if part:
                said.setdefault(measure, {})[part.replace(" ", "_")] = number
            else:
                said[measure] = number
    found = {"directory": str(directory), "rows_to_come": rows_to_come(directory), "groups": groups}
    if len(table) == 2 and table["rows", "used"].all() and found["rows_to_come"] == 0:
        try:
            with extras():
                from gradjax.report.compare import COLUMNS, adjusted, compare
        except GradjaxError:
            return found
        high, low = map(str, table.index)
        rows = adjusted([compare(read_values(directory), high, low)])[COLUMNS]
        found["comparison"] = json.loads(rows.to_json(orient="records", double_precision=15))
    return found


def compared(directory: str | Path, high: str, low: str) -> str:
    """The groups' gaps with their intervals, and whether they are more than length.

    Where what this takes is not installed, how to install it.
    """
    try:
        with extras():
            from gradjax.report.compare import compare, format_gaps, sentence
    except GradjaxError as missing:
        return f"The groups are not compared: {missing}"
    from gradjax.storage.results import read_values

    comparison = compare(read_values(directory), high, low)
    return f"{format_gaps(comparison)}\n{sentence(comparison)}"


COMMAND = Command(
    program="gradjax spectra",
    summary="Gradient spectra of single fine-tuning rows, stored as tables.",
    examples=(
        "gradjax spectra --model=gemma2_2b --data=good=high.json --data=bad=low.json",
        "gradjax spectra",
        "gradjax spectra --flagfile=configs/qwen2.5_1.5b.flags --data=rows.jsonl",
    ),
    details=DETAILS,
    groups=GROUPS,
    flags=FLAGS,
    main=main,
)
