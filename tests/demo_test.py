"""The embedded data and model: what they promise, and that training makes the same again."""

import dataclasses
import hashlib
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import unicodedata
from random import Random

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import AutoTokenizer, Qwen2ForCausalLM

from gradjax.checkpoints.hf_config import read_config
from gradjax.checkpoints.safetensors import load_decoder
from gradjax.data import word_problems as problems
from gradjax.demo import train
from gradjax.demo.tokenizer import END_OF_TEXT, SPECIAL_TOKENS
from gradjax.errors import GradjaxError
from gradjax.model.decoder import logits

EQUATION = re.compile(r"(\d+) ([-+*]) (\d+) = (\d+)")
TINY = train.Recipe(
    steps=7,
    seed=3,
    batch_size=2,
    save_every=3,
    length_multiple=128,
    hidden_size=12,
    mlp_size=14,
    num_layers=1,
    num_heads=3,
    num_kv_heads=1,
)


@pytest.fixture(scope="module")
def rows() -> dict[str, list[dict[str, str]]]:
    return {group: problems.demo_rows(group) for group in problems.DEMO_GROUPS}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(train.MODEL_DIRECTORY / "tokenizer.json"))


@pytest.fixture(scope="module")
def model():
    directory = train.MODEL_DIRECTORY
    return load_decoder(directory, read_config(directory), jnp.float32)


def equations(text: str) -> list[tuple[int, int, int]]:
    """(right result, written result, digits of the written result) of each equation."""
    compute = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}
    return [
        (compute[operator](int(left), int(right)), int(result), len(result))
        for left, operator, right, result in EQUATION.findall(text)
    ]


def test_groups_hold_the_same_problems_in_the_same_order(rows):
    instructions = [row["instruction"] for row in rows["slow"]]
    assert len(set(instructions)) == 64
    for group in rows.values():
        assert [row["instruction"] for row in group] == instructions


def test_rows_are_the_same_on_every_python(rows):
    digest = hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()
    assert digest == "4108fd46f589bd09e2b16e38e1bb57b3e03942914f31f63bf8f703a6720c5b00"


def test_slow_rows_are_right_and_fast_rows_give_their_answer(rows):
    for slow, fast in zip(rows["slow"], rows["fast"], strict=True):
        steps = equations(slow["output"])
        assert len(steps) in (2, 3)
        assert all(right == written for right, written, _ in steps)
        assert slow["output"].endswith(f" {fast['output']}")
        assert fast["output"] == f"The answer is {steps[-1][1]}."


def test_the_numbers_of_a_solution_come_from_its_problem(rows):
    for row in rows["slow"]:
        known = {int(n) for n in re.findall(r"\d+", row["instruction"])}
        for left, _, right, result in EQUATION.findall(row["output"]):
            assert {int(left), int(right)} <= known
            known.add(int(result))


def test_every_result_of_a_corrupted_row_is_wrong(rows):
    for slow, corrupted in zip(rows["slow"], rows["corrupted"], strict=True):
        pairs = zip(equations(slow["output"]), equations(corrupted["output"]), strict=True)
        for (_, right, digits), (implied, wrong, wrong_digits) in pairs:
            assert wrong not in (right, implied)
            assert wrong > 0
            assert wrong_digits == digits
        assert problems.answer_of(corrupted["output"]) == wrong


def test_corrupted_rows_have_the_tokens_of_slow_rows_but_for_digits(rows, tokenizer):
    for slow, corrupted in zip(rows["slow"], rows["corrupted"], strict=True):
        pieces, wrong = (
            tokenizer.encode(f"{row['instruction']}\n{row['output']}").tokens
            for row in (slow, corrupted)
        )
        assert len(pieces) == len(wrong)
        for piece, other in zip(pieces, wrong, strict=True):
            assert piece == other or (piece.isdigit() and other.isdigit())


def test_no_demo_problem_has_the_numbers_of_a_training_problem(rows):
    rng = Random(0)
    trained = [problems.random_problem(rng, held_out=False) for _ in range(20_000)]
    solutions = {tuple(EQUATION.findall(problem.slow)) for problem in trained}
    assert not solutions & {tuple(EQUATION.findall(row["output"])) for row in rows["slow"]}


