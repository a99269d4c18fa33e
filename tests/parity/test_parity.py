"""Trajectories of this package against plain PyTorch, end to end: losses, gradients, updates."""

import pytest

from tests.parity.problems import GOLDEN
from tests.parity.trajectories import FORMS, PROBLEMS, compare, compare_golden


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("form", FORMS)
def test_trajectories_agree(problem, form):
    found = compare(problem, form, steps=150, float32_steps=100)
    assert 0.05 < found["conflicts"] < 0.95
    assert 0.05 < found["clipped"] < 0.95
    assert found["float64"] < 1e-10
    # In float32 each strays from its own float64 trajectory; ours as little as PyTorch's.
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
