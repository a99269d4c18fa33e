"""Losses that are absent from a step, by name or because they are not finite."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gdmam_jax as gdmam

PARAMS = {"w": np.float32([1.0, -2.0, 0.5, 0.1]), "b": np.float32([0.3, 1.0])}
NAMES = ("ic", "bc")
OPTIMIZERS = {
    "gdmam": functools.partial(gdmam.gdmam, 0.1),
    "separate": functools.partial(
        gdmam.gdmam, 0.1, momenta="separate", momentum=gdmam.relative_momentum
    ),
    "scopes": functools.partial(gdmam.gdmam, 0.1, scope=gdmam.leaf_scope),
    "weighed": lambda **given: gdmam.weighed(optax.adam(0.1), gdmam.pcgrad_weighting, **given),
}


@functools.cache
def made(name, **given):
    """One optimizer, and so one program, for all tests."""
    return OPTIMIZERS[name](alignment_losses=NAMES, **given)


def pairs_of(seed, broken=()):
    """Random pairs; the gradients of the losses named are not numbers."""
    drawn = np.random.default_rng(seed)
    trees = [
        jax.tree.map(
            lambda leaf, name=name: np.float32(
                drawn.normal(size=leaf.shape) * (np.nan if name in broken else 1)
            ),
            PARAMS,
        )
        for name in ("prediction", *NAMES)
    ]
    return gdmam.pair_gradients(trees[0], dict(zip(NAMES, trees[1:], strict=True)))


def presence(absent=()):
    return "prediction" not in absent, {name: name not in absent for name in NAMES}


@functools.cache
def compiled(optimizer):
    traces = []

    @jax.jit
    def step(params, state, pairs, extra):
        traces.append(None)
        updates, state = optimizer.update(pairs, state, params, **extra)
        return optax.apply_updates(params, updates), state

    return step, traces


def run(optimizer, steps):
    """Parameters and state after steps of (pairs, extra arguments), in one compiled function."""
    (step, traces), params, state = compiled(optimizer), PARAMS, optimizer.init(PARAMS)
    for pairs, extra in steps:
        params, state = step(params, state, pairs, extra)
    assert len(traces) == 1
    return params, state


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_absent_loss_is_as_if_it_were_not_there(name):
    """Whatever its gradient holds, and with the same program."""
    optimizer = made(name)
    steps = [(pairs_of(0), presence()), (pairs_of(1, ("bc",)), presence(("bc",)))]
    params, state = run(optimizer, [(pairs, {"present": p}) for pairs, p in steps * 2])
    alone = OPTIMIZERS[name](alignment_losses=("ic",))
    # The other optimizer never hears of the loss; the two agree while it is absent from the start.
    absent = presence(("bc",))
    many, _ = run(optimizer, [(pairs_of(seed, ("bc",)), {"present": absent}) for seed in range(4)])

    def without(pairs):
        return jax.tree.map(
            lambda pair: gdmam.GradientPair(pair.prediction, {"ic": pair.alignment["ic"]}),
            pairs,
            is_leaf=lambda node: isinstance(node, gdmam.GradientPair),
        )

    few, _ = run(alone, [(without(pairs_of(seed)), {}) for seed in range(4)])
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5), many, few)
    report = gdmam.diagnostics(state)
    for key, value in report.items():
        assert np.isfinite(value), key
        if key.endswith("alignment_weight/bc"):
            assert value == 0
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params))


WEIGHTINGS = (
    gdmam.sum_weighting, gdmam.mean_weighting, gdmam.norm_weighting, gdmam.balanced_weighting,
    gdmam.unit_weighting, gdmam.pcgrad_weighting, gdmam.imtl_g_weighting, gdmam.mgda_weighting,
    gdmam.cagrad_weighting, gdmam.nash_mtl_weighting, gdmam.aligned_mtl_weighting,
    gdmam.dual_proj_weighting, gdmam.upgrad_weighting, gdmam.config_weighting,
    gdmam.fairgrad_weighting,
    gdmam.aligned_mtl_weighting(preference=0.3), gdmam.upgrad_weighting(preference=0.3),
)  # fmt: skip


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_every_weighting_weighs_the_losses_that_are_there(weighting, x64):
    """As if the others had never been named; MGDA would put all weight on a gradient of 0."""
    pairs = jax.tree.map(np.float64, pairs_of(3))
    many = gdmam.allocate(weighting, gdmam.open_gate, alignment_losses=NAMES)
    few = gdmam.allocate(weighting, gdmam.open_gate)

    @jax.jit
    def both(pairs, alone, present):
        _, state = many.update(pairs, many.init(PARAMS), present=present)
        return state, few.update(alone, few.init(PARAMS))[1]

    for absent, other in (NAMES, NAMES[::-1]):
        alone = jax.tree.map(
            lambda pair, other=other: gdmam.GradientPair(pair.prediction, pair.alignment[other]),
            pairs,
            is_leaf=lambda node: isinstance(node, gdmam.GradientPair),
        )
        state, expected = jax.device_get(both(pairs, alone, presence((absent,))))
        found = gdmam.diagnostics(state)
        weights = [found["prediction_weight"], found[f"alignment_weight/{other}"]]
        np.testing.assert_allclose(weights, expected.weights, rtol=1e-6)
        assert float(found[f"alignment_weight/{absent}"]) == 0


def test_running_means_of_an_absent_loss_wait_for_it():
    link = gdmam.allocate(alignment_losses=NAMES)
    update = jax.jit(link.update)
    state = link.init(PARAMS)
    _, first = update(pairs_of(0), state, present=presence())
    _, second = update(pairs_of(1), first, present=presence(("ic",)))
    np.testing.assert_array_equal(second.norms[1], first.norms[1])
    np.testing.assert_array_equal(second.remainder[1], first.remainder[1])
    assert second.norms[2] != first.norms[2]
    _, late = update(pairs_of(1), state, present=presence(("ic",)))
    _, late = update(pairs_of(0), late, present=presence())
    # Its first norm is its mean, however late it comes.
    np.testing.assert_allclose(late.norms[1], first.norms[1], rtol=1e-6)


def test_without_a_prediction_the_alignment_losses_go_on():
    link = gdmam.allocate(gdmam.sum_weighting, alignment_losses=NAMES)
    pairs = pairs_of(0)
    found, state = jax.jit(link.update)(pairs, link.init(PARAMS), present=presence(("prediction",)))
    _, alignment = jax.device_get(gdmam.unpair_gradients(pairs))
    expected = jax.tree.map(np.add, alignment["ic"], alignment["bc"])
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), found, expected)
    assert float(gdmam.diagnostics(state)["prediction_weight"]) == 0


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_skip_loss_leaves_out_what_is_not_finite_and_counts_it_by_name(name):
    optimizer = made(name, not_finite="skip_loss")
    broken = [(), ("bc",), ("prediction",), ("prediction", "ic", "bc"), ("bc",)]
    found, state = run(optimizer, [(pairs_of(n, who), {}) for n, who in enumerate(broken)])
    report = gdmam.diagnostics(state)
    counts = {key: int(value) for key, value in report.items() if key.startswith("skipped")}
    assert counts == {
        "skipped": 1, "skipped_in_a_row": 0,
        "skipped/prediction": 2, "skipped/ic": 1, "skipped/bc": 3,
    }  # fmt: skip
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found))
    if name == "weighed":
        return
    # A loss left out equals one that is absent; a step without any has not been.
    steps = [(pairs_of(n, who), presence(who)) for n, who in enumerate(broken) if len(who) < 3]
    expected, _ = run(made(name), [(pairs, {"present": here}) for pairs, here in steps])
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), found, expected)


def test_summed_leaves_an_absent_loss_out():
    optimizer = gdmam.summed(optax.sgd(1.0))
    pair = gdmam.GradientPair(jnp.array([1.0]), jnp.array([jnp.nan]))
    update, _ = optimizer.update(pair, optimizer.init(jnp.zeros(1)), present=(True, False))
    assert float(update[0]) == -1


@pytest.mark.parametrize(
    ("present", "message"),
    [
        ((True, True), "present must be like the losses"),
        ((True, {"ic": True}), "present must be like the losses"),
        ((True, {"ic": True, "bx": True}), r"losses.* \(missing: bc\) \(unknown: bx\); got"),
        (True, "present must be like the losses.*got"),
        ((True, {"ic": jnp.ones(2), "bc": True}), "present must be like the losses"),
        ((None, {"ic": True, "bc": True}), "present must be like the losses"),
        ((True, {"ic": (True,), "bc": True}), "present must be like the losses"),
    ],
)
def test_presence_of_other_losses_is_refused(present, message):
    link = gdmam.allocate(alignment_losses=NAMES)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(
            lambda pairs: link.update(pairs, link.init(PARAMS), present=present), pairs_of(0)
        )


def test_the_released_form_has_no_absent_losses():
    optimizer, w = gdmam.gdmam_released(0.1), jnp.ones(2)
    state = optimizer.init(w)
    with pytest.raises(ValueError, match="gdmam_released has no absent losses"):
        optimizer.update(gdmam.GradientPair(w, w), state, w, present=(True, False))


# By name.


def test_numbers_beside_names_are_in_the_order_as_written():
    """Names are sorted nowhere: of ("ic", "bc") the first number is ic's."""
    pairs = pairs_of(0)
    prediction, alignment = gdmam.unpair_gradients(pairs)
    expected = jax.tree.map(
        lambda p, ic, bc: -(p + 100 * ic + 0.01 * bc), prediction, alignment["ic"], alignment["bc"]
    )
    by_name = {"bc": 0.01, "prediction": 1.0, "ic": 100.0}
    for weights in ((1.0, 100.0, 0.01), (by_name,)):
        optimizer = gdmam.weighed(
            optax.sgd(1.0), gdmam.constant_weighting(*weights), alignment_losses=NAMES
        )
        found, state = jax.jit(optimizer.update)(pairs, optimizer.init(PARAMS))
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5), found, expected)
        report = gdmam.diagnostics(state)
        assert float(report["alignment_weight/ic"]) == 100


