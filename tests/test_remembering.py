"""Weightings with a memory or with values: what each owes its users."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import gdmam_jax as gdmam
from tests.test_weighting_invariants import gradient_sets

WEIGHTINGS = {
    "running": gdmam.running_weighting(gdmam.aligned_mtl_weighting),
    "normalised": gdmam.normalised_weighting(gdmam.pcgrad_weighting),
    "gradient_norm": gdmam.gradient_norm_weighting(every=2),
    "gradnorm": gdmam.gradnorm_weighting,
    "gradvac": gdmam.gradvac_weighting(decay=0.5),
    "pcd": gdmam.pcd_weighting(tau=0.3),
    "uncertainty": gdmam.uncertainty_weighting,
    "famo": gdmam.famo_weighting,
    "dwa": gdmam.dwa_weighting(every=2),
    "relobralo": gdmam.relobralo_weighting(lookback=0.5, decay=0.7, temperature=1.0),
    "softadapt": gdmam.softadapt_weighting(beta=2.0),
    "stch": gdmam.stch_weighting,
    "geometric_mean": gdmam.geometric_mean_weighting,
    "random": gdmam.random_weighting,
}
BY_VALUE = ("uncertainty", "famo", "dwa", "relobralo", "softadapt", "stch", "geometric_mean")
"""These need no gradients."""
STEPS = 4
PROPERTY = settings(max_examples=20, deadline=None)


def made(name):
    weighting = WEIGHTINGS[name]
    return weighting if isinstance(weighting, gdmam.RememberingWeighting) else weighting()


@pytest.mark.parametrize("name", WEIGHTINGS)
def test_a_memory_of_ones_own_can_be_donated(name):
    """Outside of an optimizer, too: no array is in it twice."""
    if name != "normalised":  # it has none
        leaves = jax.tree.leaves(made(name).init(jnp.zeros(2)))
        assert len({leaf.unsafe_buffer_pointer() for leaf in leaves}) == len(leaves)


@functools.cache
def compiled(name):
    weighting = made(name)

    def step(memory, inputs):
        gramian, values, present = inputs
        norms = jnp.sqrt(jnp.diagonal(gramian))
        losses = gdmam.Losses(values=values, present=present)
        weights, memory = weighting.update(gramian, norms, memory, losses)
        return memory, weights

    @jax.jit
    def run(gramians, values, present):
        start = weighting.init(jnp.zeros(values.shape[1]))
        return jax.lax.scan(step, start, (gramians, values, present))[1]

    return run


def weights_of(name, gradients, values, present=None):
    """The weights of every step: of gradients ``(steps, K, n)``, values ``(steps, K)``."""
    with jax.enable_x64(True):
        gramians = np.einsum("tin,tjn->tij", gradients, gradients)
        return np.asarray(compiled(name)(gramians, values, present))


@st.composite
def trainings(draw, counts=(2, 3)):
    count = draw(st.sampled_from(counts))
    sets = [draw(gradient_sets((count,))) for _ in range(STEPS)]
    logarithms = [draw(st.lists(st.floats(-1, 1), min_size=count, max_size=count)) for _ in sets]
    return np.stack(sets), 10.0 ** np.array(logarithms)


def assert_same_result(one, other, gradients):
    found, expected = (np.einsum("tk,tkn->tn", *each) for each in (one, other))
    scale = np.linalg.norm(gradients, axis=2).max() * np.abs(other[0]).max()
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6 * scale)


@pytest.mark.parametrize("name", [name for name in WEIGHTINGS if name != "random"])
@PROPERTY
@given(data=st.data())
def test_the_order_of_the_losses_does_not_matter(name, data):
    """But of PCD's: the prediction is the first. Orders are fixed where there are projections."""
    ordered = name in ("gradvac", "normalised")
    gradients, values = data.draw(trainings((2,) if ordered else (2, 3)))
    count = values.shape[1]
    first = [0] if name == "pcd" else []
    order = first + data.draw(st.permutations(range(len(first), count)))
    found = weights_of(name, gradients[:, order], values[:, order])
    expected = weights_of(name, gradients, values)
    assert_same_result((found, gradients[:, order]), (expected, gradients), gradients)


