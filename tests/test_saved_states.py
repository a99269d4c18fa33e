"""States saved by earlier releases load, by the names of their arrays, and go on as they did.

    python -m tests.test_saved_states 0.2.0     # writes tests/data/states-0.2.0.npz

What an array is called, and what it means, is part of the interface: checkpoints outlive versions.
"""

import sys
from pathlib import Path

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gdmam_jax as gdmam

FOLDER = Path(__file__).parent / "data"
FILES = sorted(FOLDER.glob("states-*.npz"))
OPTIMIZERS = {
    "gdmam": lambda: gdmam.gdmam(optax.cosine_decay_schedule(0.1, 8), amsgrad=True),
    "scopes": lambda: gdmam.gdmam(0.1, scope=gdmam.leaf_scope, not_finite="skip"),
    "separate": lambda: gdmam.gdmam(
        0.1, alignment_losses=("one", "two"), momenta="separate", momentum=gdmam.relative_momentum
    ),
    "weighed": lambda: gdmam.weighed(optax.adam(0.1), gdmam.pcgrad_weighting),
    "released": lambda: gdmam.gdmam_released(0.1),
}
PARAMS = {"kernel": jnp.linspace(-1, 1, 6).reshape(3, 2), "bias": jnp.ones(2)}


def gradients(name, step):
    """Made of sines, and so the same in every version."""

    def half(shift):
        return jax.tree.map(
            lambda p: jnp.asarray(np.sin(7.0 * np.arange(p.size) + shift), jnp.float32).reshape(
                p.shape
            ),
            PARAMS,
        )

    one = half(step + 0.5)
    alignment = {"one": one, "two": half(step + 0.9)} if name == "separate" else one
    return gdmam.pair_gradients(half(float(step)), alignment)


def train(name, carry, steps):
    optimizer = OPTIMIZERS[name]()
    update = jax.jit(optimizer.update)
    params, state = carry or (PARAMS, optimizer.init(PARAMS))
    for step in steps:
        updates, state = update(gradients(name, step), state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def named(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def record(version):
    arrays = {}
    for name in OPTIMIZERS:
        middle = train(name, None, range(4))
        end = train(name, middle, range(4, 8))
        for what, tree in (("middle", middle), ("end", end)):
            arrays |= {f"{name}/{what}/{path}": leaf for path, leaf in named(tree).items()}
    np.savez_compressed(FOLDER / f"states-{version}.npz", **arrays)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_saved_state_goes_on(name, file):
    saved = np.load(file)
    like = jax.eval_shape(lambda: train(name, None, range(0)))
    expected = {path: f"{name}/middle/{path}" for path in named(like)}
    in_file = {key for key in saved.files if key.startswith(f"{name}/middle/")}
    assert in_file == set(expected.values())
    leaves = [jnp.asarray(saved[key]) for key in expected.values()]
    for leaf, model in zip(leaves, jax.tree.leaves(like), strict=True):
        assert (leaf.shape, leaf.dtype) == (model.shape, model.dtype)
    end = train(name, jax.tree.unflatten(jax.tree.structure(like), leaves), range(4, 8))
    for path, leaf in named(end).items():
        np.testing.assert_allclose(
            leaf, saved[f"{name}/end/{path}"], rtol=1e-4, atol=1e-6, err_msg=path
        )


SERIALIZED = OPTIMIZERS | {
    "over_pairs": lambda: gdmam.over_pairs(lambda tx: optax.MultiSteps(tx, 2), gdmam.gdmam(0.1)),
    "clip_by_recent_norm": gdmam.clip_by_recent_norm,
}


def test_flax_serialization_of_pairs_in_a_wrappers_state(monkeypatch):
    """Even if no other optimizer has made the pairs known to Flax."""
    monkeypatch.delitem(flax.serialization._STATE_DICT_REGISTRY, gdmam.GradientPair, raising=False)
    optimizer = gdmam.over_pairs(lambda tx: optax.MultiSteps(tx, 2), gdmam.summed(optax.sgd(0.1)))
    assert flax.serialization.to_bytes(optimizer.init(PARAMS))


@pytest.mark.parametrize("name", SERIALIZED)
def test_flax_serialization(name):
    target = jax.eval_shape(SERIALIZED[name]().init, PARAMS)
    state = jax.tree.map(
        lambda leaf: np.arange(1, 1 + leaf.size).reshape(leaf.shape).astype(leaf.dtype), target
    )
    restored = flax.serialization.from_bytes(target, flax.serialization.to_bytes(state))
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    for found, expected in zip(jax.tree.leaves(restored), jax.tree.leaves(state), strict=True):
        assert found.dtype == expected.dtype
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"b2": None}, "GDMAMState was made with other choices"),
        ({"amsgrad": True}, "expected .*second_moment_maximum"),
        ({"not_finite": "skip"}, "expected .*skipped"),
        ({"momenta": "separate"}, "size of the list"),
        ({"scope": gdmam.leaf_scope}, "another scope or alignment_losses"),
        ({"alignment_losses": 2}, "another scope or alignment_losses"),
    ],
)
def test_flax_serialization_refuses_another_choice(choices, message):
    saved = flax.serialization.to_bytes(gdmam.gdmam(0.1).init(PARAMS))
    optimizer = gdmam.gdmam(0.1, **choices)
    pair = (PARAMS,) * choices.get("alignment_losses", 1)
    pairs = gdmam.pair_gradients(PARAMS, pair if len(pair) > 1 else PARAMS)
    with pytest.raises(ValueError, match=message):
        optimizer.update(
            pairs, flax.serialization.from_bytes(optimizer.init(PARAMS), saved), PARAMS
        )


def test_where_flax_is_not_imported_a_state_is_the_same(monkeypatch):
    expected = OPTIMIZERS["gdmam"]().init(PARAMS)
    monkeypatch.delitem(sys.modules, "flax.serialization")
    found = OPTIMIZERS["gdmam"]().init(PARAMS)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


if __name__ == "__main__":
    record(*sys.argv[1:])
