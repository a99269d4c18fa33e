"""No scale of a loss, or of both, changes a step of what claims to be free of it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gdmam_jax as gdmam

STEPS = 40
FACTORS = {"float32": (1e-14, 1e-10, 1e10), "float64": (1e-150, 1e-14, 1e10)}
# What has unit length whatever the gradients': the default's weights, through every gate.
FREE = {
    "default": gdmam.gdmam,
    "conflict_gate": functools.partial(gdmam.gdmam, gate=gdmam.conflict_gate),
    "open_gate": functools.partial(gdmam.gdmam, gate=gdmam.open_gate),
    "cosine_gate": functools.partial(gdmam.gdmam, gate=gdmam.cosine_gate),
    "a preference": functools.partial(gdmam.gdmam, weighting=gdmam.unit_weighting(preference=0.3)),
    "relative_momentum": functools.partial(
        gdmam.gdmam, momentum=gdmam.relative_momentum, momenta="separate"
    ),
    "allocate": lambda rate: optax.chain(gdmam.allocate(), optax.adamw(rate)),
}


def trajectories(name, dtype, factors):
    """Parameters of trainings whose losses come at these scales, in one program."""
    optimizer = FREE[name](0.02)
    start = jnp.linspace(-1, 1, 5, dtype=dtype)

    def run(scales):
        def losses(w):
            prediction = jnp.sum((w - 1) ** 2 * jnp.arange(1, 6, dtype=dtype))
            alignment = jnp.sum((w[:-1] + w[1:]) ** 2) + jnp.sum(jnp.cos(3 * w))
            return scales[0] * prediction, scales[1] * alignment

        def step(carry, _):
            w, state = carry
            _, pairs = gdmam.value_and_paired_grad(losses)(w)
            updates, state = optimizer.update(pairs, state, w)
            w = optax.apply_updates(w, updates)
            return (w, state), w

        return jax.lax.scan(step, (start, optimizer.init(start)), length=STEPS)[1]

    return np.asarray(jax.jit(jax.vmap(run))(jnp.asarray(factors, dtype)))


def power_of_two(factor):
    """The nearest: multiplying by it rounds nothing, so that only the rule is tested."""
    return 2.0 ** round(np.log2(factor))


@pytest.mark.parametrize("dtype", FACTORS)
@pytest.mark.parametrize("name", FREE)
def test_the_trajectory_is_the_same_at_every_scale(name, dtype):
    scales = [(1.0, 1.0)]
    for factor in map(power_of_two, FACTORS[dtype]):
        scales += [(factor, 1.0), (1.0, factor), (factor, factor)]
    with jax.enable_x64(dtype == "float64"):
        expected, *found = trajectories(name, dtype, scales)
    for factors, each in zip(scales[1:], found, strict=True):
        deviation = np.max(np.abs(each - expected)) / np.max(np.abs(expected))
        print(f"| {name} | {dtype} | {factors[0]:.0e}, {factors[1]:.0e} | {deviation:.1e} |")
        assert deviation <= 400 * np.finfo(dtype).eps


DIRECTIONS = {
    "balanced": gdmam.balanced_weighting,
    "imtl_g": gdmam.imtl_g_weighting,
    "config": gdmam.config_weighting,
    "nash_mtl": gdmam.nash_mtl_weighting,
    "unit": gdmam.unit_weighting,
}


@pytest.mark.parametrize("dtype", FACTORS)
@pytest.mark.parametrize("name", DIRECTIONS)
def test_the_direction_is_the_same_at_every_scale(name, dtype):
    """Of the weightings whose sum is along one line whatever the losses' scales."""
    with jax.enable_x64(dtype == "float64"):
        gradients = np.random.default_rng(0).normal(size=(2, 6)).astype(dtype)
        link = gdmam.allocate(DIRECTIONS[name], gdmam.open_gate)
        update = jax.jit(link.update)

        def direction(factors):
            scaled = [f * g for f, g in zip(factors, gradients, strict=True)]
            found, _ = update(gdmam.GradientPair(*scaled), link.init(scaled[0]))
            found = np.asarray(found, np.float64)
            return found / np.max(np.abs(found))

        for factor in map(power_of_two, FACTORS[dtype]):
            for factors in ((factor, 1.0), (1.0, factor), (factor, factor)):
                deviation = np.max(np.abs(direction(factors) - direction((1.0, 1.0))))
                assert deviation <= 100 * np.finfo(dtype).eps


def test_geometry_reads_gradients_down_to_the_smallest_squares():
    tiny = jnp.float32(2.0**-60) * jnp.array([3.0, 4.0])
    pair = gdmam.GradientPair(tiny, -tiny[::-1])
    geometry = gdmam.decompose(pair).geometry
    np.testing.assert_allclose(geometry.cosine, -24 / 25, rtol=1e-6)
    np.testing.assert_allclose(geometry.prediction_norm, 5 * 2.0**-60, rtol=1e-6)
