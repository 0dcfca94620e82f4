"""The report of runs whose numbers are known: statistics, tables, files and faults."""

import dataclasses
import html
import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy.stats import mannwhitneyu, t
from statsmodels.stats.multitest import multipletests

import gradjax
from benchmarks.made_up_runs import SIDES, Group, write_run
from gradjax.config import RunConfig, SpectraConfig
from gradjax.errors import GradjaxError
from gradjax.report import figures
from gradjax.report.clusters import with_clusters
from gradjax.report.compare import (
    COLUMNS,
    Comparison,
    compare,
    difference,
    holm,
    ratio_columns,
    sentence,
    settled,
)
from gradjax.report.published import published
from gradjax.report.tables import similarity_table, spectra_table
from gradjax.report.write import ReportConfig, write_report
from gradjax.runs.run import run as run_spectra
from gradjax.storage.results import RunValues, example_values, read_values
from gradjax.structs import ATTENTION

ROOT = Path(__file__).parent.parent
STATISTICS = ("nuclear_norm", "effective_rank", "normalized_effective_rank", "loss")


def draw(
    seed: int, rows: int, length: float = 60, norm: float = 1, rank: float = 1, **rest
) -> Group:
    """Lognormal lengths about `length`; norms and ranks follow them, times the factors given."""
    rng = np.random.default_rng(seed)
    target = np.maximum(length * np.exp(0.6 * rng.standard_normal(rows)), 2).astype(int)
    noise = np.exp(0.2 * rng.standard_normal((2, rows)))
    return Group(
        target=target,
        prompt=rng.integers(3, 40, rows),
        norms=norm * noise[0] / target**0.5,
        ranks=rank * noise[1] * target / (target + 40),
        **rest,
    )


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    groups = {
        "long": draw(1, 97, length=80, norm=0.5, empty=3),
        "short": draw(2, 89),
        "same": draw(3, 83, length=80, norm=0.5),
    }
    return write_run(tmp_path_factory.mktemp("runs") / "run", groups)


@pytest.fixture(scope="module")
def compared(directory) -> Comparison:
    return compare(read_values(directory), "long", "short")


PAIRS = ("long:short", "long:same")


@pytest.fixture(scope="module")
def program(directory) -> subprocess.CompletedProcess:
    """`python -m gradjax.report`, which has written the run's report."""
    command = [sys.executable, "-m", "gradjax.report", f"--run={directory}"]
    command += [f"--compare={pair}" for pair in PAIRS]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def report(directory, program) -> Path:
    assert program.returncode == 0, program.stderr
    return directory / "report"


@pytest.fixture
def no_figures(monkeypatch) -> None:
    """Drawing takes seconds."""
    monkeypatch.setattr(figures, "save", lambda _, path: path.with_suffix(".svg").touch())


def by_example(directory: Path, group: str, statistic: str, projection: str) -> np.ndarray:
    """An example's value, from the Parquet files themselves."""
    if statistic == "loss":
        examples = pd.read_parquet(directory / "examples")
        return examples[examples["group"] == group]["loss"].dropna().to_numpy()
    spectra = pd.read_parquet(directory / "spectra")
    spectra = spectra[spectra["group"] == group]
    if statistic == "normalized_effective_rank":
        examples = pd.read_parquet(directory / "examples")
        tokens = {(g, i): n for g, i, n in examples[["group", "example_id", "num_tokens"]].values}
        most = [
            min(*SIDES, tokens[key])
            for key in zip(spectra["group"], spectra["example_id"], strict=True)
        ]
        spectra["normalized_effective_rank"] = spectra["effective_rank"] / most
    if projection != "all":
        spectra = spectra[spectra["projection"] == projection]
    return spectra.groupby("example_id")[statistic].mean().to_numpy()


def test_comparisons_are_what_their_columns_say(directory, report):
    table = pd.read_csv(report / "comparisons.csv")
    assert list(table.columns) == COLUMNS
    expected = [
        (comparison, statistic, projection)
        for comparison in ("long:short", "long:same")
        for statistic in STATISTICS
        for projection in ([*ATTENTION, "all"] if statistic != "loss" else ["all"])
    ]
    keys = ["comparison", "statistic", "projection"]
    assert [tuple(row) for row in table[keys].to_numpy()] == expected
    p = []
    for row in table.itertuples():
        groups = row.comparison.split(":")
        high, low = (by_example(directory, g, row.statistic, row.projection) for g in groups)
        assert (
            (row.n_high, row.n_low)
            == (len(high), len(low))
            == (97, 89 if groups[1] == "short" else 83)
        )
        assert row.mean_high == pytest.approx(high.mean())
        assert row.mean_low == pytest.approx(low.mean())
        assert row.gap == pytest.approx(high.mean() - low.mean())
        half = 1.96 * np.sqrt(high.var() / len(high) + low.var() / len(low))
        assert row.ci_low == pytest.approx(row.gap - half, abs=half / 5)
        assert row.ci_high == pytest.approx(row.gap + half, abs=half / 5)
        wins = np.sign(high[:, None] - low).mean()
        assert row.cliffs_delta == pytest.approx(wins)
        assert row.auroc == pytest.approx((wins + 1) / 2)
        p.append(mannwhitneyu(high, low).pvalue)
    np.testing.assert_allclose(table["p_adjusted"], multipletests(p, method="fdr_bh")[1])


def verdicts(run: RunValues, *groups: str, equal_length: RunValues | None = None) -> dict[str, str]:
    table = compare(run, *groups, equal_length).table
    table = table[table["projection"] == "all"]
    return dict(zip(table["statistic"], table["beyond_length"], strict=True))