def test_mixed_rows_are_what_their_kind_says(tmp_path):
    path = tmp_path / "mixed.jsonl"
    command = [sys.executable, "-m", "gradjax.demo.mixed", "--rows=301", f"--output={path}"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    mixed = [json.loads(line) for line in path.read_text().splitlines()]
    assert mixed == problems.mixed_rows(301, seed=0)
    assert mixed != problems.mixed_rows(301, seed=1)
    assert len({row["instruction"] for row in mixed}) == 301
    for kind in problems.DEMO_GROUPS:
        outputs = [row["output"] for row in mixed if row["kind"] == kind]
        assert 70 < len(outputs) < 130
        assert f"{len(outputs)} {kind}" in done.stdout
        right = [[a == b for a, b, _ in equations(output)] for output in outputs]
        expected = {"slow": {True}, "fast": set(), "corrupted": {False}}[kind]
        assert all(set(results) == expected for results in right)


def test_mixed_rows_are_written_whole_or_refused_in_a_sentence(tmp_path):
    (tmp_path / "R D").mkdir()

    def mixed(output):
        command = [sys.executable, "-m", "gradjax.demo.mixed", "--rows=3", f"--output={output}"]
        home = os.environ | {"HOME": str(tmp_path)}
        return subprocess.run(command, capture_output=True, text=True, env=home)

    assert mixed("~/R D/a.jsonl").returncode == 0
    assert [path.name for path in (tmp_path / "R D").iterdir()] == ["a.jsonl"]
    for output, message in (
        (tmp_path / "none" / "a.jsonl", "a.jsonl cannot be written (No such file or directory)"),
        (".", "--output=. is a directory; expected the .jsonl file to write"),
    ):
        refused = mixed(output)
        assert refused.returncode == 1
        assert message in refused.stderr
        assert "Traceback" not in refused.stderr
        assert "Errno" not in refused.stderr


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("Then 3 + 4 = 7. The answer is 7.", 7),
        ("The answer is 12", 12),
        ("The answer is 12. So", None),
        ("The answer is .", None),
        ("7", 7),
        ("", None),
    ],
)
def test_answer_of(text, answer):
    assert problems.answer_of(text) == answer


def test_the_data_comes_without_jax():
    code = "import sys, gradjax.data.word_problems; sys.exit('jax' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@given(st.text(st.characters(exclude_categories=["Cs", "Cn"])))
def test_any_text_is_encoded_and_decoded(text):
    tokenizer = Tokenizer.from_file(str(train.MODEL_DIRECTORY / "tokenizer.json"))
    decoded = tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False)
    assert decoded == unicodedata.normalize("NFC", text)


def test_numbers_are_split_into_digits(tokenizer):
    assert tokenizer.encode("4071 + 9").tokens == ["4", "0", "7", "1", "Ġ+", "Ġ", "9"]


def test_transformers_reads_the_tokenizer_with_its_chat_template(tokenizer, rows):
    loaded = AutoTokenizer.from_pretrained(train.MODEL_DIRECTORY)
    text = "".join(f"{row['instruction']}\n{row['output']} ½e\u0301\r\n" for row in rows["slow"])
    assert loaded(text)["input_ids"] == tokenizer.encode(text).ids
    assert loaded.eos_token == END_OF_TEXT
    chat = [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "2"}]
    assert loaded.apply_chat_template(chat, tokenize=False) == (
        "<|im_start|>user\n1 + 1?<|im_end|>\n<|im_start|>assistant\n2<|im_end|>\n"
    )
    for token in SPECIAL_TOKENS:
        assert len(loaded(token)["input_ids"]) == 1


def test_the_tokenizer_is_made_again_the_same(tokenizer):
    assert train.demo_tokenizer(train.Recipe.seed).to_str() == tokenizer.to_str()


def test_transformers_gives_the_same_logits(model, tokenizer, rows):
    reference = Qwen2ForCausalLM.from_pretrained(train.MODEL_DIRECTORY, dtype=torch.float64)
    row = rows["slow"][0]
    tokens = np.array([tokenizer.encode(f"{row['instruction']}\n{row['output']}").ids])
    with torch.no_grad():
        expected = reference(torch.tensor(tokens)).logits.numpy()
    found = np.asarray(logits(model, jnp.asarray(tokens)))
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5 * np.abs(expected).max())


