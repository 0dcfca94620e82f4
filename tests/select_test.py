"""Which rows are selected, why others are not, and what the files hold."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import gradjax
from benchmarks.made_up_runs import Group, write_run
from gradjax.config import Reading
from gradjax.data.examples import to_example
from gradjax.data.sources import Source, read_rows, row_hash
from gradjax.errors import GradjaxError
from gradjax.report.matching import Rows, match
from gradjax.select.choose import choose
from gradjax.select.rule import Rule, parse_amount, parse_range, parse_terms
from gradjax.select.sources import read_scored
from gradjax.select.write import SelectConfig, write_selection

ROOT = Path(__file__).parent.parent


def rule(by: str = "m", **flags: Any) -> Rule:
    """A rule of flags as they are typed."""
    for name in {"top", "bottom", "random"} & flags.keys():
        flags[name] = parse_amount(name, str(flags[name]))
    if "range" in flags:
        flags["range"] = parse_range(flags["range"])
    return Rule(parse_terms(by), **flags)


def frames(
    *,
    length: Any = 1.0,
    prompt_length: Any = 1,
    prompt: Any = None,
    text: Any = None,
    status: Any = "ok",
    **metrics: Any,
):
    """Keys and metrics as `choose` takes them."""
    numbers = pd.DataFrame(metrics, dtype=float)
    prompt = numbers.index if prompt is None else prompt
    text = numbers.index if text is None else text
    matched = {"length": length, "prompt_length": prompt_length, "prompt": prompt, "text": text}
    keys = pd.DataFrame({"status": status, **matched}, index=numbers.index)
    return keys, numbers


def text_row(number: int, **fields: Any) -> dict[str, Any]:
    return {"instruction": f"What is {number}?", "output": "x" * (number + 1), **fields}


def write_rows(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_scores(directory: Path, sources: dict[str, Path], **columns: list[Any]) -> str:
    """What gradjax score writes, over all rows of the sources in order."""
    keys, data = [], {}
    for group, path in sources.items():
        rows = read_rows(Source(group, str(path)))
        keys += [(group, number, row_hash(row)) for number, row in enumerate(rows)]
        data[group] = {"source": str(path), "rows": len(rows), "hash": "any"}
    table = pd.DataFrame(keys, columns=["group", "example_id", "row_hash"])
    table = table.assign(status="ok", reason=None).to_dict("list")
    (directory / "scores").mkdir(parents=True)
    pq.write_table(pa.table({**table, **columns}), directory / "scores" / "000000.parquet")
    (directory / "score.json").write_text(json.dumps({"data": data}))
    return str(directory)


def select(output: Path, by: str = "m", scores: Any = (), data: Any = (), **flags: Any) -> Path:
    own = ("layers", "projections", "overwrite")
    over = {name: flags.pop(name) for name in own if name in flags}
    config = SelectConfig(
        rule(by, **flags), tuple(scores), tuple(data), output_dir=str(output), **over
    )
    return write_selection(config).directory


def files_in(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()}


values = st.lists(st.sampled_from([None, 0.0, 1.0, 2.0, 2.5, np.inf]), min_size=1, max_size=40)


class TestChoose:
    @hypothesis.given(values, st.integers(0, 20), st.integers(0, 20), st.data())
    def test_every_row_is_chosen_or_has_a_reason(self, m, top, bottom, data):
        hypothesis.assume(top + bottom > 0)
        flags = {n: k for n, k in (("top", top), ("bottom", bottom)) if k}
        status = data.draw(st.lists(st.sampled_from(["ok", "too_long"]), min_size=len(m)))
        keys, metrics = frames(m=m, status=status[: len(m)])
        numbers = metrics["m"].where(keys["status"] == "ok").replace(np.inf, np.nan).dropna()
        if top + bottom > len(numbers):
            with pytest.raises(GradjaxError, match=r"can be chosen|would share"):
                choose(keys, metrics, rule(**flags))
            return
        choice = choose(keys, metrics, rule(**flags))
        chosen = np.concatenate(list(choice.parts.values()))
        assert len(chosen) == len(set(chosen)) == top + bottom
        assert set(chosen) == {i for i, why in enumerate(choice.why) if why == ""}
        ordered = sorted(numbers)
        for name, expected in (("high", ordered[::-1][:top]), ("low", ordered[:bottom])):
            if expected:
                assert list(numbers[choice.parts[name]]) == expected
                cutoff, end = choice.cutoffs[name], expected[-1]
                assert (cutoff.value, cutoff.tied) == (end, ordered.count(end))
                assert cutoff.taken == expected.count(end)
                lost = [i for i, why in enumerate(choice.why) if why.startswith("lost a tie")]
                assert set(numbers[lost]) <= {c.value for c in choice.cutoffs.values()}
        unusable = [i for i in range(len(m)) if i not in numbers.index]
        kinds = {"too_long", "m is null", "m is infinite"}
        assert {choice.why[i] for i in unusable} <= kinds
        assert not kinds & {choice.why[i] for i in numbers.index}

    def test_ties_are_drawn_by_seed(self):
        keys, metrics = frames(m=[0.0] + [1.0] * 10 + [2.0])
        drawn = [choose(keys, metrics, rule(top=4, seed=s)).parts["high"] for s in range(300)]
        again = choose(keys, metrics, rule(top=4, seed=299)).parts["high"]
        assert list(drawn[-1]) == list(again)
        counts = np.bincount(np.concatenate(drawn), minlength=12)
        assert (counts[0], counts[11]) == (0, 300)
        # 3 of 10 each time: 90 times each, with a standard deviation of 8.
        assert (abs(counts[1:11] - 90) < 40).all()

    def test_shares_are_of_usable_rows_and_rounded_down(self):
        keys, metrics = frames(m=[*range(29), None])
        choice = choose(keys, metrics, rule(top="10%", bottom="50%", random="6.9%"))
        assert {n: len(p) for n, p in choice.parts.items()} == {"high": 2, "low": 14, "random": 2}
        thousand = frames(m=range(1000))
        assert len(choose(*thousand, rule(top="0.7%")).parts["high"]) == 7
        assert len(choose(*thousand, rule(top="29%")).parts["high"]) == 290

    def test_a_range_is_all_that_lies_in_it_or_what_is_chosen_from(self):
        keys, metrics = frames(m=[5, 1, 2, 3, 4, None])
        alone = choose(keys, metrics, rule(range="2:4"))
        assert list(alone.parts["range"]) == [4, 3, 2]
        outside = "outside --range=2:4"
        assert list(alone.why) == [outside, outside, "", "", "", "m is null"]
        both = choose(keys, metrics, rule(range=":4", top=2))
        assert list(both.parts["high"]) == [4, 3]
        assert list(both.why[:3]) == [
            "outside --range=-inf:4",
            "below the cutoff",
            "below the cutoff",
        ]

    def test_random_rows_are_of_all_usable_ones(self):
        keys, metrics = frames(m=[*range(9), None])
        drawn = [choose(keys, metrics, rule(random=3, seed=s)).parts["random"] for s in range(300)]
        assert all(len(set(rows)) == 3 for rows in drawn)
        counts = np.bincount(np.concatenate(drawn), minlength=10)
        assert counts[9] == 0
        assert (abs(counts[:9] - 100) < 45).all()
        # As a baseline they do not depend on what else is chosen.
        other = choose(keys, metrics, rule(top=4, random=3, seed=7))
        assert list(other.parts["random"]) == list(drawn[7])

    def test_several_metrics_count_by_percentile(self):
        rng = np.random.default_rng(0)
        keys, metrics = frames(a=rng.lognormal(size=31).round(1), b=rng.normal(size=31))
        metrics.loc[3, "a"] = np.nan
        value = choose(keys, metrics, rule("a*2,b*-0.5", top=1)).value
        shares = metrics.dropna().rank(pct=True) - 0.5 / 30
        expected = 2 * shares["a"] - 0.5 * shares["b"]
        np.testing.assert_allclose(value, expected.reindex(range(31)), atol=1e-12)

    def test_random_rows_are_of_the_range(self):
        keys, metrics = frames(m=[*range(9), None])
        for flags in ({}, {"top": 1}):
            choice = choose(keys, metrics, rule(range="2:5", random="75%", **flags))
            assert len(choice.parts["random"]) == 3
            assert set(choice.parts["random"]) <= {2, 3, 4, 5}
        with pytest.raises(GradjaxError, match=r"--random=5 is 5 rows: expected 1 to 4, as 4 of"):
            choose(keys, metrics, rule(range="2:5", random=5))

    @pytest.mark.parametrize("metric", ["ifd", "ifd_gpt2", "ifd_qwen7b", "ifd_loss_ratio"])
    def test_an_ifd_outside_its_bounds_is_not_usable(self, metric: str):
        keys, metrics = frames(**{metric: [0, 1, -0.1, 1.1, None]})
        why = choose(keys, metrics, rule(metric, bottom=2)).why
        outside = f"{metric} is outside 0 to 1"
        assert list(why) == ["", "", outside, outside, f"{metric} is null"]

    @pytest.mark.parametrize(
        "metric", ["perplexity", "ppl_gpt2", "ppl_qwen7b", "perplexity_without_instruction"]
    )
    def test_a_perplexity_over_its_bound_is_not_usable(self, metric: str):
        keys, metrics = frames(**{metric: [10_000, 10_001, 3], "ifd": [0.2, 0.1, 0.3]})
        assert list(choose(keys, metrics, rule(metric, top=1)).parts["high"]) == [0]
        assert list(choose(keys, metrics, rule("ifd", bottom=1)).parts["low"]) == [1]

    @pytest.mark.parametrize("metric", ["ifd_rank", "ifd_qwen_rank", "perplexity_bin", "ppl", "m"])
    def test_other_numbers_have_no_bounds(self, metric: str):
        keys, metrics = frames(**{metric: [-1, 500, 20_000]})
        assert list(choose(keys, metrics, rule(metric, top=3)).parts["high"]) == [2, 1, 0]

    def test_rows_outside_the_bounds_are_counted(self, tmp_path: Path):
        rows = [text_row(i, perplexity=10.0**i) for i in range(9)]
        path = write_rows(tmp_path / "g.jsonl", rows)
        config = SelectConfig(
            rule("perplexity", bottom=1), data=(str(path),), output_dir=str(tmp_path / "out")
        )
        assert write_selection(config).text.startswith(
            "5 of 9 rows can be ranked by perplexity; of 4 perplexity is outside 0 to 10000, the "
            "paper's bounds\n"
        )


class TestMatchLength:
    def test_sides_become_equally_long(self, tmp_path: Path):
        rng = np.random.default_rng(0)
        lengths = np.exp(rng.normal(5, 1, 2000)).astype(int) + 1
        m = 0.3 * np.log(lengths) + rng.normal(size=2000)
        path = write_rows(tmp_path / "g.jsonl", [text_row(n - 1) for n in lengths])
        scores = write_scores(tmp_path / "s", {"g": path}, m=m)

        def summary_of(**flags: Any) -> dict[str, Any]:
            directory = select(tmp_path / "selected", scores=[scores], **flags)
            return json.loads((directory / "summary.json").read_text())

        plain = summary_of(top=100, bottom=100)
        (tmp_path / "selected" / "summary.json").unlink()
        matched = summary_of(top=100, bottom=100, match_length=True)
        assert plain["length_auroc"] > 0.7
        assert abs(matched["length_auroc"] - 0.5) < 0.05
        rows = {p: pd.read_parquet(tmp_path / "selected" / f"{p}.parquet") for p in ("high", "low")}
        assert len(rows["high"]) == len(rows["low"]) == matched["pairs"] > 80  # of equal rows one
        assert rows["low"]["m"].max() <= np.median(m)
        apart = np.log(rows["high"]["output"].str.len() / rows["low"]["output"].str.len())
        assert apart.abs().max() < 0.3  # a quarter of a standard deviation
        table = pd.read_parquet(tmp_path / "selected" / "pairs.parquet")
        for part in ("high", "low"):
            assert list(table[f"{part}_row_hash"]) == list(rows[part]["row_hash"])
            assert list(table[f"{part}_length"]) == list(rows[part]["output"].str.len())
        rejected = pd.read_parquet(tmp_path / "selected" / "rejected.parquet")["reason"]
        counts = rejected.value_counts()
        assert len(rejected) == 2000 - 2 * matched["pairs"]
        assert counts["not the partner of a high row"] == 1000 - matched["pairs"]

    def test_prompts_become_equally_long(self):
        """Prompts that follow the metric as much as responses do."""
        rng = np.random.default_rng(1)
        size = 4000
        m, prompt = rng.normal(size=size), np.exp(rng.normal(5, 1, size)).astype(int)
        length = np.exp(0.6 * m + rng.normal(5, 0.8, size)).astype(int) + 1
        m += 0.8 * np.log(prompt + 1)
        keys, metrics = frames(m=m, length=length, prompt_length=prompt, prompt=np.arange(size))
        choice = choose(keys, metrics, rule(top=300, match_length=True))
        high, low = choice.parts["high"], choice.parts["low"]
        assert len(high) == len(low) == len(set(low)) > 100
        for column in ("length", "prompt_length"):
            logs = np.log1p(keys[column].to_numpy())
            spread = np.sqrt((logs[m > np.median(m)].var() + logs[m <= np.median(m)].var()) / 2)
            assert abs(logs[high].mean() - logs[low].mean()) < 0.25 * spread
        # The report's own rule takes the selected rows for comparable.
        rows = [
            Rows(length[of], prompt[of], of.astype(np.uint64), of.astype(np.uint64))
            for of in (high, low)
        ]
        assert match(*rows).share > 0.7

    def test_rows_of_one_prompt_come_first(self):
        """A partner of the same prompt is taken, one that is nearer in length left to others."""
        keys, metrics = frames(
            m=np.arange(12),
            length=[12, 100, 30, 31, 29, 300, 33, 34, 35, 36, 100, 13],
            prompt_length=50,
            prompt=[7, 1, 2, 3, 4, 5, 6, 70, 8, 9, 10, 7],
        )
        choice = choose(keys, metrics, rule(top=2, match_length=True))
        assert [list(choice.parts[part]) for part in ("high", "low")] == [[11, 10], [0, 1]]

    def test_of_equally_near_rows_the_lowest_is_taken(self):
        keys, metrics = frames(m=np.arange(20), length=[5, 50] * 10)
        choice = choose(keys, metrics, rule(top=4, match_length=True))
        assert [list(choice.parts[part]) for part in ("high", "low")] == [
            [19, 18, 17, 16],
            [1, 0, 3, 2],
        ]

    def test_high_rows_without_a_partner_are_left_out(self):
        keys, metrics = frames(
            m=np.arange(12), length=[30, 31, 32, 33, 34, 35] + [900] * 4 + [31, 33]
        )
        choice = choose(keys, metrics, rule(top=3, match_length=True))
        assert [list(choice.parts[part]) for part in ("high", "low")] == [[11, 10], [3, 1]]
        assert choice.why[9] == "no row of like length is free in the lower half"
        assert choice.why[0] == "not the partner of a high row"

    def test_equal_rows_count_once(self):
        text = [0, 1, 2, 3, 4, 5, 0, 7, 8, 9, 10, 10]
        lengths = [5, 9, 5, 9, 5, 9, 5, 9, 9, 5, 5, 5]
        keys, metrics = frames(m=np.arange(12), length=lengths, text=text)
        choice = choose(keys, metrics, rule(top=3, match_length=True))
        assert list(choice.parts["high"]) == [11, 9]
        assert choice.why[10] == "equals another high row"

    def test_where_no_row_is_alike_nothing_is_chosen(self):
        keys, metrics = frames(m=np.arange(8), length=[5, 6, 5, 6, 7, 900, 1000, 950])
        with pytest.raises(GradjaxError, match="--top=2 with --match_length: none of these rows"):
            choose(keys, metrics, rule(top=2, match_length=True))

    def test_lengths_are_of_whole_responses(self, tmp_path: Path):
        order = [3, 9, 1, 6, 4, 0, 8, 2, 6, 4]
        path = write_rows(tmp_path / "g.jsonl", [text_row(i) for i in order])
        cut = {"num_target_tokens": [1] * 10}  # as by a model's window
        scores = write_scores(tmp_path / "s", {"g": path}, m=list(range(10)), **cut)
        directory = select(tmp_path / "out", scores=[scores], top=2, match_length=True)
        lengths = [
            len(row["output"]) for row in read_rows(Source("", str(directory / "low.jsonl")))
        ]
        assert lengths == [5, 7]  # as the high ones
        alone = select(tmp_path / "alone", scores=[scores], top=2)
        (part,) = json.loads((alone / "summary.json").read_text())["parts"]
        assert part["geometric_mean_characters"] == pytest.approx((5 * 7) ** 0.5)

    @pytest.mark.parametrize("flags", [{"match_length": True}, {"bottom": 50}])
    def test_sides_of_one_value_are_warned_of(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture, flags: dict[str, Any]
    ):
        same = {"output": "as long"}
        rows = [text_row(1000 + i, **same, m=3 if i < 450 else i) for i in range(500)]
        path = write_rows(tmp_path / "g.jsonl", rows)
        directory = select(tmp_path / "all", data=[str(path)], top=51, **flags)
        assert "high and low share the value 3" in caplog.text
        cutoffs = json.loads((directory / "summary.json").read_text())["cutoffs"]
        assert [cutoff["tied"] for cutoff in cutoffs] == [450, 450]
        assert [cutoff["taken"] for cutoff in cutoffs] == [1, 51 if "match_length" in flags else 50]
        caplog.clear()
        select(tmp_path / "higher", data=[str(path)], top=50, **flags)
        assert "share the value" not in caplog.text

    def test_a_row_of_unknown_length_is_not_usable(self):
        keys, metrics = frames(m=[1, 2, 3, 4], length=[5, np.nan, 5, 5])
        choice = choose(keys, metrics, rule(top=1, match_length=True))
        assert choice.why[1] == "its length is not known"
        assert [list(choice.parts[p]) for p in ("high", "low")] == [[3], [0]]


# Kills itself where one more file is about to be put in its place.
KILLED = """
import os, signal
from pathlib import Path
put, left = Path.replace, list(range({files}))
def count(self, target):
    left.pop() if left else os.kill(os.getpid(), signal.SIGKILL)
    return put(self, target)
