"""The example with two digits in one picture: three places to settle a conflict."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.test_examples import load_example


@pytest.fixture(scope="module")
def example():
    return load_example("two_digits")


def test_it_trains_and_reports(example, tmp_path, monkeypatch, capsys):
    picture = tmp_path / "new" / "picture.png"
    arguments = ["--steps", "200", "--seeds", "1", "--width", "32", "--picture", str(picture)]
    monkeypatch.setattr(sys, "argv", ["two_digits.py", *arguments])
    monkeypatch.setattr(example, "SCALES", (100.0,))
    monkeypatch.setattr(example, "HELD_OUT", 500)
    example.main()
    printed = capsys.readouterr().out
    rows = [line.strip("│").split("│") for line in printed.splitlines() if line.startswith("│")]
    main = {row[0].strip(): float(row[1].split()[0]) for row in rows[::2]}
    # An auxiliary loss a hundred times too large drowns the main one, but where it is settled.
    assert main["sum"] < main["pairs"] - 0.1
    assert main["sum"] < main["fork"] - 0.1
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_one_digit_lies_upper_left_and_the_other_lower_right(example):
    images = np.stack([np.full((8, 8), 0.25), np.full((8, 8), 0.5)])
    overlay = jax.jit(example.overlay, static_argnums=1)
    pictures, labels = jax.device_get(overlay(jax.random.key(0), 50, images, np.array([3, 7])))
    assert pictures.shape == (50, 10, 10)
    for picture, first, second in zip(pictures, *labels, strict=True):
        values = {3: 0.25, 7: 0.5}
        assert (picture[0, 0], picture[-1, -1]) == (values[int(first)], values[int(second)])
        assert picture[5, 5] == max(values[int(first)], values[int(second)])
        assert picture[0, -1] == picture[-1, 0] == 0


def test_a_fork_changes_the_trunks_gradient_and_not_the_heads(example):
    @jax.jit
    def gradients():
        model = example.Reader(16, nnx.Rngs(0))
        images = jax.random.uniform(jax.random.key(1), (5, 8, 8))
        batch = example.overlay(jax.random.key(2), 8, images, jnp.arange(5))
        return [example.METHODS[name][0](model, batch, 100.0) for name in ("sum", "fork")]

    plain, forked = gradients()
    for one, other in zip(jax.tree.leaves(plain.heads), jax.tree.leaves(forked.heads), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5)
    for one, other in zip(jax.tree.leaves(plain.trunk), jax.tree.leaves(forked.trunk), strict=True):
        assert not np.allclose(one, other, rtol=0.1)


def test_steps_that_make_no_block_are_refused(example, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["two_digits.py", "--steps", "150"])
    with pytest.raises(SystemExit) as stopped:
        example.main()
    assert stopped.value.code == 2
    assert "multiple of 100" in capsys.readouterr().err
