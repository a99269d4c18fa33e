"""The example with three losses: both spellings train alike, and it reports what happened."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import gdmam_jax as gdmam
from gdmam_jax.nnx import value_and_paired_grad
from tests.test_examples import load_example


@pytest.fixture(scope="module")
def example():
    return load_example("three_losses")


def test_trains_compares_and_draws(example, tmp_path, monkeypatch, capsys):
    monkeypatch.delitem(example.METHODS, "ConFIG")  # Each method takes seconds to compile.
    picture = tmp_path / "new" / "picture.png"
    arguments = ["--steps", "300", "--width", "12", "--points", "32", "--picture", str(picture)]
    monkeypatch.setattr(sys, "argv", ["three_losses.py", *arguments])
    example.main()
    printed = capsys.readouterr().out
    rows = [line.split() for line in printed.splitlines() if line.startswith("│")]
    errors = {row[1]: float(row[3]) for row in rows}
    assert set(errors) == set(example.METHODS)
    assert errors["GDMAM"] < 0.9
    assert f"{errors['GDMAM'] / errors['sum']:.1f}" in printed.split("GDMAM's error is")[1]
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_both_spellings_are_one_training(example):
    x, t = jax.random.uniform(jax.random.key(0), (2, 16, 1))
    params = []
    for losses, alignment_losses in (
        (example.losses_in_order, 2),
        (example.losses_by_name, ("inflow", "initial")),
    ):
        model = example.Network(4, nnx.Rngs(0))
        optimizer = nnx.Optimizer(
            model, gdmam.gdmam(0.1, alignment_losses=alignment_losses), wrt=nnx.Param
        )
        _, pairs = value_and_paired_grad(losses)(model, x, t)
        optimizer.update(model, pairs)
        params.append(jax.tree.leaves(nnx.state(model, nnx.Param)))
    for one, other in zip(*params, strict=True):
        np.testing.assert_array_equal(one, other)


def test_the_losses_of_the_solution_vanish_and_of_others_do_not(example, x64):
    x, t = jax.random.uniform(jax.random.key(0), (2, 50, 1)) * jnp.array([[[6.0]], [[1.0]]])
    wave = lambda x, t: jnp.sin(x - example.SPEED * t)  # noqa: E731
    residual, alignment = example.losses_by_name(wave, x, t)
    for loss in (residual, *alignment.values()):
        np.testing.assert_allclose(loss, 0, atol=1e-24)
    residual, (inflow, initial) = example.losses_in_order(lambda x, t: wave(x, t) + x, x, t)
    np.testing.assert_allclose(residual, example.SPEED**2)
    np.testing.assert_allclose(inflow, 0, atol=1e-24)
    np.testing.assert_allclose(initial, jnp.mean(x**2))


def test_steps_that_make_no_record_are_refused(example, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["three_losses.py", "--steps", "250"])
    with pytest.raises(SystemExit) as stopped:
        example.main()
    assert stopped.value.code == 2
    assert "multiple of 100" in capsys.readouterr().err