Path.replace = count
import sys
from gradjax.cli.app import main
main(["select", *sys.argv[1:]])
"""
HOSTILE: list[Any] = [
    {"instruction": "a\u2028b\u2029c\x85d\r\ne\x0b", "output": "\ufeff<b>\x00\x1b[31m", "m": 9},
    {"instruction": "NaN", "output": "x", "m": 8, "other": float("nan"), "big": 10**400},
    {
        "instruction": "half",
        "output": "x",
        "m": 7,
        "extra": "\ud800",
        "z": {"b": [1, {}], "a": None},
    },
    {"messages": [{"role": "user", "content": "é"}, {"role": "assistant", "content": "ü"}] * 2}
    | {"m": 6},
    {"messages": [{"role": r, "content": r} for r in ("system", "user", "assistant")], "m": 5},
    {"instruction": "q", "input": "with", "output": " spaced ", "m": 4, "\ud800": 1, "\n": 2},
    {"instruction": "q", "output": "", "m": 3},
    ["no", "object"],
    {"instruction": "q", "output": 7, "m": 2},
    {"instruction": "q", "output": "no m", "m": "5"},
    {"instruction": "q", "output": "big m", "m": 10**400},
]


class TestFiles:
    def test_rows_stand_as_in_their_source(self, tmp_path: Path):
        path = write_rows(tmp_path / "g.jsonl", HOSTILE)
        directory = select(tmp_path / "out", data=[str(path)], top=6)
        rows = read_rows(Source("", str(directory / "high.jsonl")))
        expected = [HOSTILE[0], HOSTILE[1] | {"other": None}, *HOSTILE[2:6]]  # NaN is no JSON
        assert json.dumps(rows) == json.dumps(expected)
        assert len((directory / "high.jsonl").read_text().splitlines()) == 6  # one line each
        table = read_rows(Source("", str(directory / "high.parquet")))
        for row, again in zip(HOSTILE, table, strict=False):
            assert to_example(again, "", 0).messages == to_example(row, "", 0).messages
        assert [row["m"] for row in table] == [9, 8, 7, 6, 5, 4]
        assert [row["row_hash"] for row in table] == [row_hash(row) for row in HOSTILE[:6]]
        rejected = pd.read_parquet(directory / "rejected.parquet")
        assert list(rejected["example_id"]) == [6, 7, 8, 9, 10]
        reasons = list(rejected["reason"])
        assert [reason.partition(":")[0] for reason in reasons] == [
            *("empty_response", "invalid_row", "invalid_row"),
            *("m is null", "m is null"),
        ]
        assert reasons[1] == "invalid_row: the row is a list, expected an object"

    @pytest.mark.parametrize("kind", ["json", "parquet"])
    def test_rows_of_other_formats_keep_their_hash(self, tmp_path: Path, kind: str):
        rows = [text_row(i, when=pd.Timestamp(i, unit="D"), raw=b"\xff", m=i) for i in range(3)]
        path = tmp_path / f"g.{kind}"
        if kind == "json":
            path.write_text(json.dumps([text_row(i, m=i) for i in range(3)], indent=1))
        else:
            pq.write_table(pa.Table.from_pylist(rows), path)
        directory = select(tmp_path / "out", data=[str(path)], top=3)
        written = read_rows(Source("", str(directory / "high.jsonl")))
        there = read_rows(Source("", str(path)))
        assert [row_hash(row) for row in written] == [row_hash(row) for row in there[::-1]]

    def test_selected_and_rejected_are_all_rows_once(self, tmp_path: Path):
        paths = {
            name: write_rows(tmp_path / f"{name}.jsonl", [text_row(i, of=name) for i in range(n)])
            for name, n in (("b", 7), ("a", 5))
        }
        m = [1, 2, 2, 2, None, 9, 0, 2, 7, 2, 2, -3]
        reasons = [None] * 4 + ["the prompt fills the window"] + [None] * 7
        scores = write_scores(tmp_path / "s", paths, m=m, reason=reasons)
        directory = select(tmp_path / "out", scores=[scores], top=3, bottom=4)
        tables = {p.stem: pd.read_parquet(p) for p in directory.glob("*.parquet")}
        keys = pd.concat(tables.values())[["group", "example_id"]]
        assert sorted(map(tuple, keys.to_numpy())) == sorted(
            [("b", i) for i in range(7)] + [("a", i) for i in range(5)]
        )
        assert list(tables["high"]["m"]) == [9, 7, 2]
        assert list(tables["low"]["m"]) == [-3, 0, 1, 2]
        counts = tables["rejected"]["reason"].str.partition(" at ")[0].value_counts().to_dict()
        assert counts == {"lost a tie": 4, "m is null: the prompt fills the window": 1}
        for part in ("high", "low"):
            rows = read_rows(Source("", str(directory / f"{part}.jsonl")))
            assert [row["of"] for row in rows] == list(tables[part]["group"])
        summary = json.loads((directory / "summary.json").read_text())
        assert summary["cutoffs"][0] == {"of": "high", "value": 2, "tied": 6, "taken": 1}
        assert (summary["rows"], summary["usable"]) == (12, 11)
        assert summary["distributions"][0] == {
            "metric": "m",
            "rows": 11,
            "null": 1,
            "min": -3,
            "q1": 1.5,
            "median": 2,
            "q3": 2,
            "max": 9,
        }

    def test_overlap_with_other_metrics(self, tmp_path: Path):
        path = write_rows(tmp_path / "g.jsonl", [text_row(i) for i in range(20)])
        up, number = list(range(20)), {"num_target_tokens": [5] * 20}
        columns = {"m": up, "same": up, "opposite": up[::-1], "shifted": [*up[2:], 0, 1], **number}
        scores = write_scores(tmp_path / "s", {"g": path}, **columns)
        directory = select(tmp_path / "out", scores=[scores], top=4, bottom=4)
        found = json.loads((directory / "summary.json").read_text())["overlap"]
        common = {row["metric"]: (row["high_common"], row["low_common"]) for row in found}
        assert common.pop("num_target_tokens")
        assert common == {"same": (4, 4), "opposite": (0, 0), "shifted": (2, 2)}
        shifted = next(row for row in found if row["metric"] == "shifted")
        assert shifted["high_jaccard"] == pytest.approx(2 / 6)
        assert shifted["high_by_chance"] == pytest.approx(4 * 4 / 20)

    def test_chance_is_of_the_rows_that_either_may_choose_from(self, tmp_path: Path):
        path = write_rows(tmp_path / "g.jsonl", [text_row(i) for i in range(20)])
        # m chooses from 2 to 17, ifd from 10 to 19: 8 of 16 and of 10 rows are the same.
        ifd = [2.0] * 10 + [i / 10 for i in range(10)]
        scores = write_scores(tmp_path / "s", {"g": path}, m=list(range(20)), ifd=ifd)
        directory = select(tmp_path / "out", scores=[scores], top=4, range="2:17")
        (found,) = json.loads((directory / "summary.json").read_text())["overlap"]
        assert found["high_by_chance"] == pytest.approx(8 * 4 / 16 * 4 / 10)

    @pytest.mark.parametrize(("by", "others"), [("m*2", ["n"]), ("m*-1", ["m", "n"])])
    def test_overlap_is_with_other_rankings(self, tmp_path: Path, by: str, others: list[str]):
        path = write_rows(tmp_path / "g.jsonl", [text_row(i, m=i, n=-i) for i in range(9)])
        directory = select(tmp_path / "out", by=by, data=[str(path)], top=2)
        found = json.loads((directory / "summary.json").read_text())["overlap"]
        assert [row["metric"] for row in found] == others

    def test_equal_rows_of_a_part_are_counted(self, tmp_path: Path):
        rows = [text_row(i // 3, m=i // 3) for i in range(9)]  # each three times
        path = write_rows(tmp_path / "g.jsonl", rows)
        directory = select(tmp_path / "out", data=[str(path)], top=5, bottom=1)
        parts = json.loads((directory / "summary.json").read_text())["parts"]
        assert {part["part"]: part["duplicates"] for part in parts} == {"high": 3, "low": 0}

    def test_again_is_the_same_and_other_settings_are_refused(self, tmp_path: Path):
        path = write_rows(tmp_path / "g.jsonl", [text_row(i, m=i % 3) for i in range(30)])
        flags = {"data": [str(path)], "top": 5}
        first = files_in(select(tmp_path / "out", random=3, **flags))
        assert files_in(select(tmp_path / "out", random=3, **flags)) == first
        for other in ({"random": 3, "seed": 1}, {}):
            with pytest.raises(GradjaxError, match=r"other settings: (random|seed) .*--overw"):
                select(tmp_path / "out", **flags, **other)
        config = SelectConfig(rule(top=5), data=(str(path),), output_dir=str(tmp_path / "out"))
        with pytest.raises(GradjaxError, match=r"other settings: random \('3' there"):
            write_selection(config)
        assert files_in(tmp_path / "out") == first
        write_selection(SelectConfig(**{**vars(config), "overwrite": True}))
        kept = files_in(tmp_path / "out")
        assert set(kept) == {"high.jsonl", "high.parquet", "rejected.parquet", "summary.json"}
        assert kept["high.jsonl"] == first["high.jsonl"]
        (tmp_path / "yours").mkdir()
        (tmp_path / "yours" / "summary.json").write_text('{"rows": 3}')
        for overwrite in (False, True):
            with pytest.raises(GradjaxError, match=r"summary\.json is damaged"):
                select(tmp_path / "yours", **flags, overwrite=overwrite)
        assert files_in(tmp_path / "yours") == {"summary.json": b'{"rows": 3}'}
        (tmp_path / "mine").mkdir()
        (tmp_path / "mine" / "notes.txt").touch()
        with pytest.raises(GradjaxError, match=r"not a selection \(found notes.txt\)"):
            select(tmp_path / "mine", **flags)

    @pytest.mark.parametrize("files", [0, 3])
    def test_killed_half_way_it_leaves_no_half_file(self, tmp_path: Path, files: int):
        path = write_rows(tmp_path / "g.jsonl", [text_row(i, m=i) for i in range(50)])
        whole = files_in(select(tmp_path / "whole", data=[str(path)], top=9, bottom=9))
        old = files_in(select(tmp_path / "out", data=[str(path)], top=2, random=5))
        script = KILLED.format(files=files)
        flags = [
            f"--data={path}",
            "--by=m",
            "--top=9",
            "--bottom=9",
            f"--output_dir={tmp_path}/out",
        ]
        command = [sys.executable, "-c", script, *flags, "--overwrite"]
        killed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        left = files_in(tmp_path / "out")
        assert "summary.json" not in left
        assert all(data in (whole[name], old.get(name)) for name, data in left.items())
        assert sum(data == whole[name] for name, data in left.items()) == files
        select(tmp_path / "out", data=[str(path)], top=9, bottom=9)
        assert files_in(tmp_path / "out") == whole

    def test_the_program_writes_groups_for_a_run(self, tmp_path: Path):
        path = write_rows(tmp_path / "g.jsonl", [text_row(i, m=i) for i in range(40)])
        scores = write_scores(tmp_path / "s", {"g": path}, m=list(range(40)))
        command = [sys.executable, "-m", "gradjax.select", f"--scores={scores}", "--by=m"]
        done = subprocess.run(
            [*command, "--top=10%", "--bottom=4", "--random=5"],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        assert "40 of 40 rows can be ranked by m" in done.stdout
        assert "The selection is in selections/m" in done.stdout
        for part, count in (("high", 4), ("low", 4), ("random", 5)):
            rows = read_rows(Source(part, str(tmp_path / "selections" / "m" / f"{part}.jsonl")))
            assert [to_example(row, part, 0).status for row in rows] == ["ok"] * count


class TestScores:
    def test_directories_are_joined_in_any_order(self, tmp_path: Path):
        path = write_rows(tmp_path / "g.jsonl", [text_row(i) for i in range(9)])
        tokens = [3, 1, 4, 1, 5, 9, 2, 6, 5]
        first = {"a": list(range(9)), "num_target_tokens": tokens, "loss": [1.0] * 9}
        second = {"b": [8.5 - i for i in range(9)], "num_target_tokens": tokens, "loss": [2.0] * 9}
        second |= {"status": ["ok"] * 8 + ["too_long"], "reason": [None] * 8 + ["5000 tokens"]}
        scores = [
            write_scores(tmp_path / "1", {"g": path}, **first),
            write_scores(tmp_path / "2", {"g": path}, **second),
        ]
        flags = {"by": "a*2,b", "top": 3, "bottom": 3}
        one = files_in(select(tmp_path / "o", scores=scores, **flags))
        assert files_in(select(tmp_path / "o", scores=scores[::-1], **flags)) == one
        table = pd.read_parquet(tmp_path / "o" / "high.parquet")
        assert list(table["example_id"]) == [7, 6, 5]
        assert {"a", "b", "num_target_tokens"} < set(table.columns)
        assert "loss" not in table.columns  # it differs
        rejected = pd.read_parquet(tmp_path / "o" / "rejected.parquet").set_index("example_id")
        assert rejected.loc[8, "reason"] == "too_long: 5000 tokens"
        with pytest.raises(GradjaxError, match=r"--by=loss: .*2 has other numbers of it"):
            select(tmp_path / "p", by="loss", scores=scores, top=1)

    def test_a_run_gives_its_statistics(self, tmp_path: Path):
        rng = np.random.default_rng(0)
        target, prompt = rng.integers(3, 99, (2, 11))
        norms, ranks = rng.lognormal(size=(2, 11))
        group = Group(target, prompt, norms, ranks, empty=2)
        data = {"g": {"source": "g", "rows": 13}}
        run = str(write_run(tmp_path / "run", {"g": group}, data=data))
        scored = read_scored([run], [], ["effective_rank"], "0-1", ["k"])
        # Layers 0 and 1 have 1 and 8/7 times the rank, k has 6/5 times.
        expected = ranks * (1 + 8 / 7) / 2 * 6 / 5
        np.testing.assert_allclose(scored.metrics["effective_rank"][:11], expected)
        choice = choose(scored.keys, scored.metrics, rule("effective_rank", top=4))
        assert list(choice.parts["high"]) == list(np.argsort(-ranks)[:4])
        assert list(choice.why[11:]) == ["empty_response"] * 2

    def test_a_metric_may_be_a_field_of_the_rows(self, tmp_path: Path):
        rows = [text_row(i, diff=10 - i, ifd_gpt2=i / 5) for i in range(9)]
        path = write_rows(tmp_path / "g.jsonl", rows)
        scores = write_scores(tmp_path / "s", {"g": path}, m=list(range(9)))
        select(tmp_path / "out", by="diff", scores=[scores], bottom=2)
        assert list(pd.read_parquet(tmp_path / "out" / "low.parquet")["diff"]) == [2, 3]
        select(tmp_path / "alone", by="ifd_gpt2", data=[str(path)], top=1)
        table = pd.read_parquet(tmp_path / "alone" / "high.parquet")
        assert list(table["ifd_gpt2"]) == [1]
        assert list(table["diff"]) == [5]

    def test_a_table_has_no_part_of_a_row_with_tool_calls(self, tmp_path: Path, caplog):
        call = {"role": "assistant", "content": "5", "tool_calls": [{"name": "add"}]}
        turns = [{"role": "user", "content": "2 + 3"}, call]
        rows = [text_row(0, m=1), {"messages": turns, "m": 2}]
        path = write_rows(tmp_path / "g.jsonl", rows)
        directory = select(tmp_path / "out", data=[str(path)], top=2)
        whole, table = (
            read_rows(Source("", str(directory / name))) for name in ("high.jsonl", "high.parquet")
        )
        assert whole == rows[::-1]
        assert to_example(table[0], "", 0).status == "invalid_row"
        assert to_example(table[1], "", 0).status == "ok"
        assert "1 rows have tool calls or thoughts" in caplog.text

    def test_how_data_are_read_needs_data(self):
        with pytest.raises(GradjaxError, match="say how --data is read, which is not given"):
            SelectConfig(rule(top=1), ("scores",), reading=Reading(columns=("output=answer",)))

    def test_the_source_may_have_more_rows_than_were_scored(self, tmp_path: Path):
        rows = [text_row(i) for i in range(9)]
        some = write_rows(tmp_path / "some.jsonl", rows[:4])
        scores = write_scores(tmp_path / "s", {"g": some}, m=[1, 2, 3, 4])
        whole = write_rows(tmp_path / "whole.jsonl", rows)
        select(tmp_path / "out", scores=[scores], data=[f"g={whole}"], top=1)
        assert read_rows(Source("", str(tmp_path / "out" / "high.jsonl"))) == [rows[3]]


class TestFaults:
    """Each is one sentence that says what to do."""

    @pytest.fixture
    def path(self, tmp_path: Path) -> Path:
        return write_rows(tmp_path / "g.jsonl", [text_row(i, f=i) for i in range(5)])

    @pytest.fixture
    def scores(self, tmp_path: Path, path: Path) -> str:
        m = [0, 1, 2, 3, None]
        return write_scores(tmp_path / "s", {"g": path}, m=m, num_target_tokens=[7] * 5)

    @pytest.mark.parametrize(
        ("flags", "message"),
        [
            ({}, r"nothing is selected: expected --top, --bottom, --range or --random"),
            ({"top": 0}, r"--top=0: expected a number of rows or a share of them"),
            ({"top": "-3"}, r"--top=-3: expected a number"),
            ({"bottom": "101%"}, r"--bottom=101%: expected"),
            ({"random": "a"}, r"--random=a: expected"),
            ({"top": 5}, r"--top=5 is 5 rows: expected 1 to 4, as 4 of 5 .*1 times m is null"),
            ({"top": "1%"}, r"--top=1% is 0 rows: expected 1 to 4"),
            ({"top": 2, "bottom": 3}, r"--top=2 and --bottom=3 would share rows: .* most 4"),
            ({"random": 5}, r"--random=5 is 5 rows: expected 1 to 4, .*\(1 times m is null\)"),
            ({"range": "3:2"}, r"--range=3:2: expected LOW:HIGH"),
            ({"range": ":"}, r"--range=:: expected LOW:HIGH"),
            ({"range": "nan:"}, r"--range=nan:: expected LOW:HIGH"),
            ({"range": "7:8"}, r"no row can be chosen: 4 times outside --range=7:8, 1 times m is"),
            ({"range": "7:8", "top": 1}, r"no row can be chosen: 4 times outside"),
            ({"range": "3:", "top": 2}, r"--top=2 is 2 rows: expected 1, as 1 of 5 rows"),
            ({"top": 1, "layers": "0"}, r"--layers=0 says over .* no --scores is a run"),
            ({"top": 1, "projections": ("k",)}, r"--projections=k says over .* no --scores is"),
            ({"bottom": 1, "match_length": True}, r"--match_length .* expected --top"),
            ({"top": 1, "bottom": 2, "match_length": True}, r"--bottom=2: with --match_length"),
            ({"top": 3, "match_length": True}, r"--top=3 with --match_length: .* at most 2"),
            ({"top": 1, "seed": -1}, r"--seed=-1"),
            ({"top": 1, "by": "m*"}, r"--by=m\*: 'm\*' is not METRIC or METRIC\*WEIGHT"),
            ({"top": 1, "by": "m*0"}, r"weight other than 0"),
            ({"top": 1, "by": "m,,f"}, r"'' is not METRIC"),
            ({"top": 1, "by": "m,m*2"}, r"m is named twice"),
            ({"top": 1, "by": "M"}, r"--by=M: neither .* known metrics: m, num_target_tokens"),
            ({"top": 1, "by": "example_id"}, r"--by=example_id: neither"),
            ({"top": 1, "data": ["h=x.jsonl"]}, r"--data names the group 'h', which .* have g:"),
            ({"top": 1, "scores": ["nowhere"]}, r"--scores=nowhere has neither score.json nor"),
            ({"top": 1, "scores": []}, r"nothing to select from: expected --scores=DIR, or"),
        ],
    )
    def test_flags(self, tmp_path: Path, scores: str, flags: dict[str, Any], message: str):
        with pytest.raises(GradjaxError, match=message) as raised:
            select(tmp_path / "out", **{"scores": [scores], **flags})
        assert "\n" not in str(raised.value)
        assert not (tmp_path / "out").exists()

    def test_an_unknown_field_names_the_known_ones(self, tmp_path: Path, path: Path):
        with pytest.raises(GradjaxError, match=r"--by=g: not a number in .* known metrics: f$"):
            select(tmp_path / "out", by="g", data=[str(path)], top=1)

    def test_other_rows_than_were_scored(self, tmp_path: Path, path: Path, scores: str):
        rows = [text_row(i, f=i) for i in range(5)]
        write_rows(path, rows[:2])
        for by in ("m", "f"):  # of the rows' own fields all are checked
            with pytest.raises(GradjaxError, match=r"g.jsonl has no row [34], .* --data=g=SOURCE"):
                select(tmp_path / "out", by=by, scores=[scores], top=1)
        write_rows(path, [*rows[:3], text_row(7, f=3), rows[4]])
        for by in ("m", "f"):
            with pytest.raises(GradjaxError, match=r"g.jsonl has another row 3 than the one that"):
                select(tmp_path / "out", by=by, scores=[scores], top=1)
        select(tmp_path / "low", scores=[scores], bottom=3)  # these rows are still the same
        path.unlink()
        with pytest.raises(GradjaxError, match=r"'g' cannot be read: There is no file .*--data=g="):
            select(tmp_path / "out", scores=[scores], top=1)

    def test_scores_of_other_rows(self, tmp_path: Path, scores: str):
        shorter = write_rows(tmp_path / "shorter.jsonl", [text_row(i, f=i) for i in range(4)])
        other = write_rows(tmp_path / "other.jsonl", [text_row(i, f=-i) for i in range(5)])
        for source, rows, message in (
            (shorter, 4, r"s has row 4 of group 'g' and --scores=.*2 has not"),
            (other, 5, r"different rows as row 1 of group 'g'"),
        ):
            second = write_scores(tmp_path / source.stem / "2", {"g": source}, n=[1.0] * rows)
            for both in ([scores, second], [second, scores]):
                with pytest.raises(GradjaxError, match=message):
                    select(tmp_path / "out", scores=both, top=1)

    def test_damaged_scores(self, tmp_path: Path, scores: str):
        shard, manifest = Path(scores, "scores", "000000.parquet"), Path(scores, "score.json")
        whole, said = shard.read_bytes(), manifest.read_text()

        def fault() -> str:
            with pytest.raises(GradjaxError) as raised:
                select(tmp_path / "out", scores=[scores], top=1)
            assert "\n" not in str(raised.value)
            return str(raised.value)

        for damaged in (whole[: len(whole) // 2], b"PAR1", b""):
            shard.write_bytes(damaged)
            assert scores in fault()
        table = pq.read_table(pa.BufferReader(whole))
        pq.write_table(table.drop_columns("row_hash"), shard)
        assert "no column row_hash" in fault()
        pq.write_table(table.set_column(3, "status", pa.nulls(5, pa.string())), shard)
        assert "rows without status" in fault()
        pq.write_table(pa.concat_tables([table, table.slice(0, 1)]), shard)
        assert "scores of 6 of the 5 rows of group 'g'" in fault()
        pq.write_table(pa.concat_tables([table.slice(1), table.slice(1, 1)]), shard)
        assert "row 1 of group 'g' twice" in fault()
        pq.write_table(table.slice(1), shard)
        assert "scores of 4 of the 5 rows of group 'g'; let gradjax score finish" in fault()
        shard.unlink()
        assert "no scores yet; let gradjax score finish" in fault()
        shard.write_bytes(whole)
        for damaged in ("", "{}", "[]", '{"data": {"g": {"rows": 5}}}', said[:-9]):
            manifest.write_text(damaged)
            assert "is damaged" in fault()

    def test_a_place_that_cannot_be_written(self, tmp_path: Path, scores: str):
        with pytest.raises(GradjaxError, match=r"--output_dir=s3://a is a URL"):
            SelectConfig(rule(top=1), (scores,), output_dir="s3://a")
        (tmp_path / "file").touch()
        with pytest.raises(GradjaxError, match=r"cannot write to .*file"):
            select(tmp_path / "file", scores=[scores], top=1)


def test_python_selects_as_the_command_does(tmp_path):
    rows = [{"instruction": "q", "output": "a" * n, "score": n} for n in range(1, 8)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    written = gradjax.select(
        data=[str(tmp_path / "rows.json")],
        by="score",
        top=2,
        bottom="20%",
        output_dir=str(tmp_path / "o"),
    )
    assert "2" in written.text
    lines = (written.directory / "high.jsonl").read_text().splitlines()
    assert sorted(json.loads(line)["score"] for line in lines) == [6, 7]
    with pytest.raises(GradjaxError, match=r"--top=0"):
        gradjax.select(data=[str(tmp_path / "rows.json")], by="score", top=0)
    with pytest.raises(TypeError, match="nonsense"):
        gradjax.select(data=["x"], by="score", top=1, nonsense=2)
