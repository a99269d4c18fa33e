"""A training that goes on with more losses, fewer, or other ones."""

import functools

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gdmam_jax as gdmam

PARAMS = {"w": np.linspace(-1, 1, 6, dtype=np.float32).reshape(3, 2), "b": np.ones(2, np.float32)}
OPTIMIZERS = {
    "gdmam": lambda **given: gdmam.gdmam(optax.cosine_decay_schedule(0.1, 20), **given),
    "separate": functools.partial(
        gdmam.gdmam, 0.1, momenta="separate", momentum=gdmam.relative_momentum
    ),
    "scopes": functools.partial(gdmam.gdmam, 0.1, scope=gdmam.leaf_scope, not_finite="skip_loss"),
    "weighed": lambda **given: gdmam.weighed(
        optax.adam(0.1), gdmam.running_weighting(gdmam.unit_weighting), **given
    ),
    "gradvac": lambda **given: optax.chain(
        gdmam.allocate(gdmam.gradvac_weighting(decay=0.5), **given), optax.adam(0.1)
    ),
    "uncertainty": lambda **given: gdmam.weighed(
        optax.adam(0.1), gdmam.uncertainty_weighting, **given
    ),
}


@functools.cache
def made(name, names):
    """One optimizer, and so one program, for all tests."""
    return OPTIMIZERS[name](alignment_losses=names)


def pairs_of(step, names):
    """Each loss's gradients go with its name, whatever the others are."""

    def tree(name):
        drawn = np.random.default_rng([step, sum(map(ord, name))])
        return jax.tree.map(lambda leaf: np.float32(drawn.normal(size=leaf.shape)), PARAMS)

    return gdmam.pair_gradients(tree("prediction"), {name: tree(name) for name in names})


@functools.partial(jax.jit, static_argnums=0)
def after_step(optimizer, params, state, pairs, **given):
    updates, state = optimizer.update(pairs, state, params, **given)
    return optax.apply_updates(params, updates), state


def run(optimizer, params, state, steps, names, absent=()):
    present = (True, {name: name not in absent for name in names})
    value = (1.0, {name: float(len(name)) for name in names})
    for step in steps:
        pairs = pairs_of(step, names)
        params, state = after_step(optimizer, params, state, pairs, present=present, value=value)
    return params, state


def assert_close(found, expected):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), found, expected
    )


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_new_loss_is_one_that_was_absent_so_far(name):
    """With names in another order, too."""
    few, many = ("ic",), ("bc", "ic")
    old, new = made(name, few), made(name, many)
    params, state = run(old, PARAMS, old.init(PARAMS), range(3), few)
    before, state = state, gdmam.carry_over(state, new.init(PARAMS))
    if name == "separate":
        # Its momenta start at 0, and are corrected for it; an absent loss's have been 0 for long.
        places, parts = (0, None, 1, None, 2), before[0].momenta
        for place, correction, momentum in zip(
            places, state[0].momentum_correction, state[0].momenta, strict=True
        ):
            expected = before[0].momentum_correction[place] if place is not None else 0
            assert correction == expected
            other = jax.tree.map(np.zeros_like, PARAMS) if place is None else parts[place]
            jax.tree.map(np.testing.assert_array_equal, momentum, other)
        return
    found, _ = run(new, params, state, range(3, 6), many)
    params, state = run(new, PARAMS, new.init(PARAMS), range(3), many, absent=("bc",))
    expected, _ = run(new, params, state, range(3, 6), many)
    assert_close(found, expected)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_loss_less_is_one_that_is_absent_from_now_on(name):
    many, few = ("bc", "ic"), ("ic",)
    old, new = made(name, many), made(name, few)
    params, middle = run(old, PARAMS, old.init(PARAMS), range(3), many)
    found, state = run(new, params, gdmam.carry_over(middle, new.init(PARAMS)), range(3, 6), few)
    expected, after = run(old, params, middle, range(3, 6), many, absent=("bc",))
    if name == "separate":
        # The momenta of a loss that is absent fade away; those of one that is gone are gone.
        report, beside = gdmam.diagnostics(state), gdmam.diagnostics(after)
        np.testing.assert_allclose(
            report["parallel_momentum/ic"], beside["parallel_momentum/ic"], rtol=1e-4
        )
        return
    assert_close(found, expected)


def test_nothing_is_compiled_anew_and_the_same_losses_keep_everything():
    optimizer = OPTIMIZERS["separate"](alignment_losses=("ic", "bc"))
    _, state = run(optimizer, PARAMS, optimizer.init(PARAMS), range(3), ("ic", "bc"))
    carried = gdmam.carry_over(state, optimizer.init(PARAMS))
    assert jax.tree.structure(carried) == jax.tree.structure(state)
    for field in ("count", "momenta", "second_moment", "statistics", "momentum_correction"):
        jax.tree.map(
            np.testing.assert_array_equal, getattr(carried[0], field), getattr(state[0], field)
        )
    np.testing.assert_array_equal(carried[0].allocation.norms, state[0].allocation.norms)


