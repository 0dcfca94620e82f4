"""Makes the embedded model again: `python -m gradjax.demo.train`.

One step's batch is a pure function of the seed and the step, and weights, optimizer state and
counters are kept in orbax checkpoints, so a run that was killed continues with the same command
to the same weights. Nine rows in ten have worked solutions and one the bare answer: the form
of both is then familiar, and what a bare answer surprises the model with is the number.
"""

import dataclasses
import itertools
import json
import platform
import sys
import time
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from random import Random

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import safetensors.numpy
from absl import flags, logging
from jaxtyping import Array, Bool, Float, Int
from tokenizers import Tokenizer

from gradjax import strict_json
from gradjax.checkpoints.hf_config import read_config
from gradjax.checkpoints.safetensors import load_decoder
from gradjax.cli.app import run
from gradjax.cli.command import Command
from gradjax.data.word_problems import answer_of, random_problem
from gradjax.demo.tokenizer import END_OF_TEXT, save_tokenizer, train_tokenizer
from gradjax.errors import GradjaxError
from gradjax.model.config import DecoderConfig, qwen2_config
from gradjax.model.decoder import Decoder, logits, random_decoder
from gradjax.model.parameters import all_parameters

MODEL_DIRECTORY = Path(__file__).parent / "model"

_ANSWER_ONLY_SHARE = 0.1
_TOKENIZER_PROBLEMS = 4000
_HELD_OUT_PROBLEMS = 1000
_HELD_OUT_SEED = 1
_CONTEXT = 128  # tokens of a prompt and what is decoded after it
_DECODED_AT_ONCE = 125
_POOL = 8  # batches that are drawn together and sorted by length


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What a training run is made of; the defaults make the embedded model."""

    steps: int = 4000
    seed: int = 0
    batch_size: int = 32
    peak_rate: float = 3e-3
    save_every: int = 250
    length_multiple: int = 16  # batches are padded to one: few shapes to compile
    hidden_size: int = 96
    mlp_size: int = 256
    num_layers: int = 4
    num_heads: int = 4
    num_kv_heads: int = 2

    def decoder_config(self, vocab_size: int) -> DecoderConfig:
        """The model, of Qwen2.5's architecture."""
        return qwen2_config(
            vocab_size=vocab_size,
            hidden_size=self.hidden_size,
            mlp_size=self.mlp_size,
            num_layers=self.num_layers,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            rope_theta=10_000.0,
        )

    def optimizer(self) -> optax.GradientTransformation:
        """AdamW under a warm-up and a cosine decay to a hundredth of the peak."""
        rate = optax.warmup_cosine_decay_schedule(
            0.0, self.peak_rate, self.steps // 20, self.steps, end_value=self.peak_rate / 100
        )
        return optax.chain(
            optax.clip_by_global_norm(1.0), optax.adamw(rate, b2=0.98, weight_decay=0.01)
        )


def demo_tokenizer(seed: int) -> Tokenizer:
    """The tokenizer, learned from worked solutions of the training part."""
    rng = Random(seed)
    problems = (random_problem(rng, held_out=False) for _ in range(_TOKENIZER_PROBLEMS))
    return train_tokenizer(f"{problem.prompt}{problem.slow}" for problem in problems)


def training_batches(
    tokenizer: Tokenizer, recipe: Recipe, first_step: int
) -> Iterator[tuple[Int[np.ndarray, "B T"], Bool[np.ndarray, "B T"]]]:
    """The rows of each step from `first_step` on: token ids, and which of them are learned.

    The same for a step whatever `first_step` is.
    """
    size = recipe.batch_size
    first_pool, offset = divmod(first_step, _POOL)
    for pool in itertools.count(first_pool):
        rng = Random(f"{recipe.seed}/{pool}")
        problems = [random_problem(rng, held_out=False) for _ in range(_POOL * size)]
        # Problems of like length go together, whichever form of their solution is taken.
        problems.sort(key=lambda problem: len(problem.instruction) + len(problem.slow))
        rows = [
            (problem.prompt, problem.fast if rng.random() < _ANSWER_ONLY_SHARE else problem.slow)
            for problem in problems
        ]
        order = sorted(range(_POOL), key=lambda _: rng.random())
        for batch in order[offset:]:
            chosen = rows[batch * size : (batch + 1) * size]
            yield encode_rows(tokenizer, chosen, recipe.length_multiple)
        offset = 0


