"""Whole runs of the embedded model: every row accounted for, whatever happens to the process."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import time
from collections import Counter
from pathlib import Path

import jax
import numpy as np
import pandas as pd
import pytest
import threadpoolctl

import gradjax
from gradjax.checkpoints import hf_config
from gradjax.checkpoints.resolve import resolve
from gradjax.config import RunConfig, SpectraConfig, TokenConfig
from gradjax.data.sources import parse_data_flags
from gradjax.data.word_problems import demo_rows
from gradjax.errors import GradjaxError
from gradjax.runs import compute, progress
from gradjax.runs import inputs as inputs_module
from gradjax.runs import run as run_module
from gradjax.runs.inputs import default_directory
from gradjax.runs.manifest import git_revision
from gradjax.runs.run import run
from gradjax.storage import store as store_module
from gradjax.storage.results import group_means, rows_to_come, unused_rows
from gradjax.storage.store import TABLES, open_store, read_manifest, read_table
from tests.whole_runs import MAIN, every_byte, start, tables

pytestmark = pytest.mark.smoke

# Small and quick, and still several batches of several lengths.
SMALL = SpectraConfig(layers="2-3")
SMALL_FILES = """
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (15_000, 15_000))
"""


def config(output_dir: Path, **changes) -> RunConfig:
    defaults = {"spectra": SMALL, "limit": 5, "batch_tokens": 128, "output_dir": output_dir}
    return RunConfig(**{**defaults, **changes})


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    directory = tmp_path_factory.mktemp("whole") / "run"
    process = start(directory)
    output, errors = process.communicate()
    assert process.returncode == 0, errors
    return directory, output


def test_the_table_says_what_the_store_holds(uninterrupted):
    directory, output = uninterrupted
    lines = output.splitlines()
    assert [line.split()[0] for line in lines[2:5]] == ["slow", "fast", "corrupted"]
    assert lines[-1] == f"The store is in {directory}"
    opened = gradjax.open_run(directory)
    assert set(opened.examples.status) == {"ok"}
    assert len(opened.examples) == 36
    assert len(opened.spectra) == 36 * 2 * 4
    assert len(opened.similarity) == 36 * (2 * 2 + 4)
    # The paper's mean: over examples per layer, then over layers.
    part = opened.spectra.query("group == 'fast' and projection == 'v'")
    expected = part.groupby("layer").effective_rank.mean().mean()
    assert group_means(directory).loc["fast", ("effective_rank", "v")] == pytest.approx(expected)
    assert f"{expected:.2f}" in lines[3]


def test_plain_pandas_reads_the_store(uninterrupted):
    directory, _ = uninterrupted
    examples = pd.read_parquet(directory / "examples")
    spectra = pd.read_parquet(directory / "spectra")
    assert sorted(examples.columns) == sorted(TABLES["examples"].names)
    assert sorted(spectra.columns) == sorted(TABLES["spectra"].names)
    for row in spectra.itertuples():
        assert np.sum(row.singular_values, dtype=np.float64) == pytest.approx(row.nuclear_norm)


def test_manifest_tells_what_was_run(uninterrupted):
    directory, _ = uninterrupted
    manifest = json.loads((directory / "run.json").read_text())
    (invocation,) = manifest["invocations"]
    assert invocation["flags"]["limit"] == 12
    assert manifest["settings"]["spectrum_route"] == "gram"
    assert manifest["settings"]["model"].startswith("sha256:")
    assert manifest["data"]["fast"]["rows"] == 12
    assert manifest["versions"]["gradjax"] == gradjax.__version__
    assert invocation["versions"]["jax"] == jax.__version__
    assert [machine["platform"] for machine in invocation["machines"]] == ["cpu"]


@pytest.fixture(scope="module")
def own_run(tmp_path_factory):
    """A finished run of eight rows of a file, and its config."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "rows.json").write_text(json.dumps(demo_rows("slow")[:8]))
    settings = config(folder / "run", data=(str(folder / "rows.json"),), limit=None)
    run(settings)
    return settings