def test_what_is_more_than_length_is_told_from_what_is_not(directory):
    run = read_values(directory)
    found = verdicts(run, "long", "short")
    assert found["nuclear_norm"] == "yes"
    assert found["effective_rank"] != "yes"  # it differs by length alone
    assert verdicts(run, "short", "long")["nuclear_norm"] == "yes"
    assert "yes" not in verdicts(run, "long", "same").values()


def test_matched_gap_has_the_sign_and_size_of_what_was_planted(directory):
    table = compare(read_values(directory), "long", "short").table.set_index(
        ["statistic", "projection"]
    )
    row = table.loc["nuclear_norm", "all"]
    assert row["matched_ci_low"] < row["matched_gap"] < row["matched_ci_high"] < 0
    assert row["matched_gap"] == pytest.approx(-row["mean_low"] / 2, rel=0.25)


def test_groups_without_common_lengths_need_an_equal_length_run(tmp_path):
    groups = {"long": draw(1, 61, 5000, norm=0.5), "short": draw(2, 67, 20)}
    run = read_values(write_run(tmp_path / "run", groups))
    assert set(verdicts(run, "long", "short").values()) == {"undecided"}
    cut = {
        name: Group(
            [8] * len(g.target), g.prompt, g.norms * g.target**0.5, draw(5, len(g.target), 8).ranks
        )
        for name, g in groups.items()
    }
    equal = read_values(write_run(tmp_path / "equal", cut, target_tokens=8))
    found = compare(run, "long", "short", equal)
    assert (found.primary, len(found.matched.pairs)) == ("equal_length", 0)
    assert "first 8 target tokens of the 61 and 67 responses" in sentence(found)
    pairs = len(found.deciding.pairs)
    assert pairs > 40
    assert f"have them, {pairs} pairs (0 of the same prompt; the" in sentence(found)
    balance = found.balance.set_index(["rows", "tokens"])
    assert abs(balance.loc[("equal_length_matched", "prompt"), "difference"]) < 0.1
    assert verdicts(run, "long", "short", equal_length=equal)["nuclear_norm"] == "yes"
    assert verdicts(run, "long", "short", equal_length=equal)["effective_rank"] != "yes"


def test_a_run_of_equal_lengths_is_compared_by_itself(tmp_path):
    groups = {
        name: Group(
            [8] * 37, np.arange(37) % 7 + 5, draw(seed, 37, 8, norm=norm).norms, np.ones(37)
        )
        for name, seed, norm in (("a", 1, 0.5), ("b", 2, 1))
    }
    run = read_values(write_run(tmp_path / "run", groups, target_tokens=8))
    assert compare(run, "a", "b").primary == "equal_length"
    assert verdicts(run, "a", "b")["nuclear_norm"] == "yes"
    assert verdicts(run, "a", "b")["effective_rank"] != "yes"


def test_length_and_balance_are_said(directory):
    found = compare(read_values(directory), "long", "short")
    run = read_values(directory)
    high, low = (run.rows(g)["num_target_tokens"].to_numpy() for g in ("long", "short"))
    assert found.length_auroc == pytest.approx((np.sign(high[:, None] - low).mean() + 1) / 2)
    balance = found.balance.set_index(["rows", "tokens"])
    before, after = balance.loc[("all", "target")], balance.loc[("matched", "target")]
    assert found.cut == 0
    assert before["high"] == pytest.approx(np.exp(np.log(high).mean()))
    assert abs(after["difference"]) < abs(before["difference"]) / 3


def test_pairs_of_cut_rows_are_counted(directory):
    run = read_values(directory)
    examples = run.examples.assign(truncated=run.examples["group"] == "long")
    found = compare(dataclasses.replace(run, examples=examples), "long", "short")
    assert found.cut == len(found.matched.pairs)
    assert f"In {found.cut} pairs a row was cut" in sentence(found)


def test_the_sentence_and_the_table_give_the_size(directory):
    found = compare(read_values(directory), "long", "short")
    row = found.table.set_index(["statistic", "projection"]).loc["nuclear_norm", "all"]
    assert row["ratio_ci_low"] < 0.5 < row["ratio_ci_high"] < 1
    assert row["ratio_ci_low"] < row["ratio"] < row["ratio_ci_high"]
    low, high = found.effects["nuclear_norm", "all"].log_interval
    assert (np.log(row["ratio_ci_low"]), np.log(row["ratio_ci_high"])) == pytest.approx((low, high))
    size = f"{row['ratio']:.3f} [{row['ratio_ci_low']:.3f}, {row['ratio_ci_high']:.3f}]"
    assert f"nuclear norm yes, smaller in long, ratio {size}; effective rank" in sentence(found)
    assert re.search(r"about [\d,]+ such pairs would decide", sentence(found))
    assert (row["clusters_high"], row["clusters_low"], row["duplicates"], row["paired"]) == (
        97,
        89,
        0,
        0,
    )


def test_what_is_negligible_is_chosen_by_the_caller(directory):
    run = read_values(directory)
    said = {}
    for negligible in (0.1, 2.0, 20.0):
        table = compare(run, "long", "short", negligible=negligible).table
        rows = table[table["projection"] == "all"].set_index("statistic")
        said[negligible] = rows["beyond_length"].to_dict()
    assert said[0.1]["nuclear_norm"] == "yes"
    assert said[20.0]["nuclear_norm"] == "negligible"
    assert said[0.1]["effective_rank"] == "undecided"
    assert said[2.0]["effective_rank"] == "no"


