"""The allocation as a link: in front of any optimizer, against code written by hand."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax import contrib

import gdmam_jax as gdmam
from tests.compatibility.harness import STEPS, example_pairs, example_params, replay, train


def allocated_by_hand():
    """Unit weights and the priority gate, over all leaves together, written apart."""

    def init(params):
        del params
        return jnp.zeros(2), jnp.zeros(())

    def update(pairs, state, params=None, **extra):
        del params, extra
        sums, count = state
        prediction, alignment = gdmam.unpair_gradients(pairs)
        p = jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(prediction)])
        a = jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(alignment)])
        norms = jnp.stack([jnp.sqrt(p @ p), jnp.sqrt(a @ a)])
        sums, count = 0.9 * sums + norms, 0.9 * count + 1
        w = 1 / jnp.maximum(norms, sums / count)
        cosine = p @ a / (norms[0] * norms[1])
        ratio = w[1] * norms[1] / (w[0] * norms[0])
        k = jnp.maximum(-cosine, 1e-9)
        kept = jnp.where(cosine < 0, jnp.clip((k / ratio + k**2 - 1) / k**2, 0, 1), 1)
        along = p @ a / (p @ p)

        def combine(p, a):
            return w[0] * p + w[1] * (a - (1 - kept) * along * p)

        return jax.tree.map(combine, prediction, alignment), (sums, count)

    return optax.GradientTransformationExtraArgs(init, update)


@functools.cache
def gradients_by_hand():
    return train({"it": allocated_by_hand()}, example_params(), example_pairs())["it"].updates


def matrices(params):
    """Muon's labels, by what is a matrix."""
    return jax.tree.map(
        lambda leaf: contrib.MuonDimensionNumbers() if leaf.ndim == 2 else None, params
    )


BEHIND = {
    "adamw": optax.adamw(0.1),
    "lion": optax.lion(0.02),
    "muon": contrib.muon(0.1),
    "muon, labels by a function": contrib.muon(0.1, muon_weight_dimension_numbers=matrices),
    "adan": optax.adan(0.1),
    "sgd": optax.sgd(0.1, momentum=0.9),
    "schedule_free": contrib.schedule_free_adamw(0.1),
    "lookahead's fast weights": optax.chain(optax.adam(0.1), optax.scale(0.5)),
    "polyak": optax.polyak_sgd(0.1),
    "reduce_on_plateau": optax.chain(
        optax.adam(0.1), contrib.reduce_on_plateau(patience=1, cooldown=0)
    ),
}


@pytest.mark.parametrize("name", BEHIND)
def test_in_front_of_an_optimizer(name):
    """Each takes the gradient that is written by hand, and the parameters, not pairs."""
    runs = train(
        {
            "found": optax.chain(gdmam.allocate(), BEHIND[name]),
            "expected": optax.chain(replay(gradients_by_hand()), BEHIND[name]),
        },
        example_params(),
        example_pairs(),
        extra={"value": np.linspace(2, 1, STEPS, dtype=np.float32)},
    )
    # Muon's orthogonalisation passes rounding on enlarged.
    rtol = 2e-3 if "muon" in name else 1e-4
    chex.assert_trees_all_close(
        runs["found"].params,
        runs["expected"].params,
        rtol=rtol,
        atol=1e-4 if "muon" in name else 1e-5,
    )
    moved = jax.tree.map(np.subtract, runs["found"].after(STEPS)[0], example_params())
    assert optax.tree.norm(moved) > 1e-2


def test_muon_sees_the_matrices_among_the_parameters():
    """Were its labels made of pairs, there would be no matrix for it."""
    optimizer = optax.chain(gdmam.allocate(), contrib.muon(0.1))
    state = optimizer.init(example_params())
    _, inner = state
    muon = inner.inner_states["muon"].inner_state[0]
    matrices = [leaf for leaf in jax.tree.leaves(muon.mu) if hasattr(leaf, "ndim")]
    assert sorted(leaf.shape for leaf in matrices) == [(2, 2), (3, 2)]


