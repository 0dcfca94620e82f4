"""The reference format, read as the paper's plotting scripts read it."""

import json
from pathlib import Path

import numpy as np
import pytest

from gradjax.config import RunConfig, SpectraConfig
from gradjax.errors import GradjaxError
from gradjax.runs.run import run
from gradjax.storage import datascorer
from gradjax.storage.reference import export
from gradjax.storage.store import read_table

pytestmark = pytest.mark.smoke

ROWS = [
    {"instruction": "How many?", "input": "4 + 5", "output": "4 + 5 = 9. The answer is 9."},
    {"instruction": "How many?", "output": ""},
    {"instruction": "Schön <b>&\u2028", "output": "7"},
    {"instruction": 3, "output": "7"},
]


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("export")
    (directory / "rows.json").write_text(json.dumps(ROWS))
    spectra = SpectraConfig(layers="0,2-3")
    data = (str(directory / "rows.json"),)
    return run(RunConfig(data=data, output_dir=directory / "run", spectra=spectra))


@pytest.fixture(scope="module")
def exported(store) -> list[dict]:
    output = store.parent / "rows.jsonl"
    assert export(store, "rows", output) == 2
    return [json.loads(line) for line in output.read_text("utf-8").split("\n")[:-1]]


def test_ok_rows_in_input_order(exported):
    assert [row["instruction"] for row in exported] == ["How many?\n4 + 5", "Schön <b>&\u2028"]
    assert [row["output"] for row in exported] == [ROWS[0]["output"], "7"]


def test_matrices_hold_the_whole_spectrum(exported, store):
    stored = (
        read_table(store, "spectra").to_pandas().set_index(["example_id", "layer", "projection"])
    )
    sizes = {"q": 96, "k": 48, "v": 48, "o": 96}
    for row, example_id in zip(exported, (0, 2), strict=True):
        names = {name for name in row if name.startswith("model.")}
        assert names == {
            f"model.layers.{i}.self_attn.{p}_proj.weight" for i in (0, 2, 3) for p in "qkvo"
        }
        for name in names:
            _, _, layer, _, projection, _ = name.split(".")
            expected = stored.loc[example_id, int(layer), projection[0]]
            values = np.array(row[name]["S_list"])
            assert len(values) == sizes[projection[0]]
            assert np.all(np.diff(values) <= 0)
            assert values.sum() == pytest.approx(expected.nuclear_norm, rel=1e-6)
            norm = row[name]["frobenius_norm"]
            assert np.sqrt((values**2).sum()) == pytest.approx(norm, rel=1e-6)
            found = [row[name][f"M_{key}"] for key in ("mean", "max", "min")]
            assert found == [expected["mean"], expected["max"], expected["min"]]


def test_cosines_are_whole_matrices(exported, store):
    similarity = read_table(store, "similarity").to_pandas()
    similarity = similarity[similarity.example_id == 0]
    adjacent = similarity[similarity.kind == "cross_layer"].set_index("projection")
    assert set(zip(adjacent.layer_a, adjacent.layer_b, strict=True)) == {(2, 3)}
    for projection in "qkvo":
        entry = exported[0]["cosine_sim"][f"{projection}_proj"]
        assert entry["layer_indices"] == [0, 2, 3]
        cosine = adjacent.loc[projection].cosine
        assert entry["matrix"] == [[1, None, None], [None, 1, cosine], [None, cosine, 1]]
    within = exported[0]["cosine_sim_qkvo"]
    assert set(within) == {"0", "2", "3"}
    same = similarity[similarity.kind == "same_layer"].set_index(["layer_a", "projection"]).cosine
    assert within["2"] == {"q_proj_x_o_proj": same[2, "q-o"], "k_proj_x_v_proj": same[2, "k-v"]}


