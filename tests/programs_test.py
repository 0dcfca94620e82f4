"""Every program of a run, for devices that are not here: without a compiler for them, lowered."""

import pytest

from tests.eight_devices import run_on_eight_devices

NAMES = {
    *("rope_tables", "embed", "block_forward", "head", "block_backward", "mask_factors"),
    *("form_gradients", "entry_measures", "cosine", "spectra_dense"),
    *("spectra_qr_operand", "spectra_qr_triangle", "spectra_qr_product"),
}


@pytest.fixture(scope="module")
def lowered() -> dict[str, bool | str]:
    return run_on_eight_devices("lowered_programs")


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize(("platform", "more"), [("tpu", set()), ("gpu", {"spectra_gram"})])
def test_every_program_lowers(lowered, platform, more, devices):
    found = {tuple(name.split()): said for name, said in lowered.items()}
    names = {name for where, size, name in found if (where, int(size)) == (platform, devices)}
    assert names == NAMES | more | ({"dense_gradients"} if devices == 1 else set())
    faults = {name: said for name, said in found.items() if isinstance(said, str)}
    assert not faults


def test_a_tpu_is_given_no_float64(lowered):
    """A TPU emulates it, at a thirtieth of the speed."""
    float64 = [name.split() for name, said in lowered.items() if said is True]
    assert {(platform, name) for platform, _, name in float64} == {("gpu", "spectra_gram")}
