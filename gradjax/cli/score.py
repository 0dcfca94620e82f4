"""`gradjax score`: quality scores of fine-tuning rows."""

from absl import flags, logging

from gradjax.cli.command import Command, command_line
from gradjax.cli.data import define_data_flags
from gradjax.config import Reading, select
from gradjax.errors import GradjaxError
from gradjax.score.config import ScoreConfig
from gradjax.structs import ATTENTION

FLAGS = flags.FlagValues()
METRICS = """some of ifd, perplexity, reward, instag, difficulty; or single columns that come with
them, as ifd_loss_ratio"""
DATA = "[GROUP=]SOURCE as of gradjax spectra, repeatable (default: the rows of --run)"
RUN = """a run of gradjax spectra over the same rows: adds loss, perplexity, numbers of tokens and
gradient statistics, means over --layers and --projections"""
LIMIT = "score the first N rows of each group (default: all)"
LAYERS = "layers of --run: all, or numbers and ranges from 0, as in 0-5,8"
IFD_MODEL = "model of ifd and perplexity: gpt2, or as --model of gradjax spectra"
REWARD_MODEL = """model of reward, a LlamaForSequenceClassification with one label: Hub repo or
local directory"""
MAX_LENGTH = "most tokens of a row for ifd and perplexity (default: the model's window)"
BASE_URL = "an OpenAI-compatible endpoint; its key is read from OPENAI_API_KEY"
PROMPT = """a text file, asked instead of gradjax's own prompt of the metric; with {instruction} in
it, where the row is put between tags"""
MAX_TOKENS = """most tokens of an answer, what a reasoning model thinks included: more where answers
are cut off, less for a server with a short context"""
BUDGET = """most requests and tokens (of questions and answers) of this call, as in
requests=1000,tokens=2e6, or one of them; what is on its way when the tokens are used is still
taken, and the next call has the whole budget again"""
PRICES = "price of a million tokens read and written, as in 2.5,10; --plan then prints the cost"
BATCH = "write the questions to this file for OpenAI's Batch API, and end"
RESULTS = "take the answers from this results file of the Batch API first"
PLAN = "print how many rows are to be scored and what the judge will be asked, and end"
OVERWRITE = "replace scores of other settings in --output_dir"
ALLOW_MISSING = "end with status 0, not 1, also where rows have no answer of the judge"
REWARD = "sfairXC/FsfairX-LLaMA3-RM-v0.1"
GROUPS = {
    "What is scored": [
        flags.DEFINE_list("metrics", [], METRICS, FLAGS),
        *define_data_flags(FLAGS, [], DATA, LIMIT),
    ],
    "Gradient statistics of a run": [
        flags.DEFINE_string("run", None, RUN, FLAGS),
        flags.DEFINE_string("layers", "all", LAYERS, FLAGS),
        flags.DEFINE_list(
            "projections", list(ATTENTION), "matrices of --run: some of q,k,v,o,gate,up,down", FLAGS
        ),
    ],
    "Models": [
        flags.DEFINE_string("ifd_model", "gpt2", IFD_MODEL, FLAGS),
        flags.DEFINE_string("reward_model", REWARD, REWARD_MODEL, FLAGS),
        flags.DEFINE_integer("max_length", None, MAX_LENGTH, flag_values=FLAGS),
    ],
    "Judge": [
        flags.DEFINE_string(
            "judge_model", None, "the chat model that is asked for instag and difficulty", FLAGS
        ),
        flags.DEFINE_string("judge_base_url", "https://api.openai.com/v1", BASE_URL, FLAGS),
        flags.DEFINE_string("judge_prompt", None, PROMPT, FLAGS),
        flags.DEFINE_integer("judge_concurrency", 8, "questions asked at once", flag_values=FLAGS),
        flags.DEFINE_integer("judge_max_tokens", 4096, MAX_TOKENS, flag_values=FLAGS),
        flags.DEFINE_list("judge_budget", None, BUDGET, FLAGS),
        flags.DEFINE_list("judge_prices", None, PRICES, FLAGS),
        flags.DEFINE_string("judge_batch", None, BATCH, FLAGS),
        flags.DEFINE_string("judge_batch_results", None, RESULTS, FLAGS),
    ],
    "Output": [
        flags.DEFINE_string("output_dir", "scores", "where to write", FLAGS),
        flags.DEFINE_boolean("plan", False, PLAN, FLAGS),
        flags.DEFINE_boolean("overwrite", False, OVERWRITE, FLAGS),
        flags.DEFINE_boolean("allow_missing", False, ALLOW_MISSING, FLAGS),
    ],
}
DETAILS = """
The scores by which the paper splits data sets:

  ifd         how little the instruction tells about the response (GPT-2, or
              --ifd_model): the ratio of perplexities; ifd_loss_ratio and both
              perplexities come with it
  perplexity  of the response given its instruction, with the loss and the
              numbers of tokens
  reward      of a Llama reward model (--reward_model)
  instag      number of intention tags, by a chat model (--judge_model)
  difficulty  1 to 10, by a chat model (--judge_model)

Gradient statistics of a run come with --run. Writes OUTPUT_DIR/scores/, a
Parquet table with one row per input row; called again, it goes on where it
stopped, and metrics may be added.

A row that the judge has not answered is null with the reason, and the status is
then 1. An answer that cannot be used is asked for three times in all, then the
row is given up.
"""


