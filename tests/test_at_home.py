"""What users of other parts of the ecosystem bring along, and what they are told."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.linen import fp8_ops
from flax.training.dynamic_scale import DynamicScale
from flax.training.train_state import TrainState

import gdmam_jax as gdmam
import gdmam_jax.nnx


def test_fp8_layers_in_a_train_state():
    """Their scales come as gradients, which overwrite: one of each, for all losses."""
    model = nn.Dense(4, dot_general_cls=fp8_ops.Fp8DirectDotGeneralOp)
    x = jax.random.normal(jax.random.key(0), (16, 8))
    variables = jax.jit(model.init)(jax.random.key(1), x)

    def losses(variables):
        y = model.apply(variables, x)
        return jnp.mean((y - 1) ** 2), (10 * jnp.mean(y**2), jnp.mean(y))

    optimizer = gdmam.gdmam(0.01, alignment_losses=2)
    state = TrainState.create(apply_fn=model.apply, params=variables, tx=optimizer)

    @jax.jit
    def step(state):
        values, pairs = gdmam.value_and_paired_grad(losses)(state.params)
        return state.apply_gradients(grads=pairs), values[0]

    start = state
    for _ in range(20):
        state, value = step(state)
    assert jax.tree.structure(state.params) == jax.tree.structure(variables)
    assert value < losses(start.params)[0]
    layer = step(start)[0].params["_overwrite_with_gradient"]["Fp8DirectDotGeneralOp_0"]
    largest = []
    for number in range(3):
        gradients = jax.jit(jax.grad(lambda v, number=number: jax.tree.leaves(losses(v))[number]))
        found = gradients(variables)["_overwrite_with_gradient"]["Fp8DirectDotGeneralOp_0"]
        largest.append(found["output_grad_amax_history"])
        np.testing.assert_array_equal(layer["input_amax_history"], found["input_amax_history"])
    np.testing.assert_allclose(layer["output_grad_amax_history"], np.max(largest, axis=0))


def test_values_that_overwrite_are_no_gradients_to_a_weighting():
    def losses(variables):
        w, scale = variables["params"], variables["_overwrite_with_gradient"]
        return jnp.sum(w**2) + scale, 2 * jnp.sum(w) + 7 * scale

    variables = {"params": jnp.ones(2), "_overwrite_with_gradient": jnp.array(1.0)}
    step = gdmam.value_and_weighed_grad(losses, gdmam.sum_weighting)
    _, gradient, weighing = step(variables)
    np.testing.assert_allclose(weighing.gramian, np.full((2, 2), 8.0), rtol=1e-6)
    assert gradient["_overwrite_with_gradient"].shape == ()


def test_flax_dynamic_scale_with_several_losses():
    """As on the page: the scale falls where a gradient overflows, and the step is left out."""
    w = jnp.array([1.0, 2.0])
    optimizer = gdmam.gdmam(0.1, not_finite="skip")

    def losses(w, batch):
        return jnp.sum((w - batch) ** 2), jnp.sum(w**2)

    @jax.jit
    def step(w, state, scale, batch):
        def scaled(w):
            return jax.tree.map(lambda loss: scale.scale * loss, losses(w, batch))

        _, pairs = gdmam.value_and_paired_grad(scaled)(w)
        pairs = jax.tree.map(lambda g: g.astype(jnp.float32) / scale.scale, pairs)
        probe = jnp.where(jnp.isfinite(optax.tree.norm(pairs)), 1.0, jnp.nan)
        scale = scale.value_and_grad(lambda x: probe * x)(1.0).dynamic_scale
        updates, state = optimizer.update(pairs, state, w)
        return optax.apply_updates(w, updates), state, scale

    first, state, scale = step(w, optimizer.init(w), DynamicScale(), jnp.zeros(2))
    assert scale.fin_steps == 1

    @jax.jit
    def unscaled(w):
        _, pairs = gdmam.value_and_paired_grad(losses)(w, jnp.zeros(2))
        updates, _ = optimizer.update(pairs, optimizer.init(w), w)
        return optax.apply_updates(w, updates)

    np.testing.assert_allclose(first, unscaled(w), rtol=1e-6)
    second, state, fallen = step(first, state, scale, jnp.full(2, jnp.inf))
    np.testing.assert_array_equal(second, first)
    assert fallen.scale == scale.scale / 2
    assert gdmam.diagnostics(state)["skipped"] == 1


def test_complex_parameters_as_their_two_parts():
    """As the message says; the parts' geometry is the real one of complex numbers."""

    def losses(parts):
        z = jax.lax.complex(parts["real"], parts["imaginary"])
        return jnp.sum(jnp.abs(z - (1 + 2j)) ** 2), jnp.sum(jnp.abs(z) ** 2)

    z = np.complex64([3 - 1j, 0.5j])
    for refuse in (
        lambda: gdmam.gdmam(0.1).init({"z": z}),
        lambda: gdmam.value_and_paired_grad(lambda z: (0.0, 0.0))(z),
    ):
        with pytest.raises(TypeError, match=r"complex(64|128).*join them with jax\.lax\.complex"):
            refuse()
    parts = {"real": z.real, "imaginary": z.imag}
    optimizer = gdmam.gdmam(0.1)

    @jax.jit
    def step(parts):
        values, pairs = gdmam.value_and_paired_grad(losses)(parts)
        updates, _ = optimizer.update(pairs, optimizer.init(parts), parts)
        moved = optax.apply_updates(parts, updates)
        return gdmam.decompose(pairs).geometry.prediction_norm, values[0], losses(moved)[0]

    norm, before, after = step(parts)
    expected = np.linalg.norm(2 * (z - (1 + 2j)))
    np.testing.assert_allclose(norm, expected, rtol=1e-6)
    assert after < before


@pytest.mark.parametrize(
    "returned",
    [
        lambda w: (w.sum(), w.sum(), w.sum()),
        lambda w: {"one": w.sum(), "two": w.sum(), "three": w.sum()},
        lambda w: jnp.stack([w.sum(), w.sum(), w.sum()]),
    ],
    ids=["a tuple", "a dictionary", "an array"],
)
def test_three_losses_side_by_side_are_told_what_to_return(returned):
    message = r"return prediction, \(second, third\), and give the optimizer alignment_losses=2"
    with pytest.raises(TypeError, match=message):
        gdmam.value_and_paired_grad(returned)(jnp.ones(2))


@pytest.mark.parametrize("optimizer", [optax.adam(0.1), optax.adamw(0.1), optax.sgd(0.1, 0.9)])
def test_a_plain_optimizer_that_is_given_pairs(optimizer):
    w = {"w": jnp.ones(2)}
    pairs = gdmam.pair_gradients(w, w)
    with pytest.raises(ValueError, match="an ordinary optimizer takes through summed or weighed"):
        optimizer.update(pairs, optimizer.init(w), w)


def test_diff_states_are_pointed_to_wrt():
    with pytest.raises(TypeError, match=r"write argnums=1, wrt=the same filter"):
        gdmam_jax.nnx.value_and_paired_grad(
            lambda x, model: (0.0, 0.0), argnums=nnx.DiffState(1, nnx.Param)
        )