def test_a_yes_has_to_survive_the_other_verdicts(directory):
    """Holm, written out here: p of the sentences of all comparisons, both questions."""
    run = read_values(directory)
    one = compare(run, "long", "short")
    doubtful = dataclasses.replace(
        one.effects["effective_rank", "all"], log_ratio=1.0, error=1 / 2.8, degrees_of_freedom=1e6
    )
    names = [("nuclear_norm", "all"), ("effective_rank", "all")]
    one = dataclasses.replace(
        one, effects=one.effects | dict.fromkeys(names, doubtful), loss_effects={}
    )
    for copies, verdict in ((1, "yes"), (4, "yes"), (5, "undecided"), (30, "undecided")):
        # 2 · copies verdicts of p 0.0051: adjusted 0.041 for 4 copies, 0.051 for 5.
        found = settled([one] * copies)
        for comparison in found:
            table = comparison.table.set_index(["statistic", "projection"])
            assert set(table.loc[names, "beyond_length"]) == {verdict}
            assert ("chance among so many verdicts" in sentence(comparison)) == (verdict != "yes")


def test_beyond_loss_is_asked_as_well(tmp_path):
    """Loss is twice the norm in these runs: nothing of the norm is left beyond it."""
    groups = {"a": draw(1, 199, norm=0.8, rank=1.3), "b": draw(2, 199)}
    table = compare(read_values(write_run(tmp_path / "run", groups)), "a", "b").table
    rows = table[table["projection"] == "all"].set_index("statistic")
    assert rows.loc["nuclear_norm", "beyond_length"] == "yes"
    assert rows.loc["effective_rank", "beyond_length"] == "yes"
    assert rows.loc["nuclear_norm", "beyond_loss"] == "no"
    assert rows.loc["effective_rank", "beyond_loss"] == "yes"
    assert pd.isna(rows.loc["loss", "beyond_loss"])


@pytest.fixture(scope="module")
def linked(tmp_path_factory) -> Path:
    """A run of two files whose rows have ids: 30 questions, asked twice in either, otherwise."""
    folder = tmp_path_factory.mktemp("linked")
    rng = np.random.default_rng(0)
    for group in ("good", "bad"):
        rows = [
            {
                "instruction": f"Question {n}, {'a' if group == 'good' else 'b'}",
                "output": "1 2 3 4 5 6 7"[: int(rng.integers(3, 14))],
                "id": n // 2,
                "source": n % 7 if n else None,
            }
            for n in rng.permutation(60).tolist()
        ]
        (folder / f"{group}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    run_spectra(
        RunConfig(
            model="demo",
            data=(str(folder / "good.jsonl"), str(folder / "bad.jsonl")),
            spectra=SpectraConfig(layers="0"),
            output_dir=str(folder / "run"),
        )
    )
    return folder


@pytest.mark.parametrize(
    ("pair_by", "cluster_by", "clusters", "paired"),
    [
        (None, None, 60, 0),
        ("id", None, 30, 30),
        (None, "id", 30, 30),
        ("id", "id", 30, 30),
        (None, "source", 8, 7),  # the row without one is on its own
        ("id", "source", 1, 1),  # all rows are linked
    ],
)
def test_columns_of_the_data_link_rows(linked, pair_by, cluster_by, clusters, paired):
    run = with_clusters(read_values(linked / "run"), pair_by, cluster_by)
    matched = compare(run, "good", "bad").matched
    assert [len(units.clusters) for units in matched.units] == [clusters] * 2
    by = {"pair_by": pair_by, "cluster_by": cluster_by}
    table = gradjax.open_run(linked / "run").compare("good", "bad", **by)
    assert set(table["clusters_high"]) == {clusters}
    common = np.intersect1d(*(units.clusters for units in matched.units))
    assert len(common) == paired
    assert set(matched.units[0].clusters[matched.pairs[: matched.paired, 0]]) <= set(common)


def test_columns_that_are_not_there_are_refused(linked, tmp_path):
    run = read_values(linked / "run")
    with pytest.raises(GradjaxError, match=r"has no column 'ids'; it has .*id.*did you mean"):
        with_clusters(run, "ids", None)
    text = (linked / "good.jsonl").read_text()
    (linked / "good.jsonl").write_text(text.replace("Question 7,", "Question 70,"))
    with pytest.raises(GradjaxError, match=r"good\.jsonl has other rows than those of group good"):
        with_clusters(run, "id", None)
    (linked / "good.jsonl").write_text(text)
    command = ReportConfig((str(linked / "run"),), output_dir=str(tmp_path), pair_by="id")
    assert "the smaller group has 30 prompts" in write_report(command).verdicts[0]
    table = pd.read_csv(tmp_path / "comparisons.csv")
    assert set(table["clusters_high"]) == {30}
    assert table["paired"].max() > 10


def test_repeated_and_shared_rows_are_said(tmp_path):
    rows = [{"instruction": f"{n} + 1", "output": str(n + 1)} for n in range(40)]
    for name, part in (("a", rows[:30] * 2), ("b", rows[20:])):
        (tmp_path / f"{name}.json").write_text(json.dumps(part))
    data = tuple(str(tmp_path / f"{name}.json") for name in "ab")
    spectra = SpectraConfig(layers="0")
    run_spectra(RunConfig(model="demo", data=data, spectra=spectra, output_dir=str(tmp_path / "r")))
    found = compare(read_values(tmp_path / "r"), "a", "b")
    assert (found.matched.duplicates, found.matched.shared) == (30, 10)
    assert "30 rows equal others of their group and count once." in sentence(found)
    assert "10 rows are in both groups." in sentence(found)