def score_config() -> ScoreConfig:
    """The flags as a checked config; raises GradjaxError naming the flag at fault."""
    values = FLAGS.flag_values_dict()
    if values["judge_prices"]:
        values["judge_prices"] = _prices(values["judge_prices"])
    if values["judge_budget"]:
        values["judge_budget"] = _budget(values["judge_budget"])
    return select(ScoreConfig, values, reading=select(Reading, values))


def _budget(texts: list[str]) -> dict[str, float]:
    pairs = [text.partition("=") for text in texts]
    try:
        limits = {name: float(value) for name, _, value in pairs}
        if len(limits) < len(texts):
            raise ValueError
    except ValueError:
        raise GradjaxError(
            f"--judge_budget={','.join(texts)}: expected requests=N, tokens=N or both, once each"
        ) from None
    return limits


def _prices(texts: list[str]) -> tuple[float, float]:
    try:
        price_in, price_out = map(float, texts)
        if not (0 <= price_in < float("inf") and 0 <= price_out < float("inf")):
            raise ValueError
    except ValueError:
        raise GradjaxError(
            f"--judge_prices={','.join(texts)}: expected two numbers, IN,OUT per million tokens"
        ) from None
    return price_in, price_out


def main() -> None:
    """Scores, then prints each metric's distribution and where the table is."""
    config = score_config()
    from gradjax.data.sources import parse_data_flags, require_sources

    require_sources(parse_data_flags(config.data, config.reading))
    from gradjax.score.run import make_batch, plan, score
    from gradjax.score.summary import format_scores, missing_answers

    if FLAGS.plan:
        print("\n".join(plan(config)))
    elif config.judge_batch:
        print(make_batch(config))
    else:
        directory = score(config)
        print(format_scores(directory))
        metric = config.metrics[0] if config.metrics else "effective_rank"
        best = command_line("select", scores=directory, by=metric, top="10%")
        print(f"\nThe best rows by one of them: {best}")
        print(f"\nThe scores are in {directory}")
        if config.judged and (missing := missing_answers(directory)):
            if not FLAGS.allow_missing:
                raise GradjaxError(f"{missing}; --allow_missing takes it as it is, with status 0")
            logging.warning("%s", missing)


COMMAND = Command(
    program="gradjax score",
    summary="Scores rows: IFD, perplexity, reward, InsTag, difficulty.",
    examples=(
        "gradjax score --data=rows.jsonl --metrics=ifd --output_dir=scores/rows",
        "gradjax score --data=rows.jsonl --metrics=difficulty --judge_model=gpt-4o",
        "gradjax score --run=runs/rows --layers=0-9 --output_dir=scores/gradients",
    ),
    details=DETAILS,
    groups=GROUPS,
    flags=FLAGS,
    main=main,
)