def refusals(settings: RunConfig) -> dict[str, tuple[RunConfig, str]]:
    replace = dataclasses.replace
    return {
        "fewer rows": (replace(settings, limit=3), "--limit leaves out"),
        "other settings": (replace(settings, dtype="bfloat16"), "other settings: dtype"),
        "other rows": (replace(settings, data=("rows=demo.json",)), "holds another row"),
        "no such layer": (replace(settings, spectra=SpectraConfig(layers="9")), "--layers=9"),
        "no such data": (replace(settings, data=("rows=nowhere.json",)), "nowhere.json"),
        "no such model": (replace(settings, model="qwen", overwrite=True), "--model=qwen"),
        "no such mesh": (replace(settings, mesh="data:3", overwrite=True), "--mesh=data:3"),
        "a broken model": (replace(settings, model="broken", overwrite=True), "no weights"),
    }


@pytest.mark.parametrize("kind", refusals(RunConfig()))
def test_what_is_refused_changes_no_byte(kind, own_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo.json").write_text(json.dumps(demo_rows("fast")[:8]))
    demo = resolve("demo").directory
    shutil.copytree(demo, tmp_path / "broken", ignore=shutil.ignore_patterns("*.safetensors"))
    before = every_byte(own_run.output_dir)
    refused, says = refusals(own_run)[kind]
    with pytest.raises(GradjaxError, match=says):
        run(refused)
    assert every_byte(own_run.output_dir) == before
    assert rows_to_come(own_run.output_dir) == 0


def test_a_refusal_makes_no_directory(tmp_path):
    with pytest.raises(GradjaxError, match="--mesh=data:3"):
        run(config(tmp_path / "run", mesh="data:3"))
    assert not list(tmp_path.iterdir())


def test_nothing_to_compute_changes_nothing(own_run, monkeypatch):
    before = every_byte(own_run.output_dir)
    monkeypatch.setattr(run_module, "load_weights", None)
    run(own_run)
    assert every_byte(own_run.output_dir) == before


def test_checkpoint_config_and_finished_rows_are_read_once(tmp_path, monkeypatch):
    run(config(tmp_path / "run", limit=1))
    calls = Counter()

    def count(module, name):
        call = getattr(module, name)

        def counted(*arguments, **options):
            calls[name] += 1
            return call(*arguments, **options)

        monkeypatch.setattr(module, name, counted)

    count(inputs_module, "resolve")
    count(hf_config, "read_json_object")
    count(store_module, "finished_rows")
    run(config(tmp_path / "run", limit=2))
    assert set(calls.values()) == {1}
    assert len(calls) == 3


def test_every_call_that_computed_is_recorded(tmp_path):
    for limit in (1, 2, 2):
        directory = run(config(tmp_path / "run", limit=limit))
    invocations = read_manifest(directory)["invocations"]
    assert [i["flags"]["limit"] for i in invocations] == [1, 2]


def test_what_a_manifest_names_can_be_read_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("rows.json").write_text(json.dumps(demo_rows("slow")[:1]))
    directory = run(config(tmp_path / "run", data=("rows.json",)))
    assert read_manifest(directory)["data"]["rows"]["source"] == str(tmp_path / "rows.json")


def test_only_gradjaxs_own_checkout_has_a_revision(tmp_path):
    """Installed into an environment inside a user's repository, the commit is the user's."""
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-C", str(tmp_path)]
    package = tmp_path / "gradjax"
    package.mkdir()
    (package / "version.py").touch()
    (tmp_path / "mine.py").touch()
    assert git_revision(package) is None  # no repository
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "add", "mine.py"], check=True)
    subprocess.run([*git, "commit", "-qm", "mine"], check=True)
    assert git_revision(package) is None  # not of this repository
    nested = tmp_path / "venv" / "gradjax"
    shutil.copytree(package, nested)
    subprocess.run([*git, "add", "."], check=True)
    assert git_revision(nested) is None  # not at its root
    subprocess.run([*git, "commit", "-qm", "gradjax"], check=True)
    said = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    assert git_revision(package) == said.stdout.strip()
    (package / "version.py").write_text("changed")
    assert git_revision(package) == f"{said.stdout.strip()}-dirty"


