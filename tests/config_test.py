"""Flags and settings are refused by name, before anything is loaded."""

import subprocess
import sys

import pytest

from gradjax.config import RunConfig, SpectraConfig, TokenConfig
from gradjax.errors import GradjaxError

pytestmark = pytest.mark.smoke


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        (TokenConfig, {"max_length": 1}, "--max_length=1: expected a number of at least 2"),
        (TokenConfig, {"target_tokens": 0}, "--target_tokens=0"),
        (TokenConfig, {"prompt_format": "raw"}, "--prompt_format=raw: expected one of plain, ch"),
        (TokenConfig, {"truncation": "left"}, "--truncation=left"),
        (SpectraConfig, {"spectrum": "svd"}, "--spectrum=svd: expected one of factored, dense"),
        (SpectraConfig, {"spectrum_route": "eig"}, "--spectrum_route=eig"),
        (SpectraConfig, {"similarity": "some"}, "--similarity=some"),
        (
            SpectraConfig,
            {"projections": ("q", "q")},
            "--projections=q,q: expected some of q,k,v,o,gate,up,down",
        ),
        (SpectraConfig, {"projections": ()}, "--projections="),
        (SpectraConfig, {"projections": ("q", "head")}, "--projections=head"),
        (SpectraConfig, {"layers": "1-"}, "--layers=1-: expected `all` or numbers"),
        (RunConfig, {"dtype": "float16"}, "--dtype=float16: expected one of float32, bfloat16"),
        (RunConfig, {"limit": 0}, "--limit=0"),
        (RunConfig, {"batch_tokens": -1}, "--batch_tokens=-1"),
        (RunConfig, {"seed": -1}, "--seed=-1"),
    ],
)
def test_wrong_setting_is_named(kind, settings, message):
    with pytest.raises(GradjaxError, match=message):
        kind(**settings)


def test_layers():
    assert SpectraConfig().layer_numbers(3) == (0, 1, 2)
    assert SpectraConfig(layers="4,0-2,1").layer_numbers(5) == (0, 1, 2, 4)
    for layers in ("5", "3-5", "2-1"):
        with pytest.raises(GradjaxError, match=f"--layers={layers}: .* 0 to 4"):
            SpectraConfig(layers=layers).layer_numbers(5)


def test_projections_are_kept_in_one_order():
    assert SpectraConfig(projections=("o", "q")).projections == ("q", "o")


def main(*flags: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "gradjax.main", *flags]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_help_teaches():
    shown = main("--help").stdout
    for words in (
        "--data",
        "GROUP: the file's stem",
        "runs/{model}-{groups}",
        "gradjax spectra --m",
    ):
        assert words in shown


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["rows.json"], "unexpected argument 'rows.json'"),
        (["--limit=0"], "--limit=0: expected a number of at least 1"),
        (["--model=gemma2_3b"], "gemma2_2b"),
        (["--model=demo", "--data=nowhere.json"], "nowhere.json"),
        (["--layers=9"], "--layers=9: 9 is not within this model's layers, 0 to"),
    ],
)
def test_errors_are_one_sentence(flags, message, tmp_path):
    ended = main(f"--output_dir={tmp_path / 'run'}", *flags)
    assert ended.returncode == 1
    assert ended.stdout == ""
    last = ended.stderr.strip().splitlines()[-1]
    assert last.startswith("gradjax: ")
    assert message in last
    assert "Traceback" not in ended.stderr
    assert not (tmp_path / "run").exists()
