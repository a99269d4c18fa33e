"""The example with three losses: both spellings train alike, and it reports what happened."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gdmam_jax as gdmam
from tests.test_examples import load_example


@pytest.fixture(scope="module")
def example():
    return load_example("three_losses")


def test_both_spellings_train_alike_and_are_reported(example, tmp_path, monkeypatch, capsys):
    in_order = (example.losses_in_order, lambda rate: gdmam.gdmam(rate, alignment_losses=2))
    # Each method takes seconds to compile.
    methods = {"sum": in_order, "GDMAM": example.METHODS["GDMAM"]}
    monkeypatch.setattr(example, "METHODS", methods)
    picture = tmp_path / "new" / "picture.png"
    arguments = ["--steps", "300", "--width", "12", "--points", "32", "--picture", str(picture)]
    monkeypatch.setattr(sys, "argv", ["three_losses.py", *arguments])
    example.main()
    printed = capsys.readouterr().out
    rows = [line.strip("│").split("│") for line in printed.splitlines() if line.startswith("│")]
    results = {row[0].strip(): np.array(row[1:], float) for row in rows}
    np.testing.assert_allclose(results["GDMAM"], results["sum"], rtol=0.05)
    assert results["GDMAM"][1] < 0.1  # The initial loss, 0.5 for a constant 0.
    times = float(printed.split("GDMAM's error is ")[1].split()[0])
    np.testing.assert_allclose(times, results["GDMAM"][0] / results["sum"][0], rtol=0.05)
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_the_losses_of_the_solution_vanish_and_of_others_do_not(example, x64):
    x, t = jax.random.uniform(jax.random.key(0), (2, 50, 1)) * jnp.array([[[6.0]], [[1.0]]])
    wave = lambda x, t: jnp.sin(x - example.SPEED * t)  # noqa: E731
    initial, alignment = example.losses_by_name(wave, x, t)
    for loss in (initial, *alignment.values()):
        np.testing.assert_allclose(loss, 0, atol=1e-24)
    initial, (inflow, residual) = example.losses_in_order(lambda x, t: wave(x, t) + x, x, t)
    np.testing.assert_allclose(residual, example.SPEED**2)
    np.testing.assert_allclose(inflow, 0, atol=1e-24)
    np.testing.assert_allclose(initial, jnp.mean(x**2))


def test_steps_that_make_no_record_are_refused(example, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["three_losses.py", "--steps", "250"])
    with pytest.raises(SystemExit) as stopped:
        example.main()
    assert stopped.value.code == 2
    assert "multiple of 100" in capsys.readouterr().err