@pytest.mark.parametrize(
    ("model", "data", "directory"),
    [
        ("demo", ["demo"], "demo"),
        ("qwen2.5_0.5b", ["demo"], "qwen2.5_0.5b-demo"),
        ("demo", ["a/rows.json"], "demo-rows"),
        ("demo", ["a/demo.json"], "demo-demo"),
        ("m", ["good=x.json", "demo", "bad=y.json"], "m-good-demo-bad"),
    ],
)
def test_default_directory_is_named_after_model_and_data(model, data, directory):
    assert default_directory(model, parse_data_flags(data)) == Path("runs") / directory


def test_many_groups_still_give_a_name():
    names = {
        default_directory("m", parse_data_flags([f"{i:060}=x.json", *"abc"])).name for i in (1, 2)
    }
    assert len(names) == 2
    assert max(map(len, names)) < 120


def test_killed_runs_continue_to_the_same_store(uninterrupted, tmp_path):
    expected, _ = uninterrupted
    directory = tmp_path / "run"
    for shards in (1, 3):  # kill -9 as soon as so many shards stand
        process = start(directory)
        while len(list(directory.glob("examples/*.parquet"))) < shards:
            assert process.poll() is None, process.communicate()
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        for table in TABLES:  # readable as it stands
            read_table(directory, table)
    done = len(read_table(directory, "examples"))
    assert 0 < done < 36
    process = start(directory)
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    assert f"{done} finished before" in errors
    for table, frame in tables(directory).items():
        pd.testing.assert_frame_equal(frame, tables(expected)[table], check_exact=True)
    assert {path.name for path in directory.iterdir()} == {".tmp", "run.json", *TABLES}
    assert [path.name for path in (directory / ".tmp").iterdir()] == ["lock"]


def test_full_disk_stops_clearly_and_the_run_goes_on_later(uninterrupted, tmp_path):
    """A limit on file size makes real writes fail after some bytes."""
    expected, _ = uninterrupted
    directory = tmp_path / "run"

    process = start(directory, "--batch_tokens=1024", code=SMALL_FILES + MAIN)
    output, errors = process.communicate()
    assert process.returncode == 1
    assert output == ""
    last = errors.splitlines()[-1]
    assert last.startswith(f"gradjax: cannot write to {directory}")
    assert "Traceback" not in errors
    process = start(directory)
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    frames = tables(directory)
    pd.testing.assert_series_equal(
        frames["examples"]["row_hash"], tables(expected)["examples"]["row_hash"]
    )


def test_second_writer_is_refused(tmp_path):
    with open_store(tmp_path / "run", {}):
        process = start(tmp_path / "run")
        _, errors = process.communicate()
        assert process.returncode == 1
        assert f"is being written by process {os.getpid()}" in errors


def test_run_twice_computes_nothing(tmp_path, monkeypatch):
    directory = run(config(tmp_path / "run"))
    before = tables(directory)
    monkeypatch.setattr(run_module, "compute_results", None)
    run(config(tmp_path / "run"))
    for table, frame in tables(directory).items():
        pd.testing.assert_frame_equal(frame, before[table], check_exact=True)


