"""Meshes of 8 forced CPU devices, each in a process of its own, against one device."""

import json

import pytest

from gradjax.errors import GradjaxError
from gradjax.sharding import make_mesh, one_device, parse_mesh
from tests.checkpoints import make_hf_model, save_checkpoint
from tests.eight_devices import run_on_eight_devices

SPLITS = [
    (data, fsdp, 8 // data // fsdp)
    for data in (1, 2, 4, 8)
    for fsdp in (1, 2, 4, 8)
    if 8 % (data * fsdp) == 0
]


# Those that differ in what a mesh splits or gathers: the others are made of the same parts.
MORE = [
    pytest.param(family, marks=pytest.mark.slow)
    for family in ("llama", "gemma2", "gemma3_text", "olmo2")
]


@pytest.mark.parametrize("family", ["qwen2", *MORE])
def test_every_split_of_eight_gives_the_numbers_of_one_device(family, tmp_path):
    # Some sizes are multiples of 8; others are not, and stay whole on some meshes.
    sizes = {"intermediate_size": 56, "num_hidden_layers": 2, "vocab_size": 104}
    hf_model = make_hf_model(family, seed=11, hidden_size=48, **sizes)
    save_checkpoint(hf_model, tmp_path)
    errors = run_on_eight_devices("largest_differences", str(tmp_path), json.dumps(SPLITS))
    for split in SPLITS:
        for what, error in errors[str(split)].items():
            assert error < 1e-5, (split, what)


def test_the_qr_route_takes_each_devices_own_rows(tmp_path):
    save_checkpoint(make_hf_model("llama", seed=12, num_hidden_layers=2), tmp_path)
    errors = run_on_eight_devices("largest_differences", str(tmp_path), "[[2, 2, 2]]", "qr")
    for what, error in errors["(2, 2, 2)"].items():
        assert error < 1e-5, what


def test_threads_that_fetch_at_once_get_the_rows_own_values():
    assert run_on_eight_devices("wrong_values", "200") == 0


def test_each_device_decomposes_and_measures_only_its_own_examples():
    programs = run_on_eight_devices("compiled_collectives")
    assert programs.pop("control")["collectives"]  # the reading finds one where there is one
    assert len(programs) == 8 * 4
    for name, found in programs.items():
        assert found["collectives"] == [], name
        assert set(found["decomposed"]) <= {"2"}, name  # of the batch's 16 examples
    assert programs["spectra_gram (2, 2, 2)"]["decomposed"]


def test_an_axis_that_does_not_divide_is_named(tmp_path):
    save_checkpoint(make_hf_model("llama", seed=1, num_hidden_layers=1), tmp_path)
    lines = run_on_eight_devices("log_lines", str(tmp_path), "[1, 4, 2]")
    assert any("D of 42" in line and "fsdp:4" in line for line in lines)
    assert any("F of 53" in line and "tensor:2" in line for line in lines)
    assert not any("Q of 60" in line for line in lines)


@pytest.mark.parametrize("text", ["", "data", "data:0", "data:2,data:2", "model:2", "data=2"])
def test_malformed_mesh_is_refused(text):
    with pytest.raises(GradjaxError, match=f"--mesh={text}"):
        parse_mesh(text)


def test_mesh_of_another_number_of_devices_is_refused():
    with pytest.raises(GradjaxError, match="for 3 devices, and there are 1"):
        make_mesh(parse_mesh("tensor:3"), one_device().devices.flatten().tolist())