def encode_rows(
    tokenizer: Tokenizer, rows: Sequence[tuple[str, str]], multiple: int = 1
) -> tuple[Int[np.ndarray, "B T"], Bool[np.ndarray, "B T"]]:
    """Rows of (prompt, response) as token ids, and which of them are learned.

    A row is what gradjax evaluates under `--prompt_format=plain`, and an end of text. The
    response and the end are learned. Rows are padded on the right with ends of text, to a
    multiple of `multiple` tokens.
    """
    encoded = [tokenizer.encode(f"{prompt}{output}{END_OF_TEXT}").ids for prompt, output in rows]
    tokens, lengths = _pad(tokenizer, encoded, multiple)
    starts = np.array([len(tokenizer.encode(prompt).ids) for prompt, _ in rows])
    position = np.arange(tokens.shape[1])
    return tokens, (position >= starts[:, None]) & (position < lengths[:, None])


def _pad(
    tokenizer: Tokenizer, rows: Sequence[Sequence[int]], multiple: int
) -> tuple[Int[np.ndarray, "B T"], Int[np.ndarray, " B"]]:
    """Rows of token ids as one array, and their lengths."""
    lengths = np.array([len(row) for row in rows])
    width = -(-int(lengths.max()) // multiple) * multiple
    tokens = np.full((len(rows), width), tokenizer.token_to_id(END_OF_TEXT), np.int32)
    for row, ids in enumerate(rows):
        tokens[row, : len(ids)] = ids
    return tokens, lengths


def response_loss(
    model: Decoder, tokens: Int[Array, "B T"], learned: Bool[Array, "B T"]
) -> Float[Array, ""]:
    """Mean negative log-likelihood, in nats, of a batch's learned tokens."""
    scores = logits(model, tokens)[:, :-1]
    losses = optax.softmax_cross_entropy_with_integer_labels(scores, tokens[:, 1:])
    return jnp.mean(losses, where=learned[:, 1:])


def train(recipe: Recipe, checkpoint_dir: Path) -> tuple[Decoder, Tokenizer, dict[str, float]]:
    """Train from the last checkpoint in `checkpoint_dir`, or from the start, to the end.

    Returns:
      The model, its tokenizer, and what it took over all the runs that led here:
      `learned_tokens` (responses and ends of text) and `seconds`.

    Raises GradjaxError where `checkpoint_dir` holds checkpoints of another recipe.
    """
    _claim(checkpoint_dir, recipe)
    tokenizer = demo_tokenizer(recipe.seed)
    config = recipe.decoder_config(tokenizer.get_vocab_size())
    optimizer = recipe.optimizer()
    initial = random_decoder(config, recipe.seed)
    weights = {path: initial.weight(path) for path in all_parameters(config)}
    state = {
        "weights": weights,
        "optimizer": optimizer.init(weights),
        "spent": {"learned_tokens": np.float64(0), "seconds": np.float64(0)},
    }

    @jax.jit
    def update(weights, optimizer_state, tokens, learned):
        def loss_of(weights):
            return response_loss(Decoder(config, weights), tokens, learned)

        loss, gradient = jax.value_and_grad(loss_of)(weights)
        updates, optimizer_state = optimizer.update(gradient, optimizer_state, weights)
        return optax.apply_updates(weights, updates), optimizer_state, loss

    options = ocp.CheckpointManagerOptions(max_to_keep=2, save_interval_steps=recipe.save_every)
    with ocp.CheckpointManager(checkpoint_dir.absolute(), options=options) as checkpoints:
        done = checkpoints.latest_step() or 0
        if done:
            state = checkpoints.restore(done, args=ocp.args.StandardRestore(state))
        batches = training_batches(tokenizer, recipe, done)
        for step in range(done + 1, recipe.steps + 1):
            tokens, learned = next(batches)
            started = time.monotonic()
            state["weights"], state["optimizer"], loss = update(
                state["weights"], state["optimizer"], tokens, learned
            )
            loss.block_until_ready()
            state["spent"]["learned_tokens"] += np.count_nonzero(learned)
            state["spent"]["seconds"] += time.monotonic() - started
            if step % 50 == 0 or step == recipe.steps:
                print(f"step {step} of {recipe.steps}: loss {loss:.4f}", flush=True)
            checkpoints.save(step, args=ocp.args.StandardSave(state), force=step == recipe.steps)
    spent = {name: float(value) for name, value in state["spent"].items()}
    return Decoder(config, state["weights"]), tokenizer, spent


def _claim(checkpoint_dir: Path, recipe: Recipe) -> None:
    """Note whose checkpoints a directory holds, or refuse those of another recipe."""
    path, wanted = checkpoint_dir / "recipe.json", dataclasses.asdict(recipe)
    if not path.exists():
        checkpoint_dir.mkdir(parents=True, exist_ok=True)
        _write_json(path, wanted)
    found = json.loads(path.read_text())
    if found != wanted:
        other = [f"{name}={found.get(name)}" for name in wanted if found.get(name) != wanted[name]]
        raise GradjaxError(
            f"{checkpoint_dir} holds checkpoints of a training with {', '.join(other)}, expected "
            "the settings of this one: give another --checkpoint_dir or remove it."
        )


def save_model(model: Decoder, tokenizer: Tokenizer, directory: Path) -> None:
    """Write a Hugging Face checkpoint in float32, as `transformers` and gradjax read it."""
    config = model.config
    end = tokenizer.token_to_id(END_OF_TEXT)
    directory.mkdir(parents=True, exist_ok=True)
    _write_json(
        directory / "config.json",
        {
            "architectures": ["Qwen2ForCausalLM"],
            "model_type": "qwen2",
            "vocab_size": config.vocab_size,
            "hidden_size": config.hidden_size,
            "intermediate_size": config.mlp_size,
            "num_hidden_layers": config.num_layers,
            "num_attention_heads": config.num_heads,
            "num_key_value_heads": config.num_kv_heads,
            "hidden_act": config.activation,
            "max_position_embeddings": config.max_positions,
            "rms_norm_eps": config.norm_eps,
            "rope_theta": config.rope_theta,
            "tie_word_embeddings": config.tied_embeddings,
            "eos_token_id": end,
            "pad_token_id": end,
            "torch_dtype": "float32",
        },
    )
    tensors = {
        parameter.hf_key: np.asarray(model.weight(path), np.float32)
        for path, parameter in all_parameters(config).items()
        if parameter.hf_key
    }
    serialized = safetensors.numpy.save(tensors, metadata={"format": "pt"})
    (directory / "model.safetensors").write_bytes(serialized)
    save_tokenizer(tokenizer, directory, config.max_positions)


def held_out_accuracy(model: Decoder, tokenizer: Tokenizer, n: int, seed: int) -> float:
    """Share of `n` held-out problems for which greedy decoding gives the right answer."""
    rng = Random(seed)
    problems = [random_problem(rng, held_out=True) for _ in range(n)]
    solved = 0
    for first in range(0, n, _DECODED_AT_ONCE):
        batch = problems[first : first + _DECODED_AT_ONCE]
        texts = greedy_responses(model, tokenizer, [problem.prompt for problem in batch])
        solved += sum(
            answer_of(text) == problem.results[-1]
            for text, problem in zip(texts, batch, strict=True)
        )
    return solved / n


def greedy_responses(model: Decoder, tokenizer: Tokenizer, prompts: Sequence[str]) -> list[str]:
    """What the model answers to prompts at temperature 0, up to `_CONTEXT` tokens in all."""
    encoded = [encoding.ids for encoding in tokenizer.encode_batch(list(prompts))]
    tokens, lengths = _pad(tokenizer, encoded, multiple=_CONTEXT)
    end = tokenizer.token_to_id(END_OF_TEXT)
    assert end is not None
    position, ended = lengths, np.zeros(len(prompts), bool)
    while not ended.all() and position.max() < _CONTEXT:
        following = np.asarray(_greedy_tokens(model, tokens, position - 1))
        ended |= following == end
        tokens[np.arange(len(tokens)), position] = np.where(ended, end, following)
        position = position + 1
    return [
        tokenizer.decode(row[length:], skip_special_tokens=True)
        for row, length in zip(tokens.tolist(), lengths, strict=True)
    ]


@jax.jit
def _greedy_tokens(
    model: Decoder, tokens: Int[Array, "B T"], position: Int[Array, " B"]
) -> Int[Array, " B"]:
    """The likeliest token after each row's `position`."""
    scores = jnp.take_along_axis(logits(model, tokens), position[:, None, None], axis=1)
    return jnp.argmax(scores[:, 0], axis=-1)


def _write_json(path: Path, value: dict[str, object]) -> None:
    path.write_text(strict_json.dumps(value, indent=2) + "\n")


def evaluate(directory: Path) -> float:
    """The held-out accuracy of a saved model, loaded through the path of any model."""
    model = load_decoder(directory, read_config(directory), jnp.float32)
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    accuracy = held_out_accuracy(model, tokenizer, _HELD_OUT_PROBLEMS, _HELD_OUT_SEED)
    print(f"greedy decoding solves {accuracy:.1%} of {_HELD_OUT_PROBLEMS} held-out problems")
    return accuracy


FLAGS = flags.FlagValues()
GROUPS = {
    "Training": [
        flags.DEFINE_integer(
            "steps", Recipe.steps, "training steps", lower_bound=1, flag_values=FLAGS
        ),
        flags.DEFINE_integer("seed", Recipe.seed, "seed of weights and data", flag_values=FLAGS),
    ],
    "Output": [
        flags.DEFINE_string("output_dir", str(MODEL_DIRECTORY), "where the model is saved", FLAGS),
        flags.DEFINE_string(
            *("checkpoint_dir", "runs/demo_training", "where training goes on from after a stop"),
            FLAGS,
        ),
        flags.DEFINE_boolean("evaluate", False, "only evaluate the model in --output_dir", FLAGS),
    ],
}


def main() -> None:
    """Trains, saves, evaluates and notes how it went; or only evaluates what is saved."""
    logging.set_verbosity(logging.WARNING)  # orbax has many lines for every checkpoint
    directory = Path(FLAGS.output_dir)
    if FLAGS.evaluate:
        evaluate(directory)
        return
    recipe = Recipe(steps=FLAGS.steps, seed=FLAGS.seed)
    model, tokenizer, spent = train(recipe, Path(FLAGS.checkpoint_dir))
    save_model(model, tokenizer, directory)
    record = {
        "recipe": dataclasses.asdict(recipe),
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(model)),
        **{name: round(value) for name, value in spent.items()},
        "held_out_problems": _HELD_OUT_PROBLEMS,
        "held_out_accuracy": evaluate(directory),
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("jax", "flax", "optax", "tokenizers")},
        },
    }
    _write_json(directory / "TRAINING.json", record)


COMMAND = Command(
    program="python -m gradjax.demo.train",
    summary="Trains the embedded model again.",
    examples=("python -m gradjax.demo.train --output_dir=model",),
    details="",
    groups=GROUPS,
    flags=FLAGS,
    main=main,
)


if __name__ == "__main__":
    run(COMMAND, sys.argv[1:])