def test_limit_may_grow_and_groups_may_be_added(tmp_path):
    rows = tmp_path / "extra.json"
    rows.write_text(json.dumps(demo_rows("slow")[:3]))
    run(config(tmp_path / "run", limit=2))
    run(config(tmp_path / "run", limit=4))
    directory = run(config(tmp_path / "run", limit=4, data=("demo", str(rows))))
    counts = tables(directory)["examples"].groupby("group").size()
    assert dict(counts) == {"slow": 4, "fast": 4, "corrupted": 4, "extra": 3}
    whole = run(config(tmp_path / "whole", limit=4, data=("demo", str(rows))))
    for table, frame in tables(directory).items():
        expected = tables(whole)[table]
        numbers = frame.select_dtypes("number").columns
        np.testing.assert_allclose(frame[numbers], expected[numbers], rtol=1e-4, atol=1e-6)
        others = [name for name in frame if name not in (*numbers, "singular_values")]
        pd.testing.assert_frame_equal(frame[others], expected[others])
    assert list(group_means(directory).index) == ["slow", "fast", "corrupted", "extra"]


def test_smaller_limit_is_refused(tmp_path):
    run(config(tmp_path / "run", limit=3))
    with pytest.raises(GradjaxError, match=r"row 2 of group .* --limit leaves out"):
        run(config(tmp_path / "run", limit=2))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"dtype": "bfloat16"}, "dtype"),
        ({"tokens": TokenConfig(max_length=64)}, "max_length"),
        ({"tokens": TokenConfig(prompt_format="chat")}, "prompt_format"),
        ({"spectra": dataclasses.replace(SMALL, projections=("q",))}, "projections"),
        ({"spectra": dataclasses.replace(SMALL, layers="3")}, "layers"),
        ({"spectra": dataclasses.replace(SMALL, spectrum="dense")}, "spectrum"),
        ({"random_init": True}, "model"),
        ({"store_singular_values": False}, "store_singular_values"),
    ],
)
def test_other_settings_are_refused_by_name(changes, named, tmp_path, one_row_run):
    with pytest.raises(GradjaxError, match=rf"holds a run with other settings: .*\b{named} \("):
        run(config(one_row_run, limit=1, **changes))


def test_other_settings_are_refused_before_anything_is_read(one_row_run, monkeypatch):
    for name in ("resolve", "load_tokenizer", "parse_data_flags"):
        monkeypatch.setattr(inputs_module, name, None)
    with pytest.raises(GradjaxError, match=r"other settings: dtype \("):
        run(config(one_row_run, limit=1, dtype="bfloat16"))


@pytest.fixture(scope="module")
def one_row_run(tmp_path_factory):
    return run(config(tmp_path_factory.mktemp("one") / "run", limit=1))


def test_overwrite_replaces(tmp_path):
    directory = run(config(tmp_path / "run", limit=2))
    spectra = dataclasses.replace(SMALL, projections=("v",), similarity="none")
    run(config(tmp_path / "run", limit=1, spectra=spectra, overwrite=True))
    frames = tables(directory)
    assert len(frames["examples"]) == 3
    assert set(frames["spectra"].projection) == {"v"}
    assert frames["similarity"].empty


def test_changed_rows_are_refused(tmp_path):
    rows = tmp_path / "rows.json"
    rows.write_text(json.dumps([{"instruction": "1 + 1 = ?", "output": "2"}]))
    run(config(tmp_path / "run", data=(str(rows),)))
    rows.write_text(json.dumps([{"instruction": "1 + 1 = ?", "output": "3"}]))
    with pytest.raises(GradjaxError, match="holds another row 0 of group rows"):
        run(config(tmp_path / "run", data=(str(rows),)))


