"""Several tasks on a shared trunk: delta m is what it says, and all libraries train alike."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from typer.testing import CliRunner

from benchmarks.kinds import delta, pytorch
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


@pytest.fixture
def libmtl():
    if not pytorch.libmtl_is_installed():
        pytest.skip("LibMTL is not installed")


def same_steps(tasks, ours, theirs):
    found = [train(tasks, 1, 20, 1e-3) for train in (ours, theirs)]
    np.testing.assert_allclose(*found, rtol=1e-2)


@pytest.mark.parametrize("method", ["equal weights", "UPGrad"])
def test_torchjd_takes_the_same_steps(tasks, method):
    make = pytorch.TORCHJD[method]
    same_steps(tasks, partial(delta.train, method), partial(delta.train_torch, make))


@pytest.mark.parametrize("method", ["equal weights", "PCGrad"])
def test_libmtl_takes_the_same_steps(libmtl, tasks, method):
    make = pytorch.LIBMTL[method]
    same_steps(tasks, partial(delta.train, method), partial(delta.train_torch, make))


@pytest.mark.parametrize("method", pytorch.LIBMTL)
def test_each_method_of_libmtl_moves_trunk_and_heads(libmtl, tasks, method):
    start = delta.init(tasks, 0)
    # Into a second epoch, where some begin to look at losses.
    rows = delta.batches(tasks, 0, 2 * pytorch.EPOCH + 2)
    model = pytorch.LIBMTL[method](start)
    trained = pytorch.train(model, rows, tasks.training, tasks.classes, 1e-3)
    for part, layers in trained.items():
        moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), layers, start[part])
        assert all(1e-4 < each < 0.1 for each in jax.tree.leaves(moved)), (part, moved)
    losses = model.train_loss_buffer
    assert losses.shape == (2, 3)
    assert np.all(losses[:, 1] < losses[:, 0])


def test_a_single_task_is_trained_as_if_there_were_no_other(tasks):
    found = delta.train(delta.SINGLE, tasks, 1, 20, 1e-2)
    # A task alone, beside one whose targets are noise.
    noisy = np.array(tasks.training[1])
    noisy[:, 1] = np.random.default_rng(0).normal(size=len(noisy))
    others = tasks._replace(training=(tasks.training[0], jnp.asarray(noisy)))
    again = delta.train(delta.SINGLE, others, 1, 20, 1e-2)
    np.testing.assert_allclose(again[0, 0], found[0, 0], rtol=1e-3)
    assert abs(again[0, 1] / found[0, 1] - 1) > 0.01


def test_a_digit_lies_over_another(tasks):
    found = delta.two_digits()
    inputs, labels = map(np.asarray, found.training)
    assert inputs.shape == (4000, 100)
    assert labels.shape == (4000, 2)
    # Neither digit reaches its opposite corner.
    corners = inputs.reshape(-1, 10, 10)[:, [0, -1], [-1, 0]]
    assert np.all(corners == 0)


def test_the_command_reports_every_library(tasks, tmp_path, monkeypatch):
    monkeypatch.setitem(delta.PROBLEMS, "tumours", lambda: tasks)
    monkeypatch.setattr(delta, "METHODS", {"gdmam": delta.METHODS["gdmam"]})
    monkeypatch.setattr(pytorch, "TORCHJD", {"PCGrad": pytorch.TORCHJD["PCGrad"]})
    monkeypatch.setattr(pytorch, "libmtl_is_installed", lambda: False)
    output = tmp_path / "delta.json"
    small = ["--problems", "tumours", "--seeds", "1", "--steps", "3", "--output", str(output)]
    ran = CliRunner().invoke(app, ["delta", *small])
    assert ran.exit_code == 0, ran.output
    text = output.read_text()
    assert all(
        name in text for name in ("single tasks", "gdmam_jax", "TorchJD", "0.0 (0.0 to 0.0)")
    )