def test_gdmam_is_adam_behind_allocate(x64):
    """The shortest answer to what the default does: one constant momentum makes it Adam."""
    params = example_params(jnp.float64)
    pairs = example_pairs(params)
    chain = optax.chain(
        gdmam.allocate(),
        optax.scale_by_adam(b1=0.95),
        optax.add_decayed_weights(1e-4),
        optax.scale_by_learning_rate(0.1),
    )
    runs = train({"gdmam": gdmam.gdmam(0.1), "chain": chain}, params, pairs)
    chex.assert_trees_all_close(runs["gdmam"].params, runs["chain"].params, rtol=1e-12, atol=1e-13)
    reports = [gdmam.diagnostics(runs[name].after(STEPS)[1]) for name in ("gdmam", "chain")]
    for key, value in reports[1].items():
        np.testing.assert_allclose(reports[0][key], value, rtol=1e-12, err_msg=key)


def test_weighed_is_a_chain():
    inner = optax.adam(0.1)
    runs = train(
        {
            "weighed": gdmam.weighed(inner, gdmam.unit_weighting, gdmam.priority_gate),
            "chain": optax.chain(gdmam.allocate(), inner),
        },
        example_params(),
        example_pairs(),
    )
    chex.assert_trees_all_equal(runs["weighed"].params, runs["chain"].params)


def test_sam_climbs_along_both_gradients(x64):
    """The form that error messages recommend, against the formula."""
    target = jnp.array([1.0, -2.0, 0.5])

    def losses(w):
        return jnp.sum((w - target) ** 2), jnp.sum(jnp.cos(w) * w)

    radius, rate = 0.05, 0.1
    adversary = optax.chain(contrib.normalize(), optax.sgd(radius))
    optimizer = contrib.sam(
        gdmam.weighed(optax.sgd(rate), gdmam.sum_weighting),
        gdmam.summed(adversary),
        sync_period=2,
    )
    w = jnp.array([0.3, 0.7, -0.4])
    state, expected = jax.jit(optimizer.init)(w), w
    gradient = jax.grad(lambda w: sum(losses(w)))

    @jax.jit
    def step(w, state):
        _, pairs = gdmam.value_and_paired_grad(losses)(w)
        updates, state = optimizer.update(pairs, state, w)
        return optax.apply_updates(w, updates), state

    @jax.jit
    def step_by_hand(w):
        first = gradient(w)
        return w - rate * gradient(w + radius * first / jnp.linalg.norm(first))

    for _ in range(5):
        for _ in range(2):
            w, state = step(w, state)
        expected = step_by_hand(expected)
        np.testing.assert_allclose(w, expected, rtol=1e-12)


LABELS = {"trunk": {"kernel": "t"}, "head": {"kernel": "h", "bias": "h"}}
MASK = {"trunk": {"kernel": True}, "head": {"kernel": False, "bias": False}}


@pytest.mark.parametrize(
    "wrapper",
    [
        lambda tx: optax.partition({"t": tx, "h": optax.sgd(1.0)}, LABELS),
        lambda tx: optax.masked(tx, MASK),
        lambda tx: optax.adam(0.1),
        lambda tx: optax.chain(
            optax.MultiSteps(optax.masked(tx, MASK), 2).gradient_transformation()
        ),
    ],
    ids=["partition", "masked", "another optimizer", "MultiSteps of masked"],
)
@pytest.mark.parametrize(
    "optimizer", [gdmam.gdmam(0.1), optax.chain(gdmam.allocate(), optax.sgd(1.0))]
)
def test_a_wrapper_that_hands_leaves_to_others_is_refused(wrapper, optimizer):
    """They would take the prediction gradient alone."""
    with pytest.raises(ValueError, match=r"head/.*another optimizer.*write optax\.partition"):
        gdmam.over_pairs(wrapper, optimizer).init(example_params())


# Optimizers that want the loss's value.


def fighting(w):
    """Two losses with a common solution, and another scale each."""
    return jnp.sum((w - 1) ** 2) + jnp.sum(w**4 - 1) ** 2, 100 * jnp.sum((w[:-1] - w[1:]) ** 2)


def settled(state):
    """The state with the types that a step gives it: line searches start with weak ones."""
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, leaf.dtype), state)


def minimised(optimizer, steps, with_grad=True, start=(1.8, -0.6, 0.4)):
    @jax.jit
    def step(w, state):
        values, pairs = gdmam.value_and_paired_grad(fighting)(w)
        given = {"grad": pairs, "value_fn": fighting} if with_grad else {}
        updates, state = optimizer.update(pairs, state, w, value=values, **given)
        return optax.apply_updates(w, updates), state

    w = jnp.array(start)
    state = settled(optimizer.init(w))
    for _ in range(steps):
        w, state = step(w, state)
    return w, state