def test_every_row_gets_a_status(tmp_path):
    path = tmp_path / "rows.json"
    rows = [
        {"instruction": "How many are 2 + 3?", "output": "2 + 3 = 5. The answer is 5."},
        {"instruction": "How many are 2 + 3?", "output": ""},
        {"instruction": 7, "output": "5"},
        {"instruction": "word " * 60, "output": "5"},
        {"instruction": "How many are 2 + 3?", "output": "5"},
        {"instruction": "How many are 2 + 3?", "output": "2 + 3 = 5. The answer is 5."},
        "not an object",
        {"messages": [{"role": r, "content": "5"} for r in ("user", "assistant") * 2]},
    ]
    path.write_text(json.dumps(rows))
    tokens = TokenConfig(max_length=48, target_tokens=3)
    directory = run(config(tmp_path / "run", data=(str(path),), limit=None, tokens=tokens))
    examples = tables(directory)["examples"]
    assert list(examples.status) == [
        "ok", "empty_response", "invalid_row", "no_target_tokens",
        "too_short", "ok", "invalid_row", "invalid_row",
    ]  # fmt: skip
    assert "chat" in examples.reason[7]
    assert examples.loss.notna().tolist() == [status == "ok" for status in examples.status]
    assert examples.num_target_tokens[0] == 3
    assert examples.row_hash[0] == examples.row_hash[5]  # the same row twice stays two rows
    table = group_means(directory)
    assert tuple(table.loc["rows", [("rows", "used"), ("rows", "not used")]]) == (2, 6)


def test_a_group_without_usable_rows(tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"instruction": "a"}\n{"output": "b"}\n')
    with pytest.raises(GradjaxError, match=r"none of the 2 rows of group 'bad'.*2 invalid_row"):
        run(config(tmp_path / "run", data=(str(path),)))
    assert not (tmp_path / "run").exists()


def test_numbers_that_overflow_are_not_finite(tmp_path, monkeypatch):
    """Finite weights whose product is not: the row is kept, and says so."""
    from gradjax.checkpoints import pretrained

    load = pretrained.load_weights

    def huge(*arguments, **options):
        decoder = load(*arguments, **options)
        decoder.final_norm[...] = decoder.final_norm[...] * 3e38
        return decoder

    monkeypatch.setattr(run_module, "load_weights", huge)
    directory = run(config(tmp_path / "run", limit=1))
    frames = tables(directory)
    assert set(frames["examples"].status) == {"non_finite"}
    assert frames["examples"].loss.isna().all()
    assert frames["spectra"].empty
    assert unused_rows(directory) == [
        f"{group}: 1 rows non_finite" for group in ("corrupted", "fast", "slow")
    ]


def test_dense_equals_factored(tmp_path):
    factored = tables(run(config(tmp_path / "factored", limit=3)))
    spectra = dataclasses.replace(SMALL, spectrum="dense")
    dense = tables(run(config(tmp_path / "dense", limit=3, spectra=spectra)))
    for table, columns in {
        "examples": ["loss"],
        "spectra": ["nuclear_norm", "effective_rank", "frobenius_norm", "spectral_norm"],
    }.items():
        np.testing.assert_allclose(factored[table][columns], dense[table][columns], rtol=2e-4)
    np.testing.assert_allclose(factored["similarity"].cosine, dense["similarity"].cosine, atol=1e-5)


def test_bfloat16_and_random_weights_run(tmp_path):
    directory = run(config(tmp_path / "run", limit=2, dtype="bfloat16", random_init=True))
    frames = tables(directory)
    assert set(frames["examples"].status) == {"ok"}
    assert frames["spectra"].effective_rank.between(1, 200).all()


def test_ten_lines_of_python():
    """The README's example."""
    readme = Path(__file__).parent.parent / "README.md"
    block = readme.read_text(encoding="utf-8").split("```python\n")[1].split("```")[0]
    assert len(block.strip().splitlines()) <= 10
    names: dict = {}
    exec(block, names)
    results = names["results"]
    assert sorted(r.tokenized.example.example_id for r in results) == list(range(len(results)))
    assert all(r.status == "ok" and r.spectra for r in results)


ROWS = [
    {"prompt": "How many are 2 + 3?", "completion": "2 + 3 = 5. The answer is 5."},
    {"prompt": "?", "completion": ""},
    {"prompt": "How many are 2 + 3?" * 3, "completion": "2 + 3 = 5."},
    {"prompt": "How many?", "completion": "5", 7: "odd", ("x",): None, None: {}},
]