def test_from_a_checkpoint():
    """Of Flax; what Orbax restores is what was saved: `test_save_restore_continue`."""
    few, many = ("ic",), ("bc", "ic")
    old, new = made("gdmam", few), made("gdmam", many)
    params, state = run(old, PARAMS, old.init(PARAMS), range(3), few)
    restored = flax.serialization.from_bytes(old.init(PARAMS), flax.serialization.to_bytes(state))
    found, expected = (
        run(new, params, gdmam.carry_over(each, new.init(PARAMS)), range(3, 6), many)
        for each in (restored, state)
    )
    assert_close(found[0], expected[0])


def test_losses_without_names_go_by_their_place():
    old, new = (gdmam.gdmam(0.1, alignment_losses=count) for count in (1, 3))
    w = jnp.zeros(2)
    pair = gdmam.GradientPair(np.array([3.0, 0.0]), np.array([0.0, 4.0]))
    _, state = jax.jit(old.update)(pair, old.init(w), w)
    norms = gdmam.carry_over(state, new.init(w))[0].allocation.norms
    assert norms.tolist() == [3, 4, 0, 0]


WITH_A_MEMORY = {
    "running": gdmam.running_weighting(gdmam.unit_weighting),
    "pcd": gdmam.pcd_weighting(),
    "gradnorm": gdmam.gradnorm_weighting(),
    "gradvac": gdmam.gradvac_weighting(),
    "gradient_norm": gdmam.gradient_norm_weighting(),
}


@pytest.mark.parametrize("name", WITH_A_MEMORY)
def test_memories_of_several_scopes_go_with_their_losses(name):
    """As each scope's would by itself: one loss is replaced, and the other changes its place."""

    def make(names, scope):
        link = gdmam.allocate(WITH_A_MEMORY[name], scope=scope, alignment_losses=names)
        return optax.chain(link, optax.sgd(0.1))

    found, w = {}, PARAMS["w"]
    for scope in (None, gdmam.leaf_scope):
        old, new = (make(names, scope) for names in (("one", "two"), ("three", "one")))
        update, state, value = jax.jit(old.update), old.init(w), (1.0, {"one": 2.0, "two": 3.0})
        for step in range(3):
            _, state = update(pairs_of(step, ("one", "two"))["w"], state, value=value)
        state = gdmam.carry_over(state, new.init(w))
        found[scope], _ = jax.jit(new.update)(
            pairs_of(3, ("three", "one"))["w"], state, value=(1.0, {"three": 2.0, "one": 1.0})
        )
    assert_close(found[gdmam.leaf_scope], found[None])


def test_another_weighting_starts_afresh():
    old = gdmam.weighed(optax.sgd(0.1), gdmam.pcd_weighting, alignment_losses=("ic",))
    new = gdmam.weighed(optax.sgd(0.1), gdmam.gradvac_weighting, alignment_losses=("ic", "bc"))
    _, state = run(old, PARAMS, old.init(PARAMS), range(2), ("ic",))
    fresh = new.init(PARAMS)
    carried = gdmam.carry_over(state, fresh)
    jax.tree.map(np.testing.assert_array_equal, carried[0].memory, fresh[0].memory)
    assert (carried[0].norms[:2] > 0).all()


def test_accumulated_pairs_of_other_losses_are_dropped():
    old, new = (
        gdmam.over_pairs(
            lambda tx: optax.MultiSteps(tx, 2),
            gdmam.gdmam(0.1, alignment_losses=names),
            alignment_losses=names,
        )
        for names in (("ic",), ("ic", "bc"))
    )
    update = jax.jit(old.update)
    state = old.init(PARAMS)
    for step in range(3):
        _, state = update(pairs_of(step, ("ic",)), state, PARAMS)
    carried = gdmam.carry_over(state, new.init(PARAMS))
    _, after = jax.eval_shape(new.update, pairs_of(3, ("ic", "bc")), carried, PARAMS)
    assert jax.tree.structure(after) == jax.tree.structure(new.init(PARAMS))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (gdmam.gdmam(0.1), gdmam.weighed(optax.sgd(0.1), gdmam.sum_weighting), "differ in more"),
        (gdmam.gdmam(0.1), gdmam.gdmam(0.1, alignment_losses=("a",)), "alignment_losses=names"),
        (gdmam.gdmam(0.1), gdmam.gdmam(0.1, not_finite="skip"), "differ in scope or not_finite"),
        (gdmam.gdmam(0.1), gdmam.gdmam(0.1, momenta="separate"), "differ in momenta"),
        (gdmam.gdmam(0.1), gdmam.gdmam(0.1, b2=None), "differ in momenta, mu_dtype, b2"),
        (gdmam.gdmam(0.1), gdmam.gdmam(0.1, mu_dtype=jnp.bfloat16), "differ in momenta, mu_dtype"),
        (gdmam.gdmam(0.1), gdmam.gdmam(0.1, scope=gdmam.leaf_scope), "differ in scope"),
    ],
)
def test_states_that_differ_in_more_are_refused(old, new, message):
    with pytest.raises(ValueError, match=message):
        gdmam.carry_over(old.init(PARAMS), new.init(PARAMS))


def test_other_parameters_are_refused():
    optimizer = gdmam.weighed(optax.adam(0.1), gdmam.sum_weighting)
    with pytest.raises(ValueError, match=r"shapes \(2,\), \(3,\)"):
        gdmam.carry_over(optimizer.init(jnp.ones(2)), optimizer.init(jnp.ones(3)))