def test_matrices_of_the_mlp_are_named_as_its(store, tmp_path):
    spectra = SpectraConfig(layers="3", projections=("down", "o"), similarity="all")
    data = (str(store.parent / "rows.json"),)
    directory = run(RunConfig(data=data, output_dir=tmp_path / "run", spectra=spectra))
    export(directory, "rows", tmp_path / "out.jsonl")
    row = json.loads((tmp_path / "out.jsonl").read_text("utf-8").splitlines()[0])
    names = [name for name in row if name.startswith("model.")]
    assert names == [
        "model.layers.3.self_attn.o_proj.weight",
        "model.layers.3.mlp.down_proj.weight",
    ]
    assert len(row[names[1]]["S_list"]) == 96  # down is [96, F]
    assert list(row["cosine_sim"]) == ["o_proj", "down_proj"]


def test_rows_come_in_order_whatever_the_shards(store, exported, monkeypatch, tmp_path):
    """As of a run whose shards hold one row each, the last row first."""

    def one_by_one(batches):
        return ([result] for batch in batches for result in batch)

    monkeypatch.setattr("gradjax.runs.run.shards", one_by_one)
    config = RunConfig(
        data=(str(store.parent / "rows.json"),),
        output_dir=tmp_path / "run",
        spectra=SpectraConfig(layers="0,2-3"),
        batch_tokens=1,
    )
    directory = run(config)
    assert len(list((directory / "spectra").glob("*.parquet"))) > 2
    export(directory, "rows", tmp_path / "out.jsonl")
    lines = (tmp_path / "out.jsonl").read_text("utf-8").split("\n")[:-1]
    found = [json.loads(line) for line in lines]
    assert [row["output"] for row in found] == [row["output"] for row in exported]
    for one, other in zip(found, exported, strict=True):
        assert one.keys() == other.keys()
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
        for name in (name for name in one if name.startswith("model.")):
            norms = one[name]["frobenius_norm"], other[name]["frobenius_norm"]
            assert norms[0] == pytest.approx(norms[1], rel=1e-5)


@pytest.mark.parametrize(
    ("statistic", "name"),
    [("effective_rank", "EffectiveRank"), ("nuclear_norm", "NuclearNorm")],
)
def test_rows_of_data_scorer(store, tmp_path, statistic, name):
    """One per input row, means over layers, null where a row has no number."""
    assert datascorer.export(store, "rows", tmp_path / "out.jsonl", statistic) == len(ROWS)
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rows] == list(range(len(ROWS)))
    assert all(list(row)[1:] == [f"{p}_{name}" for p in "QKVO"] for row in rows)
    spectra = read_table(store, "spectra").to_pandas()
    expected = spectra.groupby(["example_id", "projection"])[statistic].mean()
    for row in rows:
        for p in "qkvo":
            value = row[f"{p.upper()}_{name}"]
            if row["id"] in (0, 2):
                assert value == pytest.approx(expected[row["id"], p], rel=1e-12)
            else:
                assert value is None
    with pytest.raises(GradjaxError, match=r"--group=rwos: .* has the groups rows"):
        datascorer.export(store, "rwos", tmp_path / "other.jsonl", statistic)


def test_loss_is_the_stored_one(exported, store):
    examples = read_table(store, "examples").to_pandas().set_index("example_id")
    assert [row["loss"] for row in exported] == [examples.loss[0], examples.loss[2]]


def test_faults_are_named(store, tmp_path):
    with pytest.raises(GradjaxError, match=r"--group=rwos: .* has the groups rows"):
        export(store, "rwos", tmp_path / "out.jsonl")
    with pytest.raises(GradjaxError, match=r"is not a gradjax run: it has no run\.json"):
        export(tmp_path, "rows", tmp_path / "out.jsonl")
    with pytest.raises(GradjaxError, match="cannot be written"):
        export(store, "rows", tmp_path / "nowhere" / "out.jsonl")
    assert list(tmp_path.iterdir()) == []


def test_store_without_singular_values(store, tmp_path):
    data = (str(store.parent / "rows.json"),)
    spectra = SpectraConfig(layers="3")
    lean = run(
        RunConfig(
            data=data,
            output_dir=tmp_path / "run",
            spectra=spectra,
            store_singular_values=False,
        )
    )
    assert read_table(lean, "spectra").to_pandas().singular_values.isna().all()
    with pytest.raises(GradjaxError, match="--nostore_singular_values"):
        export(lean, "rows", tmp_path / "out.jsonl")