@pytest.mark.parametrize("ordered", [True, False])
def test_results_come_in_order_unless_asked_otherwise(ordered):
    model = gradjax.load_model("demo")
    results = list(
        gradjax.gradient_spectra(model, ROWS, layers="0", batch_tokens=32, ordered=ordered)
    )
    numbers = [result.tokenized.example.example_id for result in results]
    assert numbers == ([0, 1, 2, 3] if ordered else [1, 2, 0, 3])
    assert [result.status for result in results if result.status != "ok"] == ["empty_response"]


def test_the_callers_threads_are_left_alone_between_results():
    model = gradjax.load_model("demo")
    with threadpoolctl.threadpool_limits(2, "blas"):
        before = threadpoolctl.threadpool_info()
        for _ in gradjax.gradient_spectra(model, ROWS, batch_tokens=32, ordered=False):
            assert threadpoolctl.threadpool_info() == before
        assert threadpoolctl.threadpool_info() == before


def test_a_model_fits_on_a_line():
    assert repr(gradjax.load_model("demo")) == (
        "Model(qwen2, 4 layers, 458,784 parameters in float32, 1 x cpu)"
    )


def test_another_model_is_refused_by_its_name(tmp_path, one_row_run):
    other = shutil.copytree(resolve("demo").directory, tmp_path / "other")
    config_file = other / "config.json"
    config_file.write_text(config_file.read_text().replace("1e-06", "1e-05"))
    assert "1e-05" in config_file.read_text()
    with pytest.raises(GradjaxError, match=r"model \('demo, sha256:\w+' there, '\S+other, sha256:"):
        run(config(one_row_run, limit=1, model=str(other)))
    with pytest.raises(GradjaxError, match=r"other settings: model \("):
        run(config(one_row_run, limit=1, model=str(other)))


def test_the_same_weights_elsewhere_are_the_same_model(tmp_path, one_row_run):
    shutil.copytree(resolve("demo").directory, tmp_path / "copy")
    (tmp_path / "copy" / "README.md").write_text("edited")
    before = every_byte(one_row_run)
    run(config(one_row_run, limit=1, model=str(tmp_path / "copy")))
    assert every_byte(one_row_run) == before


def test_later_shards_are_larger(monkeypatch):
    monkeypatch.setattr(progress, "_FLUSH_SECONDS", 1e9)
    (result,) = gradjax.gradient_spectra(gradjax.load_model("demo"), ROWS[:1], layers="0")
    sizes = [len(shard) for shard in progress.shards([result] * 16 for _ in range(10_000))]
    assert sum(sizes) == 160_000
    assert sizes[:64] == [256] * 64
    assert sizes[64:128] == [512] * 64
    assert len(sizes) < 300


def test_what_was_not_read_and_what_is_beyond_the_model_is_said_and_recorded(tmp_path, caplog):
    model = shutil.copytree(resolve("demo").directory, tmp_path / "short")
    text = (model / "config.json").read_text()
    (model / "config.json").write_text(text.replace(": 4096", ": 16"))
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row | {"id": 1, "meta": {}}) for row in ROWS[:3]))
    with caplog.at_level("INFO"):
        directory = run(config(tmp_path / "run", data=(str(path),), model=str(model), limit=None))
    said = read_manifest(directory)["data"]["rows"]
    assert said["ignored_columns"] == ["id", "meta"]
    assert said["rows_beyond_positions"] == 2
    assert "rows: columns that are not read: id, meta" in caplog.text
    assert "rows: 2 rows have more tokens than the 16 positions" in caplog.text
    assert "--max_length=16 cuts them" in caplog.text
    assert "rows: not usable are 1 empty_response (row 1: the response in turn 2" in caplog.text