@pytest.mark.parametrize("name", ["pcd", "normalised", "dwa", "relobralo", "geometric_mean"])
@PROPERTY
@given(data=st.data())
def test_what_becomes_of_a_loss_that_is_rescaled(name, data):
    """Nothing in PCD and normalised; DWA's and ReLoBRaLo's weights, a geometric mean's direction
    stay.
    """
    gradients, values = data.draw(trainings())
    scales = 10.0 ** np.array([data.draw(st.floats(-2, 2)) for _ in values[0]])
    if name == "pcd":
        scales[0] = 1
    changed = scales[:, None] * gradients
    found = weights_of(name, changed, scales * values)
    expected = weights_of(name, gradients, values)
    if name in ("dwa", "relobralo"):
        np.testing.assert_allclose(found, expected, rtol=1e-9)
        return
    one, other = (np.einsum("tk,tkn->tn", *e) for e in ((found, changed), (expected, gradients)))
    if name == "geometric_mean":
        one, other = (each / np.linalg.norm(each, axis=1, keepdims=True) for each in (one, other))
    np.testing.assert_allclose(one, other, rtol=0, atol=1e-5 * np.linalg.norm(other, axis=1).max())


@jax.jit
def first_weights_of_pcd(gramian, tau):
    weighting = gdmam.pcd_weighting(tau=tau)
    memory = weighting.init(jnp.zeros(len(gramian)))
    return weighting.update(gramian, None, memory, gdmam.Losses())[0]


@PROPERTY
@given(gradients=gradient_sets(), tau=st.floats(0, 1))
def test_pcd_gives_each_loss_its_share_at_the_predictions_length(gradients, tau):
    """At the first step the running means are the step's own."""
    with jax.enable_x64(True):
        weights = np.asarray(first_weights_of_pcd(gradients @ gradients.T, tau))
    direction = weights @ gradients
    length = np.linalg.norm(direction)
    np.testing.assert_allclose(length, np.linalg.norm(gradients[0]), rtol=1e-6)
    units = gradients / np.linalg.norm(gradients, axis=1, keepdims=True)
    # Of the direction before it was given the prediction's length.
    before = direction * (weights[0] > 0) / (weights[0] * np.linalg.norm(gradients[0]))
    assert np.min(units[1:] @ before) >= tau - 1e-5 * max(1, np.linalg.norm(before))


@PROPERTY
@given(data=st.data())
def test_gradnorm_keeps_the_weights_sum_and_sign(data):
    gradients, values = data.draw(trainings())
    weights = weights_of("gradnorm", gradients, values)
    np.testing.assert_allclose(weights.sum(axis=1), values.shape[1], rtol=1e-9)
    assert (weights >= 0).all()


@pytest.mark.parametrize("name", ["famo", "random"])
@PROPERTY
@given(data=st.data())
def test_shares_add_up_to_one(name, data):
    weights = weights_of(name, *data.draw(trainings()))
    np.testing.assert_allclose(weights.sum(axis=1), 1, rtol=1e-6)
    assert (weights >= 0).all()


@pytest.mark.parametrize("name", WEIGHTINGS)
def test_an_absent_loss_is_as_if_it_were_not_there(name):
    """Three losses of which the middle one is absent, whatever it holds, beside two."""
    random = np.random.default_rng(0)
    gradients, values = random.normal(size=(STEPS, 3, 6)), random.uniform(1, 2, size=(STEPS, 3))
    present = np.array([True, False, True])
    hidden = np.where(present[:, None], gradients, 0.0)  # As the allocation hides it.
    shown = np.where(present, values, np.nan)
    found = weights_of(name, hidden, shown, np.broadcast_to(present, (STEPS, 3)))
    assert np.isfinite(found).all()
    if name == "random":
        np.testing.assert_allclose(found[:, present].sum(axis=1), 1)
        return
    expected = weights_of(name, gradients[:, present], values[:, present])
    np.testing.assert_allclose(found[:, present], expected, rtol=1e-6)