@pytest.mark.parametrize(
    "weighting",
    [
        gdmam.unit_weighting, gdmam.config_weighting, gdmam.aligned_mtl_weighting,
        gdmam.dual_proj_weighting, gdmam.upgrad_weighting,
    ],
)  # fmt: skip
def test_preferences_by_name_and_in_the_order_as_written(weighting):
    def weights(pairs, preference, losses):
        link = gdmam.allocate(
            weighting(preference=preference), gdmam.open_gate, alignment_losses=losses
        )
        _, state = link.update(pairs, link.init(PARAMS))
        report = gdmam.diagnostics(state)
        return jnp.stack([report[f"alignment_weight/{name}"] for name in NAMES])

    @jax.jit
    def all_weights(pairs):
        named = {"ic": 3.0, "bc": 0.1}
        return (
            weights(pairs, {"bc": 0.1, "ic": 3.0}, NAMES),
            weights(pairs, (3.0, 0.1), NAMES),
            weights(pairs, named, NAMES[::-1]),
            weights(pairs, named, 2),
        )

    by_name, by_number, turned, with_their_number = jax.device_get(all_weights(pairs_of(0)))
    np.testing.assert_allclose(by_number, by_name, rtol=1e-6)
    np.testing.assert_allclose(turned, by_name, rtol=1e-5)
    np.testing.assert_allclose(with_their_number, by_name, rtol=1e-5)


