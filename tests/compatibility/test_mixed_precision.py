"""Half precision: dtypes, accuracy against float32, and scaled losses."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gdmam_jax as gdmam
from tests.compatibility.harness import train

STEPS = 50
# dtypes of (parameters, gradients, momenta), and bounds on the errors of (the update without and
# with a second moment, relative to its norm; the momentum coefficients; the cosine).
CASES = {
    "float32, bfloat16 gradients": (("float32", "bfloat16", "float32"), (5e-3, 2e-2, 1e-4, 1e-3)),
    "float32, bfloat16 momenta": (("float32", "float32", "bfloat16"), (5e-3, 5e-3, 1e-6, 1e-6)),
    "bfloat16, float32 momenta": (("bfloat16", "bfloat16", "float32"), (5e-3, 2e-2, 1e-4, 1e-3)),
    "bfloat16": (("bfloat16", "bfloat16", "bfloat16"), (5e-3, 2e-2, 1e-4, 1e-3)),
    "float16, float32 momenta": (("float16", "float16", "float32"), (1e-3, 1e-3, 1e-5, 1e-4)),
    "float16": (("float16", "float16", "float16"), (1e-3, 1e-3, 1e-5, 1e-4)),
}


@functools.cache
def example(steps=STEPS):
    """A tree of two thousand parameters and pairs with a common part and noise."""
    params = {"kernel": np.ones((40, 50), np.float32), "bias": np.ones(50, np.float32)}

    def draw(key, *shape):
        return jax.tree.map(
            lambda leaf: 0.1 * jax.random.normal(key, (*shape, *leaf.shape)), params
        )

    @jax.jit
    def pairs():
        keys = jax.random.split(jax.random.key(0), 3)
        common = draw(keys[0])
        prediction = jax.tree.map(lambda a, b: a + b, common, draw(keys[1], steps))
        alignment = jax.tree.map(lambda a, b: b - 0.5 * a, common, draw(keys[2], steps))
        return gdmam.pair_gradients(prediction, alignment)

    return params, jax.device_get(pairs())


def error(found, expected):
    found, expected = (
        np.concatenate([np.asarray(leaf, np.float32).ravel() for leaf in jax.tree.leaves(tree)])
        for tree in (found, expected)
    )
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


def test_accuracy():
    """The same pairs, rounded, against the float32 run; ``pytest -s`` prints the table in docs."""
    optimizers, starts = {}, {}
    for name, (dtypes, _) in {"full": (("float32",) * 3, None), **CASES}.items():
        param, gradient, momentum = dtypes
        for kind, b2 in (("", None), (", b2", 0.999)):
            optimizers[name + kind] = gdmam.scale_by_gdmam(mu_dtype=momentum, b2=b2)
            params, pairs = example()
            starts[name + kind] = optax.tree.cast(params, param), optax.tree.cast(pairs, gradient)
    runs = train(
        optimizers,
        {name: start[0] for name, start in starts.items()},
        {name: start[1] for name, start in starts.items()},
    )
    full = gdmam.diagnostics(runs["full"].states)
    for name, ((_, _, momentum), bounds) in CASES.items():
        dtypes = jax.tree.map(lambda leaf: leaf.dtype, runs[f"{name}, b2"].states)
        assert set(jax.tree.leaves(dtypes.momenta)) == {jnp.dtype(momentum)}
        assert set(jax.tree.leaves(dtypes.second_moment)) == {jnp.dtype("float32")}
        assert set(jax.tree.leaves(dtypes.allocation)) == {jnp.dtype("float32")}
        report = gdmam.diagnostics(runs[name].states)
        errors = [
            error(runs[name].updates, runs["full"].updates),
            error(runs[f"{name}, b2"].updates, runs["full, b2"].updates),
            *(
                max(
                    np.max(np.abs(report[key] - full[key]))
                    for key in report
                    if key.endswith(ending)
                )
                for ending in ("momentum", "cosine")
            ),
        ]
        print(f"| {name} | " + " | ".join(f"{number:.1e}" for number in errors) + " |")
        for number, bound in zip(errors, bounds, strict=True):
            assert number < bound, name


@pytest.mark.parametrize("name", ["bfloat16", "float16"])
@pytest.mark.parametrize("optimizer", ["gdmam", "gdmam_released"])
def test_training_in_half_precision(name, optimizer):
    """A regression learned in half precision as well as in float32."""
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (64, 8))
    y = jnp.sin(x.sum(axis=1))
    start = {
        "a": 0.3 * jax.random.normal(keys[1], (8, 16)),
        "b": 0.3 * jax.random.normal(keys[2], (16,)),
    }
    make = gdmam.gdmam if optimizer == "gdmam" else gdmam.gdmam_released
    rate = 0.02 if optimizer == "gdmam" else 0.01
    transformation = make(rate)

    def losses(params):
        dtype = params["a"].dtype
        hidden = jnp.tanh(x.astype(dtype) @ params["a"])
        error = hidden @ params["b"] - y.astype(dtype)
        return jnp.mean(error.astype(jnp.float32) ** 2), 0.1 * jnp.mean(
            hidden.astype(jnp.float32) ** 2
        )

    def run(dtype):
        params = optax.tree.cast(start, dtype)

        def step(carry, _):
            params, state = carry
            values, pairs = gdmam.value_and_paired_grad(losses)(params)
            updates, state = transformation.update(pairs, state, params)
            return (optax.apply_updates(params, updates), state), values[0]

        return jax.lax.scan(step, (params, transformation.init(params)), length=200)[1]

    half, full = jax.jit(lambda: (run(name), run("float32")))()
    assert full[-1] < 0.5 * full[0]
    assert half[-1] < 1.1 * full[-1] + 0.01


SCALE = 2.0**14


def unscale(scale):
    """Divides scaled gradients in float32, where what the scale saved is not lost again."""
    return optax.stateless(
        lambda pairs, params: jax.tree.map(lambda g: g.astype(jnp.float32) / scale, pairs)
    )


def test_scaled_losses():
    """Gradients too small for float16, saved by a factor on both losses and divided again."""
    params, pairs = example(steps=6)
    tiny = optax.tree.scale(1e-7, pairs)
    # Momenta of gradients that float16 cannot hold: float32 too.
    optimizer = gdmam.gdmam(0.1, eps=1e-12, mu_dtype=jnp.float32)
    optimizers = {
        "scaled": optax.chain(unscale(SCALE), optimizer),
        "unscaled": optimizer,
        "float32": optimizer,
    }
    half = optax.tree.cast(params, jnp.float16)
    runs = train(
        optimizers,
        {"scaled": half, "unscaled": half, "float32": params},
        {
            "scaled": optax.tree.cast(optax.tree.scale(SCALE, tiny), jnp.float16),
            "unscaled": optax.tree.cast(tiny, jnp.float16),
            "float32": tiny,
        },
    )
    assert error(runs["scaled"].updates, runs["float32"].updates) < 0.01
    assert error(runs["unscaled"].updates, runs["float32"].updates) > 0.1


def test_overflown_scaled_losses_are_skipped():
    """With a scale too large the pair overflows, and `apply_if_finite` lets the step go by."""
    params, pairs = example(steps=6)
    half = optax.tree.cast(params, jnp.float16)
    # Within range at every step but the third.
    factors = np.where(np.arange(6) == 2, 1e4, 1) * SCALE / 64
    with np.errstate(over="ignore"):
        scaled = jax.tree.map(lambda g: (g.T * factors).T.astype(jnp.float16), pairs)
    optimizer = gdmam.over_pairs(
        lambda tx: optax.apply_if_finite(optax.chain(unscale(SCALE / 64), tx), 5), gdmam.gdmam(0.1)
    )
    run = train({"it": optimizer}, half, scaled)["it"]
    chex.assert_trees_all_equal(run.after(3)[0], run.after(2)[0])
    chex.assert_trees_all_equal(run.after(3)[1].inner_state, run.after(2)[1].inner_state)
    chex.assert_tree_all_finite(run.params)
    assert run.after(6)[1].total_notfinite == 1


@pytest.mark.parametrize("momentum", [gdmam.relative_momentum, gdmam.ratcheted_momentum])
def test_which_momentum_a_scale_left_in_place_does_not_change(momentum):
    """Without dividing again: the relative rule's update only scales, the reference's changes."""
    params, pairs = example(steps=6)
    optimizer = gdmam.scale_by_gdmam(momentum=momentum)
    runs = train(
        {"scaled": optimizer, "plain": optimizer},
        {"scaled": params, "plain": params},
        {"scaled": optax.tree.scale(SCALE, pairs), "plain": pairs},
    )
    found = optax.tree.scale(1 / SCALE, runs["scaled"].updates)
    invariant = momentum is gdmam.relative_momentum
    assert (error(found, runs["plain"].updates) < 1e-5) == invariant