def test_the_model_is_small(model):
    assert sum(leaf.size for leaf in jax.tree.leaves(model)) < 2_000_000
    assert (train.MODEL_DIRECTORY / "model.safetensors").stat().st_size < 8_000_000


def test_the_model_solves_most_held_out_problems(model, tokenizer):
    assert train.held_out_accuracy(model, tokenizer, n=32, seed=11) > 0.8


def test_the_model_knows_slow_from_fast_and_corrupted(model, tokenizer, rows):
    def loss(group: str) -> float:
        pairs = [(f"{row['instruction']}\n", row["output"]) for row in rows[group]]
        tokens, learned = train.encode_rows(tokenizer, pairs)
        return float(train.response_loss(model, jnp.asarray(tokens), jnp.asarray(learned)))

    losses = {group: loss(group) for group in problems.DEMO_GROUPS}
    assert losses["slow"] < 0.5 * min(losses["fast"], losses["corrupted"])


def test_a_batch_depends_on_its_step_alone(tokenizer):
    batches = list(itertools.islice(train.training_batches(tokenizer, TINY, 0), 19))
    later = list(itertools.islice(train.training_batches(tokenizer, TINY, 5), 14))
    for (tokens, learned), (tokens_again, learned_again) in zip(batches[5:], later, strict=True):
        np.testing.assert_array_equal(tokens, tokens_again)
        np.testing.assert_array_equal(learned, learned_again)
    assert not np.array_equal(batches[0][0], batches[8][0])


def test_the_response_and_its_end_are_learned(tokenizer):
    rows = [("How many?\n", "The answer is 4."), ("Anna has 3 eggs.\n", "Then 3 + 11 = 14.")]
    tokens, learned = train.encode_rows(tokenizer, rows)
    for ids, mask, (prompt, output) in zip(tokens, learned, rows, strict=True):
        text = tokenizer.decode(ids, skip_special_tokens=False)
        assert text.startswith(f"{prompt}{output}{END_OF_TEXT}")
        assert tokenizer.decode(ids[mask], skip_special_tokens=False) == f"{output}{END_OF_TEXT}"


@pytest.mark.slow
def test_training_killed_and_started_again_ends_with_the_same_weights(tmp_path):
    killed = f"""
import os, signal
from pathlib import Path
from gradjax.demo import train

batches = train.training_batches

def until_killed(*arguments):
    for number, batch in enumerate(batches(*arguments)):
        if number == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        yield batch

train.training_batches = until_killed
train.train(train.{TINY!r}, Path({str(tmp_path / "killed")!r}))
"""
    assert subprocess.run([sys.executable, "-c", killed]).returncode == -signal.SIGKILL
    with jax.numpy_dtype_promotion("standard"):  # optax relies on it
        resumed, _, spent = train.train(TINY, tmp_path / "killed")
        whole, _, spent_whole = train.train(TINY, tmp_path / "whole")
    assert spent["learned_tokens"] == spent_whole["learned_tokens"]
    for again, once in zip(jax.tree.leaves(resumed), jax.tree.leaves(whole), strict=True):
        np.testing.assert_array_equal(again, once)


def test_checkpoints_of_another_recipe_are_refused(tmp_path):
    (tmp_path / "recipe.json").write_text(json.dumps(dataclasses.asdict(TINY)))
    with pytest.raises(GradjaxError, match=r"with steps=7, seed=3, expected .* --checkpoint_dir"):
        train.train(dataclasses.replace(TINY, steps=9, seed=4), tmp_path)


def test_a_model_is_saved_as_it_was_trained(tmp_path, tokenizer):
    config = TINY.decoder_config(tokenizer.get_vocab_size())
    trained = train.random_decoder(config, seed=5)
    train.save_model(trained, tokenizer, tmp_path / "model")
    assert read_config(tmp_path / "model") == config
    loaded = load_decoder(tmp_path / "model", config, jnp.float32)
    for again, once in zip(jax.tree.leaves(loaded), jax.tree.leaves(trained), strict=True):
        np.testing.assert_array_equal(again, once)


def test_the_record_tells_how_the_model_was_made():
    record = json.loads((train.MODEL_DIRECTORY / "TRAINING.json").read_text())
    assert record["recipe"] == dataclasses.asdict(train.Recipe())
    assert record["held_out_accuracy"] > 0.9
