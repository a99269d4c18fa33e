"""Trajectories of this package against plain PyTorch, end to end: losses, gradients, updates."""

import pytest

from tests.parity.problems import GOLDEN
from tests.parity.trajectories import FORMS, PROBLEMS, compare, compare_golden

BOTH = pytest.mark.parametrize(
    ("problem", "form"), [(problem, form) for problem in PROBLEMS for form in FORMS]
)


@BOTH
def test_float64_trajectories_agree(problem, form):
    found = compare(problem, form)
    assert 0.05 < found["conflicts"] < 0.95
    assert 0.05 < found["clipped"] < 0.95
    assert found["float64"] < 1e-10


@BOTH
def test_float32_stays_as_close_to_float64_as_pytorch_does(problem, form):
    found = compare(problem, form)
    assert 0 < found["jax_float32"] < 2 * found["torch_float32"]


@pytest.mark.parametrize("name", GOLDEN)
def test_released_code_is_replayed_from_its_gradients(name):
    found = compare_golden(name, end_to_end=False)
    assert found["params"] < 1e-12, found
    # The orthogonal norm comes from the inner products, and the statistics' figures from it.
    assert max(found.values()) < 1e-11, found


@pytest.mark.parametrize("name", GOLDEN)
def test_released_code_is_met_end_to_end(name):
    found = compare_golden(name, end_to_end=True)
    assert max(found.values()) < 1e-8, found