@pytest.mark.parametrize(
    ("weighting", "message"),
    [
        (
            gdmam.unit_weighting(preference={"ic": 1.0}),
            "preference names ic; expected ic, bc",
        ),
        (gdmam.unit_weighting(preference={"ic": 1.0, "bx": 1.0}), "expected ic, bc"),
        (gdmam.constant_weighting({"prediction": 1.0, "ic": 2.0}), "expected prediction, ic, bc"),
    ],
)
def test_unknown_and_missing_names_are_refused(weighting, message):
    optimizer = gdmam.weighed(optax.sgd(1.0), weighting, alignment_losses=NAMES)
    with pytest.raises(ValueError, match=message):
        optimizer.update(pairs_of(0), optimizer.init(PARAMS))


def test_a_mapping_of_constant_weights_names_the_prediction():
    with pytest.raises(ValueError, match="needs the weight of 'prediction'"):
        gdmam.constant_weighting({"ic": 1.0, "bc": 1.0})


def test_losses_in_a_dictionary_show_their_names_where_only_their_number_was_said():
    """And the state keeps its structure: nothing compiles twice, and a scan runs."""
    optimizer = gdmam.gdmam(0.1, alignment_losses=2)
    state = optimizer.init(PARAMS)
    assert "cosine/0" in gdmam.diagnostics(state)
    _, later = run(optimizer, [(pairs_of(seed), {}) for seed in range(3)])
    assert {"cosine/ic", "cosine/bc"} < {*gdmam.diagnostics(later)}
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *map(pairs_of, range(3)))

    def step(carry, pairs):
        params, state = carry
        updates, state = optimizer.update(pairs, state, params)
        return (optax.apply_updates(params, updates), state), gdmam.diagnostics(state)

    (_, end), history = jax.lax.scan(step, (PARAMS, state), stacked)
    assert "cosine/ic" in history
    assert {"cosine/ic", "cosine/bc"} < {*gdmam.diagnostics(end)}