@pytest.mark.parametrize("name", WEIGHTINGS)
def test_statistics_of_an_absent_loss_wait_for_it(name):
    """What a step did to the memory of a loss that was absent: nothing."""
    random = np.random.default_rng(1)
    weighting = made(name)
    gradients = random.normal(size=(2, 3, 6)).astype(np.float32)
    memory, update = weighting.init(jnp.zeros(3)), jax.jit(weighting.update)
    for g, present in zip(gradients, np.array([[True] * 3, [True, False, True]]), strict=True):
        g = np.where(present[:, None], g, 0)
        known = gdmam.Losses(values=random.uniform(1, 2, 3), present=present)
        before = memory
        _, memory = jax.device_get(update(g @ g.T, np.ones(3), memory, known))
    if name == "dwa":  # An epoch ends: its mean is that of the step in which the loss was there.
        assert (np.asarray(memory.last) > 0).all()
        return
    compared = 0
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(memory), strict=True):
        if new.shape[-1:] == (3,):
            np.testing.assert_array_equal(np.asarray(old)[..., 1], new[..., 1])
            compared += 1
    assert compared or name in ("normalised", "stch", "geometric_mean")


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", [*WEIGHTINGS, "fairgrad", "dcgd"])
def test_finite_where_gradients_and_losses_are_zero(name, dtype):
    with jax.enable_x64(dtype == "float64"):
        plain = {"fairgrad": gdmam.fairgrad_weighting, "dcgd": gdmam.dcgd_weighting}.get(name)
        weighting = made(name) if plain is None else None
        update = jax.jit(plain or weighting.update)
        for gradients in (
            [[0.0, 0], [0, 0]],
            [[0, 0], [1, 1]],
            [[1, 1], [0, 0]],
            [[1, 1], [-1, -1]],
        ):
            rows = np.array(gradients, dtype)
            values = np.sum(rows**2, axis=1)
            gramian = rows @ rows.T
            if plain is not None:
                assert np.isfinite(update(gramian, None)).all()
                continue
            memory = weighting.init(jnp.zeros(2, dtype))
            for _ in range(3):
                weights, memory = update(
                    gramian, np.sqrt(values), memory, gdmam.Losses(values=values)
                )
                assert np.isfinite(weights).all()
                assert weights.dtype == jnp.dtype(dtype)
                assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(memory))


# Optax's Adam, which learns the weights of the others, mixes dtypes itself.
@pytest.mark.parametrize("name", sorted({*WEIGHTINGS} - {"gradnorm", "uncertainty", "famo"}))
@pytest.mark.parametrize("present", [None, np.array([True, False, True])], ids=["all", "absent"])
def test_strict_promotion_of_ranks_and_dtypes(name, present):
    weighting, losses = made(name), gdmam.Losses(values=np.ones(3), present=present)
    memory = weighting.init(jnp.zeros(3))
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        jax.eval_shape(weighting.update, np.eye(3), np.ones(3), memory, losses)


@pytest.mark.parametrize("name", BY_VALUE)
def test_one_backward_pass_does_the_same(name):
    """Weights taken inside the loss, and an ordinary optimizer; beside pairs."""

    def losses(w):
        return jnp.sum((w - 1) ** 2) + 1, jnp.sum((w + 1) ** 2) + 1

    weighting, sgd = made(name), optax.sgd(0.01)

    def weighed_loss(w, memory):
        values = jnp.stack(losses(w))
        known = gdmam.Losses(values=jax.lax.stop_gradient(values))
        weights, memory = weighting.update(None, None, memory, known)
        return weights @ values, memory

    @jax.jit
    def step(w, memory):
        gradient, memory = jax.grad(weighed_loss, has_aux=True)(w, memory)
        return w - 0.01 * gradient, memory

    optimizer = gdmam.weighed(sgd, WEIGHTINGS[name])

    @jax.jit
    def paired_step(v, state):
        values, pairs = gdmam.value_and_paired_grad(losses)(v)
        updates, state = optimizer.update(pairs, state, v, value=values)
        return optax.apply_updates(v, updates), state

    w, memory = jnp.array([0.5, 2.0]), weighting.init(jnp.zeros(2))
    v, state = w, optimizer.init(w)
    for _ in range(5):
        w, memory = step(w, memory)
        v, state = paired_step(v, state)
    np.testing.assert_allclose(v, w, rtol=1e-5)