def test_tables_have_the_papers_means(directory):
    run = read_values(directory)
    spectra = pd.read_parquet(directory / "spectra")
    for row in spectra_table(run, [("long", "short")]).itertuples():
        chosen = spectra[spectra["projection"] == row.projection]
        for side, group in ((row.high, "long"), (row.low, "short")):
            layers = [
                part[row.statistic].mean()
                for _, part in chosen[chosen["group"] == group].groupby("layer")
            ]
            assert side == pytest.approx(np.mean(layers))
        assert row.gap == pytest.approx(row.high - row.low)
    cosines = pd.read_parquet(directory / "similarity")
    table = similarity_table(run, [("long", "short")])
    assert len(table) == 6
    for row in table.itertuples():
        chosen = cosines[(cosines["kind"] == row.kind) & (cosines["projection"] == row.projection)]
        assert row.high == pytest.approx(chosen[chosen["group"] == "long"]["cosine"].mean())
    layered = spectra_table(run, [("long", "short")], by="layer")
    assert len(layered) == 2 * 3 * 4
    assert spectra_table(run, [("long", "short")], by="example").shape == (97 + 89, 2 + 8)


def test_layers_restrict_every_number(directory):
    one = example_values(read_values(directory, layers="1"))["nuclear_norm", "q"]
    spectra = pd.read_parquet(directory / "spectra").query("layer == 1 and projection == 'q'")
    expected = spectra.set_index(["group", "example_id"])["nuclear_norm"]
    pd.testing.assert_series_equal(one, expected.sort_index(), check_names=False)
    with pytest.raises(GradjaxError, match=r"--layers=3"):
        read_values(directory, layers="3")


def test_published_numbers_stand_beside_measured_ones(tmp_path, no_figures):
    spectra, similarity = published("qwen2.5_7b", "wizardlm/ifd_qwen7b")
    assert tuple(spectra.loc[("nuclear_norm", "k"), ["high", "low"]]) == (1.3, 6.1)
    assert similarity.empty  # the paper has no table of it
    assert len(published("qwen2.5_7b", "wizardlm/reward")[1]) == 6
    named = write_run(
        tmp_path / "run",
        {"a": draw(1, 31), "b": draw(2, 29)},
        model={"name": "qwen2.5_7b"},
    )
    config = ReportConfig((str(named),), ("a:b",), published="wizardlm/ifd_qwen7b")
    table = pd.read_csv(write_report(config).directory / "spectra.csv")
    row = table[(table["statistic"] == "nuclear_norm") & (table["projection"] == "k")].iloc[0]
    assert row["published_gap"] == pytest.approx(1.3 - 6.1)
    assert row["gap_difference"] == pytest.approx(row["gap"] - row["published_gap"])
    with pytest.raises(GradjaxError, match="wizardlm/reward"):
        published("qwen2.5_7b", "wizardlm/nothing")
    with pytest.raises(GradjaxError, match=r"magpie/difficulty .* tables 2, 4, 25, 26; give"):
        published("qwen2.5_7b", "magpie/difficulty:27")
    with pytest.raises(GradjaxError, match="gemma2_2b"):
        published("made-up", "wizardlm/reward")


@pytest.mark.parametrize(
    ("experiment", "norm", "cosine", "tables"),
    [
        # nuclear norm of k in high, cosine of adjacent k in low, as the tables print them
        ("magpie/difficulty", 1.7, -0.1e-3, (2, 4)),
        ("magpie/difficulty:2", 1.7, -0.1e-3, (2, 4)),
        ("magpie/difficulty:4", 1.7, -0.1e-3, (2, 4)),
        ("magpie/difficulty:25", 1.8, -7.1e-5, (25, 26)),
        ("magpie/difficulty:26", 1.8, -7.1e-5, (25, 26)),
        ("reasoning/difficulty", 1.0, -2e-3, (2, 4)),
        ("reasoning/difficulty:27", 1.1, -2.7e-3, (27, 28)),
        ("reasoning/difficulty:28", 1.1, -2.7e-3, (27, 28)),
    ],
)
def test_an_experiment_that_is_printed_twice_is_as_the_table_asked_for_has_it(
    experiment, norm, cosine, tables
):
    spectra, similarity = published("qwen2.5_7b", experiment)
    assert (len(spectra), len(similarity)) == (8, 6)
    assert spectra.loc[("nuclear_norm", "k"), "high"] == norm
    assert similarity.loc[("cross_layer", "k"), "low"] == pytest.approx(cosine)
    assert (*spectra["table"].unique(), *similarity["table"].unique()) == tables


def test_a_published_gap_is_the_printed_one():
    spectra, _ = published("qwen2.5_7b", "wizardlm/reward:21")
    row = spectra.loc[("nuclear_norm", "q")]
    assert (row["high"], row["low"], row["gap"]) == (1.3, 3.7, -2.4)
    row = published("qwen2.5_7b", "magpie/difficulty:25")[0].loc[("effective_rank", "k")]
    assert (row["high"], row["low"], row["gap"]) == (95.9, 83.9, 12.1)  # of numbers not rounded


def test_separated_groups_have_an_interval_of_auroc():
    found = difference(np.arange(20) + 100.0, np.arange(20.0))
    assert found["auroc"] == found["auroc_high"] == 1
    assert 0.8 < found["auroc_low"] < 0.9