LINE_SEARCHES = {
    "lbfgs": optax.lbfgs(),
    "zoom": optax.chain(optax.sgd(1.0), optax.scale_by_zoom_linesearch(20)),
    "backtracking": optax.chain(optax.sgd(1.0), optax.scale_by_backtracking_linesearch(30)),
}


@pytest.mark.parametrize("inner", LINE_SEARCHES)
def test_line_searches_get_the_function_whose_gradient_they_are_given(inner, x64):
    optimizer, weights = LINE_SEARCHES[inner], (3.0, 0.5)

    def total(w):
        return jnp.dot(jnp.array(weights), jnp.stack(fighting(w)))

    @jax.jit
    def step(w, state):
        value, grad = jax.value_and_grad(total)(w)
        updates, state = optimizer.update(grad, state, w, value=value, grad=grad, value_fn=total)
        return optax.apply_updates(w, updates), state

    expected = jnp.array([1.8, -0.6, 0.4])
    state = settled(optimizer.init(expected))
    for _ in range(8):
        expected, state = step(expected, state)
    for weighed in (
        gdmam.weighed(optimizer, gdmam.constant_weighting(*weights)),
        gdmam.summed(optimizer, *weights),
    ):
        np.testing.assert_allclose(minimised(weighed, 8)[0], expected, rtol=1e-8)


@pytest.mark.parametrize("gate", [gdmam.open_gate, gdmam.priority_gate, gdmam.cosine_gate])
def test_the_function_has_the_allocated_gradient(gate, x64):
    """Whatever the gate: what is allocated is a combination of the losses' gradients."""
    seen = {}

    def update(updates, state, params=None, **extra):
        seen.update(extra, updates=updates)
        return updates, state

    spy = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
    optimizer = gdmam.weighed(spy, gdmam.unit_weighting, gate)
    w = jnp.array([1.8, -0.6, 0.4])

    @jax.jit
    def given(w):
        values, pairs = gdmam.value_and_paired_grad(fighting)(w)
        optimizer.update(pairs, optimizer.init(w), w, value=values, grad=pairs, value_fn=fighting)
        function = seen.pop("value_fn")
        return seen, jax.value_and_grad(function)(w)

    seen, (value, gradient) = given(w)
    np.testing.assert_allclose(gradient, seen["updates"], rtol=1e-12)
    np.testing.assert_allclose(value, seen["value"], rtol=1e-12)
    np.testing.assert_array_equal(seen["grad"], seen["updates"])


def test_polyak_steps_are_of_the_weighed_loss(x64):
    polyak = gdmam.weighed(optax.polyak_sgd(1.0), gdmam.sum_weighting)
    w, _ = minimised(polyak, 1, with_grad=False)
    start = np.array([1.8, -0.6, 0.4])
    total = jax.jit(jax.value_and_grad(lambda w: sum(fighting(w))))
    value, gradient = jax.device_get(total(start))
    expected = start - min(1, value / np.sum(gradient**2)) * gradient
    np.testing.assert_allclose(w, expected, rtol=1e-12)


@pytest.mark.parametrize(
    ("wrap", "present"),
    [
        (lambda inner: gdmam.weighed(inner, gdmam.sum_weighting, not_finite="skip_loss"), None),
        (lambda inner: gdmam.weighed(inner, gdmam.sum_weighting), (True, False)),
        (gdmam.summed, (True, False)),
    ],
    ids=["skip_loss", "absent", "absent from summed"],
)
def test_the_value_of_a_loss_that_is_left_out_does_not_count(wrap, present):
    inner = optax.polyak_sgd()
    pair = gdmam.GradientPair(W, np.float32([np.nan, np.nan]))

    @jax.jit
    def found_and_expected(value):
        optimizer = wrap(inner)
        given = {} if present is None else {"present": present}
        found, _ = optimizer.update(pair, optimizer.init(W), W, value=value, **given)
        return found, inner.update(W, inner.init(W), W, value=value[0])[0]

    found, expected = found_and_expected((3.0, jnp.nan))
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_with_several_scopes_the_weighting_gets_the_values_and_the_optimizer_none():
    params, pairs = {"a": W, "b": W}, {"a": PAIR, "b": PAIR}
    learned = gdmam.gradnorm_weighting
    link = gdmam.allocate(learned, gdmam.open_gate, scope=gdmam.leaf_scope)

    @jax.jit
    def both(value):
        return [
            optimizer.update(pairs, optimizer.init(params), params, value=value)[0]
            for optimizer in (
                gdmam.weighed(optax.sgd(1.0), learned, scope=gdmam.leaf_scope),
                optax.chain(link, optax.sgd(1.0)),
            )
        ]

    chex.assert_trees_all_equal(*both((1.0, 2.0)))
    polyak = gdmam.weighed(optax.polyak_sgd(), gdmam.sum_weighting, scope=gdmam.leaf_scope)
    with pytest.raises(TypeError, match="value"):
        jax.eval_shape(lambda: polyak.update(pairs, polyak.init(params), params, value=(1.0, 2.0)))