@pytest.mark.parametrize("name", [*BY_VALUE, "gradnorm"])
def test_values_that_are_missing_are_asked_for(name):
    optimizer = gdmam.weighed(optax.sgd(1.0), WEIGHTINGS[name])
    pair = gdmam.GradientPair(jnp.ones(2), jnp.ones(2))
    with pytest.raises(ValueError, match="needs the losses' values: give them to update"):
        optimizer.update(pair, optimizer.init(jnp.zeros(2)))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: gdmam.pcd_weighting(tau=1.5), "tau must lie in"),
        (lambda: gdmam.pcd_weighting(tau=np.array([0.5, 1.5])), "tau must lie in"),
        (lambda: gdmam.stch_weighting(preference={"a": -1}), "preference must lie in"),
        (lambda: gdmam.stch_weighting(preference=(1.0, -1.0)), "preference must lie in"),
        (lambda: gdmam.running_weighting(gdmam.unit_weighting, decay=1.0), "decay must lie in"),
        (lambda: gdmam.running_weighting(0.5), "weighting must be a function"),
        (lambda: gdmam.stch_weighting(mu=0.0), "mu must lie in"),
        (lambda: gdmam.softadapt_weighting(beta=jnp.nan), "beta must lie in"),
        (lambda: gdmam.softadapt_weighting(beta=-np.inf), "beta must lie in"),
        (lambda: gdmam.dwa_weighting(every=0), "every must lie in"),
        (lambda: gdmam.dwa_weighting(every=1.5), "every must be a whole number, got 1.5"),
        (lambda: gdmam.famo_weighting(lowest={"ic": 1.0, "bc": 1.0}), "name 'prediction'"),
        (lambda: gdmam.geometric_mean_weighting(lowest=(0.0, np.nan)), "lowest must lie in"),
        (lambda: gdmam.relobralo_weighting(key="seed"), "key must be a random key or a seed"),
        (lambda: gdmam.random_weighting(key=1.5), "key must be a random key or a seed"),
        (lambda: gdmam.gradvac_weighting(key=jnp.ones(2)), "key must be a random key or a seed"),
        (lambda: gdmam.pcgrad_weighting(key=[1, 2]), "key must be a random key or a seed"),
        (lambda: gdmam.unit_weighting(preference=-1), "preference must lie in"),
        (lambda: gdmam.config_weighting(preference={"a": np.nan}), "preference must lie in"),
        (lambda: gdmam.upgrad_weighting(preference=None), "preference must be a number"),
        (lambda: gdmam.cagrad_weighting(c=-1), "c must lie in"),
        (lambda: gdmam.cagrad_weighting(jnp.eye(2), None, c=-1), "c must lie in"),
        (lambda: gdmam.unit_weighting({"a": 1.0}), "takes its settings by name, preference="),
        (lambda: gdmam.unit_weighting(0.5), "takes its settings by name, preference=; got 0.5"),
        (lambda: gdmam.constant_momentum(0.9), "takes its settings by name, initial=; got 0.9"),
        (lambda: gdmam.fairgrad_weighting(alpha=-1.0), "alpha must lie in"),
        (lambda: gdmam.dcgd_weighting(jnp.eye(3), None), "is for two losses, got 3"),
        (lambda: gdmam.dcgd_weighting(direction="centre"), "direction must be"),
    ],
)
def test_settings_out_of_range(make, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make()


@pytest.mark.parametrize(
    ("setting", "weighting", "message"),
    [
        ({"ic": 0.1}, lambda s: gdmam.pcd_weighting(tau=s), "tau names ic; expected ic, bc"),
        ((0.1,) * 3, lambda s: gdmam.pcd_weighting(tau=s), "tau must be a number or 2"),
        (
            {"prediction": 1.0, "ic": 1.0, "bc": 1.0},
            lambda s: gdmam.stch_weighting(preference=s),
            "preference names prediction, ic, bc; expected ic, bc",
        ),
        ((1.0, 2.0), lambda s: gdmam.famo_weighting(lowest=s), "lowest must be a number or 3"),
    ],
)
def test_settings_for_other_losses(setting, weighting, message):
    optimizer = gdmam.weighed(optax.sgd(1.0), weighting(setting), alignment_losses=("ic", "bc"))
    pair = gdmam.GradientPair(jnp.ones(2), {"ic": jnp.ones(2), "bc": jnp.ones(2)})
    with pytest.raises(ValueError, match=message):
        optimizer.update(pair, optimizer.init(jnp.zeros(2)), value=(1.0, {"ic": 1.0, "bc": 1.0}))


def test_settings_by_name():
    prediction, ic, bc = np.eye(3)
    pair = gdmam.GradientPair(prediction, {"ic": ic, "bc": bc})

    def weights(tau):
        link = gdmam.allocate(
            gdmam.pcd_weighting(tau=tau), gdmam.open_gate, alignment_losses=("ic", "bc")
        )
        return jax.jit(link.update)(pair, link.init(jnp.zeros(3)))[1].weights

    np.testing.assert_array_equal(weights({"bc": 0.9, "ic": 0.1}), weights((0.1, 0.9)))


@pytest.mark.parametrize("absent", [0, 1])
def test_famo_has_a_derivative_where_a_loss_was_absent(absent):
    optimizer = gdmam.weighed(optax.sgd(0.05), gdmam.famo_weighting)

    def losses(w):
        return jnp.sum((w - 1) ** 2), jnp.sum(w**2)

    def step(carry, present):
        w, state = carry
        values, pairs = gdmam.value_and_paired_grad(losses)(w)
        updates, state = optimizer.update(pairs, state, w, value=values, present=(True, present))
        return (optax.apply_updates(w, updates), state), None

    @jax.jit
    @jax.grad
    def end(w):
        (w, _), _ = jax.lax.scan(step, (w, optimizer.init(w)), np.arange(3) != absent)
        return losses(w)[0]

    assert np.isfinite(end(jnp.array([0.5, -1.0]))).all()


def test_the_geometric_mean_has_a_derivative_where_a_loss_is_0():
    weighting = gdmam.geometric_mean_weighting()

    @jax.jit
    @jax.jacobian
    def slopes(values):
        return weighting.update(None, None, (), gdmam.Losses(values=values))[0]

    found = slopes(jnp.array([0.0, 2.0, 1.0]))
    assert np.isfinite(found).all()
    # As if its value, below which there is nothing, were a constant.
    np.testing.assert_array_equal(found[:, 0], 0)
    assert np.all(found[0, 1:] > 0)


def test_a_number_of_steps_may_be_a_float():
    weighting = gdmam.gradient_norm_weighting(every=1e2)
    memory = weighting.init(jnp.zeros(2))
    _, later = jax.jit(weighting.update)(np.eye(2), np.ones(2), memory, gdmam.Losses())
    assert jax.tree.map(jax.typeof, later) == jax.tree.map(jax.typeof, memory)


IN_FLOAT64 = {
    "running": lambda number: gdmam.running_weighting(gdmam.mgda_weighting, decay=number),
    "gradient_norm": lambda number: gdmam.gradient_norm_weighting(decay=number),
    "relobralo": lambda number: gdmam.relobralo_weighting(decay=number),
    "famo": lambda number: gdmam.famo_weighting(learning_rate=number),
    "uncertainty": lambda number: gdmam.uncertainty_weighting(learning_rate=number),
    "gradnorm": lambda number: gdmam.gradnorm_weighting(learning_rate=number),
    "gradvac": lambda number: gdmam.gradvac_weighting(decay=number),
    "pcd": lambda number: gdmam.pcd_weighting(tau=number),
    "cagrad": lambda number: gdmam.cagrad_weighting(c=number),
}


@pytest.mark.parametrize("name", IN_FLOAT64)
def test_a_setting_in_float64_leaves_a_state_of_float32_its_types(name, x64):
    link = gdmam.allocate(IN_FLOAT64[name](np.float64(0.5)), gdmam.open_gate)
    w = jax.ShapeDtypeStruct((3,), jnp.float32)

    def update(pair, state, value):
        return link.update(pair, state, value=value)[1]

    state = jax.eval_shape(link.init, w)
    value = 2 * (jax.ShapeDtypeStruct((), jnp.float32),)
    after = jax.eval_shape(update, gdmam.GradientPair(w, w), state, value)
    assert jax.tree.map(jax.typeof, after) == jax.tree.map(jax.typeof, state)


def test_gradvacs_program_does_not_grow_with_many_losses():
    weighting = gdmam.gradvac_weighting()

    def lines(count):
        memory = jax.eval_shape(weighting.init, jax.ShapeDtypeStruct((count,), jnp.float32))
        gramian = jax.ShapeDtypeStruct((count, count), jnp.float32)
        update = jax.jit(lambda *given: weighting.update(given[0], None, given[1], gdmam.Losses()))
        return update.lower(gramian, memory).as_text().count("\n")

    assert lines(40) == lines(10)
