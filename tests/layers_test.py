"""Effects layer by layer, of runs in which it is known what each layer does."""

import dataclasses

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from benchmarks.made_up_runs import Group, write_run
from gradjax.report import layers
from gradjax.report.compare import Comparison, compare
from gradjax.report.layers import layer_effects
from gradjax.storage.results import RunValues, read_values

LAYERS = 7


def rows(seed: int, count: int) -> Group:
    rng = np.random.default_rng(seed)
    target = np.exp(rng.normal(4, 0.6, count)).astype(int) + 1
    norms, ranks = np.exp(0.2 * rng.standard_normal((2, count)))
    return Group(target, rng.integers(3, 40, count), norms / target**0.5, ranks)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> RunValues:
    groups = {"high": rows(1, 83), "low": rows(2, 79), "other": rows(3, 11)}
    path = tmp_path_factory.mktemp("runs") / "run"
    return read_values(write_run(path, groups, layers=LAYERS))


def effects(comparison: Comparison) -> pd.DataFrame:
    (found,) = layer_effects([comparison])
    return found


def change_layers(monkeypatch, factors: dict[int, float]) -> None:
    """Norms of `high` are multiplied in these layers."""
    read = layers.read_matrices

    def changed(*args):
        for matrices in read(*args):
            factor = matrices["layer"].map(factors).fillna(1)
            factor = factor.where(matrices["group"] == "high", 1)
            yield matrices.assign(nuclear_norm=matrices["nuclear_norm"] * factor)

    monkeypatch.setattr(layers, "read_matrices", changed)


def test_a_layer_like_all_others_has_the_verdicts_ratio(run):
    comparison = compare(run, "high", "low")
    found = effects(comparison)
    table = comparison.table[comparison.table["projection"] == "all"].set_index("statistic")
    assert list(found["layer"]) == 2 * list(range(LAYERS))
    for statistic, by_layer in found.groupby("statistic"):
        for column in ("ratio", "ratio_ci_low", "ratio_ci_high"):
            np.testing.assert_allclose(by_layer[column], table.loc[statistic, column], rtol=1e-5)


def test_the_layer_that_differs_is_found(run, monkeypatch):
    comparison = compare(run, "high", "low")
    plain = effects(comparison)["ratio"].to_numpy()
    change_layers(monkeypatch, {2: 1.5, 4: 0.5})
    found = effects(comparison)
    factors = np.array([1, 1, 1.5, 1, 0.5, 1, 1, *([1] * LAYERS)])
    np.testing.assert_allclose(found["ratio"], plain * factors, rtol=1e-5)
    assert list(found["beyond_length"][[2, 4]]) == ["yes", "yes"]


def test_verdicts_are_adjusted_over_the_layers_of_a_statistic(run, monkeypatch):
    """p of 0.006 and 0.0085 among seven, by Holm: 0.042 and 0.051."""
    comparison = compare(run, "high", "low")
    effect = comparison.effects["nuclear_norm", "all"]
    assert effect
    p = np.array([0.5, 0.0085, 0.5, 0.006, 0.5, 0.5, 0.5])
    logs = stats.t.isf(p / 2, effect.degrees_of_freedom) * effect.error
    change_layers(monkeypatch, dict(enumerate(np.exp(logs - effect.log_ratio))))
    found = effects(comparison)[:LAYERS]
    assert (found["ratio_ci_low"][[1, 3]] > 1).all()
    assert list(found["beyond_length"] == "yes") == [False, False, False, True, False, False, False]
    assert found["beyond_length"][1] == "undecided"


def test_few_pairs_leave_layers_open(run):
    found = effects(compare(run, "other", "low"))
    assert found["ratio"].isna().all()
    assert set(found["beyond_length"]) == {"undecided"}


def test_a_run_that_is_cut_itself_decides_whatever_else_is_given(tmp_path):
    """Of a run with --target_tokens the layers are its own, not those of another such run."""
    groups = {"high": rows(1, 83), "low": rows(2, 79)}
    cut = {
        name: Group(np.full(len(of.target), 8), of.prompt, of.norms, of.ranks)
        for name, of in groups.items()
    }
    fewer = {
        name: Group(np.full(41, 5), of.prompt[:41], of.norms[:41], of.ranks[:41])
        for name, of in groups.items()
    }
    run = read_values(write_run(tmp_path / "run", cut, target_tokens=8))
    other = read_values(write_run(tmp_path / "other", fewer, target_tokens=5))
    data = {name: {"hash": "same"} for name in groups}
    other, run = (
        dataclasses.replace(one, manifest=one.manifest | {"data": data}) for one in (other, run)
    )
    alone, beside = (effects(compare(run, "high", "low", of)) for of in (None, other))
    assert alone.equals(beside)
    assert alone["ratio"].notna().all()


def test_a_run_is_read_once_whatever_is_compared(run, monkeypatch):
    comparisons = [compare(run, "high", "low"), compare(run, "other", "low")]
    alone = [effects(one) for one in comparisons]
    reads, read = [], layers.read_matrices

    def counted(*args):
        reads.append(args)
        return read(*args)

    monkeypatch.setattr(layers, "read_matrices", counted)
    for together, by_itself in zip(layer_effects(comparisons), alone, strict=True):
        pd.testing.assert_frame_equal(together, by_itself)
    assert len(reads) == 1