def test_a_difference_is_that_of_all_pairs_of_rows():
    """AUROC by going through all pairs; Brunner and Munzel's interval, written out here."""
    rng = np.random.default_rng(0)
    high, low = rng.normal(0.5, 1, 61).round(1), rng.normal(0, 1.5, 83).round(1)
    found = difference(np.append(high, [np.nan, np.inf]), np.append(np.nan, low))
    above = (np.sign(high[:, None] - low) + 1) / 2
    assert (found["n_high"], found["n_low"]) == (61, 83)
    assert found["auroc"] == pytest.approx(above.mean())
    assert found["cliffs_delta"] == pytest.approx(
        (high[:, None] > low).mean() - (high[:, None] < low).mean()
    )
    parts = [above.mean(axis=1).var(ddof=1) / 61, above.mean(axis=0).var(ddof=1) / 83]
    freedom = sum(parts) ** 2 / (parts[0] ** 2 / 60 + parts[1] ** 2 / 82)
    half = t.ppf(0.975, freedom) * np.sqrt(sum(parts))
    assert found["auroc_low"] == pytest.approx(above.mean() - half)
    assert found["auroc_high"] == pytest.approx(above.mean() + half)
    assert found["gap"] == pytest.approx(high.mean() - low.mean())
    half = 1.96 * np.sqrt(high.var() / 61 + low.var() / 83)
    assert found["ci_low"] == pytest.approx(found["gap"] - half, abs=half / 10)
    assert found["ci_high"] == pytest.approx(found["gap"] + half, abs=half / 10)
    assert found["p"] == pytest.approx(mannwhitneyu(high, low).pvalue)
    assert found == difference(high, low)


def test_a_difference_of_few_rows_says_what_there_is():
    nothing = np.array([np.nan])
    assert difference(nothing, np.ones(3)) == {"n_high": 0, "n_low": 3}
    assert difference(np.ones(3), nothing) == {"n_high": 3, "n_low": 0}
    for high, low in ((1, 2), (2, 1)):
        found = difference(np.arange(high) + 5.0, np.arange(low) + 1.0)
        assert (found["auroc"], found["cliffs_delta"]) == (1, 1)
        assert not {"p", "ci_low", "auroc_low"} & set(found)
    assert "p" in difference(np.array([1.0, 3]), np.array([2.0, 4]))


def test_aurocs_that_do_not_vary_have_wilsons_interval():
    z = 1.959964
    for high, low, auroc in ((9.0, 1.0, 1), (1.0, 9.0, 0), (1.0, 1.0, 0.5)):
        found = difference(np.full(10, high), np.full(15, low))
        center, half = (
            (auroc + z**2 / 20) / (1 + z**2 / 10),
            z / (1 + z**2 / 10) * np.sqrt(auroc * (1 - auroc) / 10 + z**2 / 400),
        )
        assert found["auroc"] == auroc
        assert found["auroc_low"] == pytest.approx(center - half, abs=1e-6)
        assert found["auroc_high"] == pytest.approx(center + half, abs=1e-6)
    few = difference(
        np.array([1.0, 3, 4]), np.array([2.0, 0, -1])
    )  # intervals of few rows are wide
    assert few["auroc"] == pytest.approx(8 / 9)
    assert few["auroc_high"] == 1


def test_p_values_are_adjusted_by_holm():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([]) == []


def test_verdicts_of_the_sentence_and_of_other_rows_are_two_families(compared):
    name, *others = [("nuclear_norm", "all"), ("nuclear_norm", "q"), ("nuclear_norm", "k")]
    known = compared.effects[name]
    assert known
    doubtful = dataclasses.replace(known, log_ratio=1.0, error=1 / 2.8, degrees_of_freedom=1e6)
    unknown = dataclasses.replace(doubtful, apart=(9.0, 9.0))  # without a p

    def said(effects) -> list[str]:
        (found,) = settled([dataclasses.replace(compared, effects=effects, loss_effects={})])
        table = found.table.set_index(["statistic", "projection"])
        assert set(table["beyond_loss"].dropna()) == {"undecided"}
        return list(table.loc[[name, *others], "beyond_length"])

    assert said({name: doubtful, **dict.fromkeys(others, doubtful)}) == ["yes", "yes", "yes"]
    many = {("loss", str(n)): doubtful for n in range(8)}  # p of 0.0051 ten times
    assert said(dict.fromkeys([name, *others], doubtful) | many) == ["yes", *2 * ["undecided"]]
    rest = {name: unknown, others[0]: None, others[1]: doubtful}
    assert said(rest) == ["undecided", "undecided", "yes"]