def test_a_line_search_hands_on_what_the_losses_are_given():
    def losses(w, target):
        return jnp.sum((w - target) ** 2), jnp.sum(w**2)

    @jax.jit
    def updates(target):
        optimizer = gdmam.weighed(optax.lbfgs(), gdmam.sum_weighting)
        values, pairs = gdmam.value_and_paired_grad(losses)(W, target)
        given = {"value": values, "grad": pairs}
        return [
            optimizer.update(pairs, optimizer.init(W), W, **given, **function)[0]
            for function in (
                {"value_fn": losses, "target": target},
                {"value_fn": lambda w: losses(w, target)},
            )
        ]

    np.testing.assert_array_equal(*updates(jnp.array([3.0, 2.0])))


def test_first_gdmam_then_lbfgs_with_its_last_weights_reaches_a_stationary_point(x64):
    """The recipe of physics-informed networks."""
    w, state = minimised(gdmam.weighed(optax.adam(0.05), gdmam.unit_weighting), 60)
    last = gdmam.diagnostics(state)
    frozen = gdmam.constant_weighting(last["prediction_weight"], last["alignment_weight"])
    optimizer = gdmam.weighed(optax.lbfgs(), frozen)

    def step(carry, _):
        w, state = carry
        values, pairs = gdmam.value_and_paired_grad(fighting)(w)
        updates, state = optimizer.update(
            pairs, state, w, value=values, grad=pairs, value_fn=fighting
        )
        return (optax.apply_updates(w, updates), state), None

    weights = jnp.array([last["prediction_weight"], last["alignment_weight"]])

    @jax.jit
    def gradient_at_the_end(w):
        (w, _), _ = jax.lax.scan(step, (w, optimizer.init(w)), length=60)
        return jax.grad(lambda w: weights @ jnp.stack(fighting(w)))(w)

    assert np.linalg.norm(gradient_at_the_end(w)) < 1e-8


W = jnp.array([1.0, 2.0])
PAIR = gdmam.GradientPair(W, -W)
SUM = gdmam.weighed(optax.lbfgs(), gdmam.sum_weighting)


@pytest.mark.parametrize(
    ("optimizer", "given", "message"),
    [
        (
            optax.chain(gdmam.allocate(), optax.lbfgs()),
            {"value": 1.0, "grad": W, "value_fn": jnp.sum},
            r"write weighed\(optax.lbfgs\(\), weighting\) instead",
        ),
        (SUM, {"value": 1.0, "grad": PAIR, "value_fn": jnp.sum}, "value must be like the losses"),
        (
            gdmam.summed(optax.lbfgs()),
            {"value": 1.0, "grad": PAIR, "value_fn": jnp.sum},
            "value must be like the losses",
        ),
        (
            SUM,
            {"value": (1.0, 1.0), "grad": PAIR, "value_fn": jnp.sum},
            "what value_fn returns must be like the losses",
        ),
        (
            gdmam.weighed(optax.lbfgs(), gdmam.sum_weighting, scope=lambda path: "all"),
            {"value": (1.0, 1.0), "grad": PAIR, "value_fn": jnp.sum},
            "needs one scope",
        ),
    ],
)
def test_values_of_something_else_are_refused(optimizer, given, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda: optimizer.update(PAIR, optimizer.init(W), W, **given))
