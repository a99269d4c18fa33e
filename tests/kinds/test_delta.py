"""Several tasks on a shared trunk: delta m is what it says, and both libraries train alike."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from typer.testing import CliRunner

from benchmarks.kinds import delta
from benchmarks.kinds.__main__ import app


@pytest.fixture(scope="module")
def tasks():
    """Two of the ten properties."""
    found = delta.tumours()
    fewer = [(inputs, targets[:, :2]) for inputs, targets in (found.training, found.test)]
    return found._replace(names=found.names[:2], training=fewer[0], test=fewer[1])


def test_delta_m_is_a_mean_of_signed_relative_changes():
    single, found = np.array([2.0, 10.0]), np.array([[1.0, 10.0], [4.0, 5.0]])
    np.testing.assert_allclose(delta.delta_m(found, single, higher=False), [-25, 25])
    np.testing.assert_allclose(delta.delta_m(found, single, higher=True), [25, -25])


@pytest.mark.parametrize("method", ["equal weights", "UPGrad"])
def test_both_libraries_take_the_same_steps(tasks, method):
    ours, torchs = (train(tasks, method, 1, 20, 1e-3) for train in (delta.train, delta.train_torch))
    np.testing.assert_allclose(ours, torchs, rtol=1e-2)


def test_a_single_task_is_trained_as_if_there_were_no_other(tasks):
    found = delta.train(tasks, delta.SINGLE, 1, 20, 1e-2)
    # A task alone, beside one whose targets are noise.
    noise = jax.random.normal(jax.random.key(0), tasks.training[1].shape)
    noisy = tasks.training[1].at[:, 1].set(noise[:, 1])
    others = tasks._replace(training=(tasks.training[0], noisy))
    again = delta.train(others, delta.SINGLE, 1, 20, 1e-2)
    np.testing.assert_allclose(again[0, 0], found[0, 0], rtol=1e-3)
    assert abs(again[0, 1] / found[0, 1] - 1) > 0.01


def test_a_digit_lies_over_another(tasks):
    found = delta.two_digits()
    inputs, labels = found.training
    assert inputs.shape == (4000, 100)
    assert labels.shape == (4000, 2)
    # Neither digit reaches its opposite corner.
    corners = inputs.reshape(-1, 10, 10)[:, [0, -1], [-1, 0]]
    assert jnp.all(corners == 0)


def test_the_command_reports_both_libraries(tmp_path, monkeypatch):
    monkeypatch.setattr(delta, "METHODS", {"gdmam": delta.METHODS["gdmam"]})
    monkeypatch.setattr(delta, "TORCH_METHODS", {"PCGrad": delta.TORCH_METHODS["PCGrad"]})
    output = tmp_path / "delta.json"
    small = ["--problems", "tumours", "--seeds", "1", "--steps", "3", "--output", str(output)]
    ran = CliRunner().invoke(app, ["delta", *small])
    assert ran.exit_code == 0, ran.output
    text = output.read_text()
    assert all(
        name in text for name in ("single tasks", "gdmam_jax", "TorchJD", "0.0 (0.0 to 0.0)")
    )