@pytest.mark.parametrize(
    ("verdict", "ratio", "ends", "says"),
    [
        ("yes", 1.2, (1.1, 1.3), "norm yes, larger in long, ratio 1.200 [1.100, 1.300];"),
        ("yes", 0.8, (0.7, 0.9), "norm yes, smaller in long, ratio 0.800 [0.700, 0.900];"),
        (
            "negligible",
            1.01,
            (1.005, 1.02),
            "norm yes, but negligible, ratio 1.010 [1.005, 1.020];",
        ),
        ("no", 1.0, (0.99, 1.01), "norm no, ratio 1.000 [0.990, 1.010];"),
        ("undecided", 1.2, (1.1, 1.3), "[1.100, 1.300], which may be chance among so many"),
        ("undecided", 0.8, (0.7, 0.9), "[0.700, 0.900], which may be chance among so many"),
        ("undecided", 1.2, (1.0, 1.4), "[1.000, 1.400]; about {} such pairs would decide"),
        ("undecided", 0.8, (0.6, 1.0), "[0.600, 1.000]; about {} such pairs would decide"),
        ("undecided", 12.0, (0.05, 1234.0), "ratio 12 [0.05, 1.23e+03]; about {} such pairs"),
    ],
)
def test_the_sentence_has_the_verdict_in_words(compared, verdict, ratio, ends, says):
    table = compared.table.copy()
    rows = (table["statistic"] == "nuclear_norm") & (table["projection"] == "all")
    columns = ["beyond_length", "ratio", "ratio_ci_low", "ratio_ci_high"]
    table.loc[rows, columns] = [verdict, ratio, *ends]
    effect = compared.effects["nuclear_norm", "all"]
    assert effect
    needed = f"{effect.pairs_to_decide(compared.negligible):,}"
    assert says.format(needed) in sentence(dataclasses.replace(compared, table=table))


def test_the_sentence_has_no_ratio_of_pairs_that_say_nothing(compared):
    effect = compared.effects["nuclear_norm", "all"]
    assert effect
    for unknown in (None, dataclasses.replace(effect, apart=(9.0, 0.0))):
        effects = compared.effects | {("nuclear_norm", "all"): unknown}
        said = sentence(dataclasses.replace(compared, effects=effects))
        assert "beyond length: nuclear norm undecided; effective rank" in said