def test_counts_add_up(tmp_path, caplog):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, ROWS[:3])))
    for limit, said in ((2, "2 rows: 0 finished before, 1 to compute, 1 not usable"),
                        (3, "3 rows: 2 finished before, 1 to compute, 0 not usable")):  # fmt: skip
        with caplog.at_level("INFO"):
            run(config(tmp_path / "run", data=(str(path),), limit=limit))
        assert said in caplog.text


def test_unknown_setting_of_the_api():
    model = gradjax.load_model("demo")
    with pytest.raises(TypeError, match="no setting promt_format"):
        list(gradjax.gradient_spectra(model, [], promt_format="chat"))


def test_directory_with_other_files_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(GradjaxError, match=r"not a gradjax run \(found thesis.tex\)"):
            run(config(tmp_path, limit=1, overwrite=overwrite))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


@pytest.mark.parametrize("place", ["/proc/gradjax", "file/run"])
def test_directory_that_cannot_be_written(place, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(GradjaxError, match=r"cannot write to .*--output_dir"):
        run(config(tmp_path / place, limit=1))


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (MemoryError(), r"a batch of \d+ rows of \d+ tokens does not fit .*; lower --batch_tokens"),
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 9 GiB"), "does not fit"),
        (jax.errors.JaxRuntimeError("INTERNAL: broken"), "INTERNAL: broken"),
    ],
)
def test_batch_that_does_not_fit(error, message, tmp_path, monkeypatch):
    def fail(*_):
        raise error

    monkeypatch.setattr(compute, "batch_spectra", fail)
    with pytest.raises((GradjaxError, jax.errors.JaxRuntimeError), match=message):
        run(config(tmp_path / "run", batch_tokens=None))


def test_one_example_is_logged_with_its_target_tokens_marked(uninterrupted, tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "JAX_PLATFORMS"}
    process = start(tmp_path / "run", "--limit=1", env=environment)
    _, errors = process.communicate()
    row = demo_rows("slow")[0]
    assert f"{row['instruction']}\\n⟦{row['output']}⟧" in errors
    assert "tpu" not in errors.lower()  # libraries' own lines stay out
    first = errors.splitlines()[0]
    for said in ("demo (demo), 458,784 parameters in float32, on", "1 of slow", str(tmp_path)):
        assert said in first


def test_model_that_does_not_fit(monkeypatch):
    from gradjax.checkpoints import pretrained

    def fail(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 9 GiB")

    monkeypatch.setattr(pretrained, "load_decoder", fail)
    with pytest.raises(GradjaxError, match=r"need 0\.0 GiB in float32.*--dtype=bfloat16"):
        gradjax.load_model("demo")


def test_store_that_lacks_rows_is_not_a_success(tmp_path, monkeypatch):
    monkeypatch.setattr(run_module, "compute_results", lambda *_: iter([]))
    with pytest.raises(GradjaxError, match="lacks 15 of 15 rows although the run has ended"):
        run(config(tmp_path / "run"))


def test_broken_model_does_not_cost_the_run_that_it_was_to_replace(tmp_path, monkeypatch):
    directory = run(config(tmp_path / "run", limit=1))
    before = tables(directory)

    def fail(*_, **__):
        raise GradjaxError("truncated")

    monkeypatch.setattr(run_module, "load_weights", fail)
    with pytest.raises(GradjaxError, match="truncated"):
        run(config(tmp_path / "run", limit=1, overwrite=True))
    pd.testing.assert_frame_equal(tables(directory)["spectra"], before["spectra"])


def test_token_beyond_the_vocabulary(tmp_path, monkeypatch):
    read = inputs_module.read_config
    monkeypatch.setattr(
        inputs_module, "read_config", lambda d: dataclasses.replace(read(d), vocab_size=40)
    )
    with pytest.raises(GradjaxError, match=r"row 0: .* outside the model's vocabulary of 40"):
        run(config(tmp_path / "run"))