def test_a_folder_that_cannot_be_written_is_said(directory, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(GradjaxError, match="file/a cannot be written"):
        write_report(ReportConfig((str(directory),), output_dir=str(tmp_path / "file" / "a")))


def test_everything_is_written(report):
    rows = pd.read_csv(report / "rows.csv").set_index(["group", "status"])["rows"]
    assert rows["long", "empty_response"] == 3
    assert rows["short", "ok"] == 89
    names = {str(path.relative_to(report)) for path in report.rglob("*") if path.is_file()}
    for name, kind in itertools.product(("spectra", "similarity"), ("csv", "md", "tex")):
        assert f"{name}.{kind}" in names
    assert {"comparisons.csv", "length_control.csv", "report.html"} <= names
    assert {"statistics.csv", "balance.csv"} <= names
    assert {"figures/long_short_nuclear_norm.svg", "figures/long_same_spectra.png"} <= names
    assert {"figures/verdicts.svg", "figures/long_short_by_layer.png", "layers.csv"} <= names
    listed = pd.read_csv(report / "figures.csv")["name"]
    assert {f"figures/{name}.svg" for name in listed} <= names
    assert "nuclear\\_norm" in (report / "spectra.tex").read_text()
    page = (report / "report.html").read_text()
    assert "long against short, beyond length: nuclear norm yes, smaller in long" in page
    assert "empty_response" in page


def test_figures_of_an_earlier_call_are_removed_and_no_others(directory, tmp_path, no_figures):
    def report(*compared: str) -> set[str]:
        write_report(ReportConfig((str(directory),), compared, output_dir=str(tmp_path)))
        return {path.stem for path in (tmp_path / "figures").iterdir()}

    assert {"long_short_length", "long_same_length"} <= report("long:short", "long:same")
    (tmp_path / "figures" / "my_own.svg").touch()
    left = report("long:same")
    assert {"my_own", "verdicts", "long_same_length", "long_same_by_layer"} <= left
    assert not any("short" in name for name in left)


def test_a_damaged_list_of_figures_is_made_anew(directory, tmp_path, no_figures, caplog):
    config = ReportConfig((str(directory),), ("long:short",), output_dir=str(tmp_path))
    for damaged in ("", "a,b\n1,2\n", '"'):
        (tmp_path / "figures.csv").write_text(damaged)
        write_report(config)
        assert "figures.csv is damaged" in caplog.text
        assert "verdicts" in list(pd.read_csv(tmp_path / "figures.csv")["name"])
        caplog.clear()


def test_figures_of_like_names_do_not_replace_each_other(tmp_path, no_figures):
    names = ("a", "b_c", "a_b", "c")
    groups = {name: draw(seed, 31) for seed, name in enumerate(names)}
    run = write_run(tmp_path / "run", groups)
    write_report(ReportConfig((str(run),), ("a:b_c", "a_b:c")))
    listed = pd.read_csv(run / "report" / "figures.csv")["name"]
    assert {"a_b_c_length", "a_b_c_length-2"} <= set(listed)
    assert {path.stem for path in (run / "report" / "figures").iterdir()} == set(listed)


def test_pairs_that_are_too_unlike_show_no_ratio(tmp_path):
    """As in the sentence: prompts over half a standard deviation apart answer nothing."""
    run = read_values(write_run(tmp_path / "run", {"a": draw(1, 61), "b": draw(2, 67)}))
    found = compare(run, "a", "b")
    name = ("nuclear_norm", "all")
    effect = found.effects[name]
    assert effect
    assert set(ratio_columns(effect)) == {"ratio", "ratio_ci_low", "ratio_ci_high"}
    assert ratio_columns(dataclasses.replace(effect, apart=(0.0, 0.6))) == {}


def test_too_few_prompts_ask_for_more_rows(tmp_path):
    run = read_values(write_run(tmp_path / "run", {"one": draw(1, 1), "many": draw(2, 60)}))
    said = sentence(compare(run, "one", "many"))
    assert said.endswith("fewer than 12 decide nothing; measure more rows.")


def test_the_first_screen_has_a_line_per_comparison(report):
    page = (report / "report.html").read_text()
    first = page[: page.index("<figure>")]
    columns, *lines = [
        [html.unescape(cell) for cell in re.findall(r"<t[hd][^>]*>([^<]*)</t[hd]>", row)]
        for row in first.split("<tr>")[1:]
    ]
    table = pd.DataFrame(lines, columns=columns).set_index("comparison")
    statistics = pd.read_csv(report / "statistics.csv").query("projection == 'all'")
    assert list(table.index) == ["long against short", "long against same"]
    for name, rows in statistics.groupby("comparison", sort=False):
        line = table.loc[name.replace(":", " against ")]
        rows = rows.set_index("statistic")
        for statistic in ("nuclear_norm", "effective_rank"):
            row, word = rows.loc[statistic], statistic.replace("_", " ")
            assert line[word].startswith(row["beyond_length"])
            ratio = [row["ratio"], row["ratio_ci_low"], row["ratio_ci_high"]]
            assert line[f"{word}, high ÷ low [99 %]"] == "{:.3f} [{:.3f}, {:.3f}]".format(*ratio)
            assert line[f"{word}, beyond loss too"].startswith(row["beyond_loss"])
    assert table.loc["long against short", "nuclear norm"] == "yes, smaller"


def test_python_and_the_program_say_the_same(directory, program, report, tmp_path, no_figures):
    assert program.stdout.startswith("long against short, beyond length: nuclear norm yes")
    written = write_report(
        ReportConfig((str(directory),), PAIRS, output_dir=str(tmp_path / "here"))
    )
    assert written.directory == tmp_path / "here"
    pd.testing.assert_frame_equal(
        pd.read_csv(written.directory / "comparisons.csv"), pd.read_csv(report / "comparisons.csv")
    )
    frame = gradjax.open_run(directory).compare("long", "short")
    table = pd.read_csv(report / "comparisons.csv").query("comparison == 'long:short'")
    columns = [column for column in COLUMNS if column != "p_adjusted"]  # of another family
    pd.testing.assert_frame_equal(frame[columns], table[columns].reset_index(drop=True))


def test_main_ends_with_the_comparison_of_two_groups(tmp_path):
    for name, answer in (("a", "The answer is 7."), ("b", "No.")):
        rows = [{"instruction": f"How many are {i} + 3?", "output": answer} for i in range(3)]
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
    command = [sys.executable, "-m", "gradjax.main", f"--output_dir={tmp_path / 'run'}"]
    command += ["--model=demo"]
    command += [f"--data={tmp_path / name}.json" for name in "ab"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    frame = gradjax.open_run(tmp_path / "run").compare("a", "b")
    row = frame.set_index(["statistic", "projection"]).loc["effective_rank", "all"]
    shown = f"{row['gap']:.4g} [{row['ci_low']:.4g}, {row['ci_high']:.4g}]"
    assert shown in done.stdout
    assert "a against b, beyond length: nuclear norm undecided" in done.stdout
    assert f" report --run={tmp_path / 'run'}" in done.stdout


def test_several_runs_stand_side_by_side(directory, tmp_path):
    groups = {"long": draw(4, 31, 80), "short": draw(5, 29)}
    other = write_run(tmp_path / "other", groups, model={"name": "another"})
    config = ReportConfig(
        (str(directory), str(other)), ("long:short",), output_dir=str(tmp_path / "both")
    )
    written = write_report(config)
    assert len(written.verdicts) == 2
    table = pd.read_csv(written.directory / "comparisons.csv")
    assert table["model"].drop_duplicates().tolist() == ["made-up", "another"]
    assert (written.directory / "figures" / "models_long_short_effective_rank.svg").exists()


def test_runs_of_one_model_are_told_apart_by_their_directories(directory, tmp_path, no_figures):
    groups = {"long": draw(4, 31, 80), "short": draw(5, 29)}
    others = [write_run(tmp_path / name / "other", groups) for name in ("x", "y")]
    config = ReportConfig(
        (str(directory), *map(str, others)), ("long:short",), output_dir=str(tmp_path / "all")
    )
    table = pd.read_csv(write_report(config).directory / "comparisons.csv")
    expected = [f"made-up ({directory.name})", "made-up (x/other)", "made-up (y/other)"]
    assert table["model"].drop_duplicates().tolist() == expected
    with pytest.raises(GradjaxError, match="is given twice"):
        ReportConfig((str(directory), str(directory)))


def test_a_summary_takes_the_groups_of_each_run(tmp_path):
    runs = [
        write_run(tmp_path / "a" / "run", {"x": draw(1, 31), "y": draw(2, 29)}),
        write_run(tmp_path / "b" / "run", {"u": draw(3, 31), "v": draw(4, 29)}),
    ]
    config = ReportConfig(tuple(map(str, runs)), output_dir=str(tmp_path / "all"), summary=True)
    written = write_report(config)
    table = pd.read_csv(written.directory / "summary.csv")
    assert list(table["comparison"]) == ["x:y", "u:v"]
    assert [said.split(":")[0] for said in written.verdicts] == ["a/run", "b/run"]


def test_a_summary_is_one_table_and_one_page_of_all_runs(directory, tmp_path):
    groups = {"long": draw(4, 31, 80, empty=2), "short": draw(5, 29, 80)}
    runs = [directory, write_run(tmp_path / "other", groups)]
    equal = [
        write_run(tmp_path / f"equal{i}", dict(g), target_tokens=8)
        for i, g in enumerate(
            [{"long": draw(1, 97, length=80, norm=0.5, empty=3), "short": draw(2, 89)}, groups]
        )
    ]
    config = ReportConfig(
        tuple(map(str, runs)),
        ("long:short",),
        tuple(map(str, equal)),
        str(tmp_path / "all"),
        summary=True,
    )
    written = write_report(config)
    names = {path.name for path in written.directory.iterdir()}
    assert names == {"summary.csv", "rows.csv", "report.html", "figures", "figures.csv"}

    table = pd.read_csv(written.directory / "summary.csv")
    assert table["run"].tolist() == [str(run) for run in runs]
    # The same comparisons as in a report of these runs, adjusted over all of them.
    own = write_report(dataclasses.replace(config, summary=False, output_dir=str(tmp_path / "own")))
    whole = pd.read_csv(own.directory / "comparisons.csv").query("projection == 'all'")
    for statistic in ("nuclear_norm", "effective_rank"):
        rows = whole[whole["statistic"] == statistic].reset_index(drop=True)
        for said, verdict in zip(table[statistic], rows["beyond_length"], strict=True):
            assert said.startswith(verdict)
        for column in ("ratio", "ratio_ci_low", "ratio_ci_high"):
            np.testing.assert_allclose(table[f"{statistic}_{column}"], rows[column])
    for run, sentence_of, said in zip(runs, table["verdict"], written.verdicts, strict=True):
        assert said == f"{run.name}: {sentence_of}"

    page = (written.directory / "report.html").read_text()
    assert all(f"{run.name}: long against short, beyond length: " in page for run in runs)
    assert "empty_response" in page
    assert page.count("<figure>") == 1  # the forest plot
    assert 'id="examples"' not in page


def run_with(tmp_path: Path, groups: dict[str, Group], **rest) -> str:
    return str(write_run(tmp_path / "run", groups, **rest))


ONE, TWO = draw(1, 5), draw(2, 7)
NONE = Group([], [], [], [], empty=4)


@pytest.mark.parametrize(
    ("groups", "rest", "config", "says"),
    [
        ({"a": ONE}, {}, {}, r"one group, 'a'"),
        ({"a": ONE, "b": TWO}, {}, {"compare": ("a:c",)}, r"no group 'c'; it has a, b"),
        ({"a": ONE, "b": TWO}, {"data": {"a": {"rows": 5}, "b": {"rows": 9}}}, {}, "2 rows are"),
        ({"a": ONE, "b": TWO}, {"versions": {"gradjax": "0.0.9"}}, {}, r"by gradjax 0\.0\.9"),
        ({"a": ONE, "b": NONE}, {}, {}, r"none of the 4 rows of group 'b'.*4 empty_response"),
    ],
)
def test_faults_are_one_sentence(tmp_path, groups, rest, config, says):
    directory = run_with(tmp_path, groups, **rest)
    with pytest.raises(GradjaxError, match=says):
        write_report(ReportConfig((directory,), **config))
    assert not (Path(directory) / "report").exists()


def test_faults_of_flags(tmp_path):
    with pytest.raises(GradjaxError, match="is not a gradjax run"):
        write_report(ReportConfig((str(tmp_path),)))
    for pair in ("a", "a:", ":b", "a:a"):
        with pytest.raises(GradjaxError, match=f"--compare={pair}"):
            ReportConfig((str(tmp_path),), (pair,))
    with pytest.raises(GradjaxError, match="expected one --compare"):
        ReportConfig(("a",), published="wizardlm/reward")
    for rest in ({"published": "wizardlm/reward"}, {"by": "layer"}):
        with pytest.raises(GradjaxError, match="--summary has none of the tables"):
            ReportConfig(("a",), ("a:b",), summary=True, **rest)
    with pytest.raises(GradjaxError, match="1 times, --run 2 times"):
        ReportConfig(("a", "b"), equal_length_runs=("c",))


def test_an_equal_length_run_of_something_else_is_refused(tmp_path):
    groups = {"a": draw(1, 31), "b": draw(2, 29)}
    run = str(write_run(tmp_path / "run", groups))
    with pytest.raises(GradjaxError, match="not run with --target_tokens"):
        write_report(ReportConfig((run,), equal_length_runs=(run,)))
    data = {name: {"rows": len(g.target), "hash": "others"} for name, g in groups.items()}
    other = write_run(tmp_path / "others", groups, target_tokens=8, data=data)
    with pytest.raises(GradjaxError, match="the rows of a, the rows of b"):
        write_report(ReportConfig((run,), equal_length_runs=(str(other),)))
    other = write_run(tmp_path / "other", groups, target_tokens=8)
    manifest = json.loads((other / "run.json").read_text())
    manifest["settings"]["model"] = "sha256:another"
    (other / "run.json").write_text(json.dumps(manifest))
    with pytest.raises(GradjaxError, match=r"differs from .* in model"):
        write_report(ReportConfig((run,), equal_length_runs=(str(other),)))


def test_few_rows_and_zero_gradients_leave_gaps_empty(tmp_path):
    groups = {
        "a": Group([5], [3], [0.0], [1.0]),
        "b": Group([7, 9], [3, 4], [1.0, 0.0], [2.0, 1.5]),
    }
    found = compare(read_values(write_run(tmp_path / "run", groups)), "a", "b")
    assert found.primary == "none"
    assert found.table["p"].isna().all()
    assert set(found.table["beyond_length"]) == {"undecided"}
