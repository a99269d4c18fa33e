"""Every row of the Optax table in docs/compatibility.md, tested for what it computes."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax import contrib

import gdmam_jax as gdmam
from tests.compatibility.harness import (
    STEPS,
    example_pairs,
    example_params,
    map_pairs,
    replay,
    stateless,
    train,
    typed,
)

BASE = optax.chain(gdmam.scale_by_gdmam(), optax.scale(-0.1))


GDMAM = gdmam.gdmam(0.1)
RELEASED = gdmam.gdmam_released(0.1)
ALLOCATED = optax.chain(gdmam.allocate(), optax.adamw(0.1))
CLIPPED = optax.chain(optax.clip_by_global_norm(0.5), BASE)


def same(wrapper):
    """`over_pairs` without a wrapper worth the name: makes pairs of ``alignment=``."""
    return wrapper


def assert_close(found, expected, rtol=1e-5, atol=1e-6):
    chex.assert_trees_all_close(found, expected, rtol=rtol, atol=atol)


def run(optimizer, params=None, pairs=None, extra=None, keywords=False):
    """One optimizer by itself, over the example's pairs unless told otherwise."""
    params = example_params() if params is None else params
    pairs = example_pairs() if pairs is None else pairs
    return train({"it": optimizer}, params, pairs, extra, keywords)["it"]


@functools.cache
def plain():
    """GDMAM by itself, over the example's pairs."""
    return run(BASE)


def replayed():
    """GDMAM's updates again: as the pairs are given, they depend on nothing that comes after."""
    return replay(plain().updates)


def assert_same_way(found, expected):
    """Both runs walk the same way, and it is not GDMAM's own."""
    assert_close(found.params, expected.params)
    difference = jax.tree.map(np.subtract, found.params, plain().params)
    assert optax.tree.norm(difference) >= 1e-3


def assert_equal_runs(optimizer, reference, pairs=None, extra=None):
    """The optimizer and the one written by hand walk the same way, and it is not GDMAM's own."""
    pairs = example_pairs() if pairs is None else pairs
    optimizers = {"found": optimizer, "expected": reference}
    runs = train(optimizers, example_params(), pairs, extra)
    assert_same_way(runs["found"], runs["expected"])
    return runs


# Links before GDMAM: pairs in, pairs out.


def both_norms(pairs):
    return jnp.sqrt(sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(pairs)))


def each_step(function, pairs):
    """Maps ``function(pairs of one step)`` over the steps, on the host."""
    steps = [function(jax.tree.map(lambda leaf, at=at: leaf[at], pairs)) for at in range(STEPS)]
    return jax.tree.map(lambda *leaves: np.stack(leaves), *steps)


def block_clipped(gradient):
    return gradient / np.maximum(1, np.sqrt(np.mean(gradient**2)) / 0.3)


def clipped_to_parameter(gradient, parameter):
    axes = 0 if gradient.ndim == 2 else None
    keep = gradient.ndim == 2
    norms = [jnp.sqrt(jnp.sum(x**2, axis=axes, keepdims=keep)) for x in (gradient, parameter)]
    limit = 0.2 * jnp.maximum(norms[1], 1e-3)
    return gradient * jnp.minimum(1, limit / jnp.maximum(norms[0], 1e-6))


BEFORE = {
    "scale": (optax.scale(0.01), lambda g: 0.01 * g),
    "clip": (optax.clip(0.2), lambda g: np.clip(g, -0.2, 0.2)),
    "clip_by_block_rms": (optax.clip_by_block_rms(0.3), block_clipped),
    "centralize": (
        optax.centralize(),
        lambda g: g - np.mean(g, axis=1, keepdims=True) if g.ndim > 1 else g,
    ),
    "scale_by_sign": (optax.scale_by_sign(), np.sign),
}


@pytest.mark.parametrize("name", BEFORE)
def test_link_before(name):
    """The link works on each of the two gradients by itself."""
    link, by_hand = BEFORE[name]
    changed = each_step(lambda pairs: map_pairs(by_hand, pairs), example_pairs())
    assert_same_way(run(optax.chain(link, BASE)), run(BASE, pairs=changed))


def clipped_together(pairs, limit):
    scale = np.minimum(1, limit / np.sqrt(sum(np.sum(x**2) for x in jax.tree.leaves(pairs))))
    return jax.tree.map(lambda g: scale * g, pairs)


def test_clip_by_global_norm_before():
    """The norm is that of both gradients together: their relation, and so the angle, stays."""
    found = run(CLIPPED)
    clipped = each_step(lambda pairs: clipped_together(pairs, 0.5), example_pairs())
    assert_same_way(found, run(BASE, pairs=clipped))
    cosines = [gdmam.diagnostics(each.after(1)[1])["cosine"] for each in (found, plain())]
    assert_close(*cosines)


LIFTED_BEFORE = {
    "zero_nans": (optax.zero_nans(), lambda g, p: jnp.where(jnp.isnan(g), 0, g)),
    "adaptive_grad_clip": (optax.adaptive_grad_clip(0.2), clipped_to_parameter),
    "add_decayed_weights": (optax.add_decayed_weights(0.3), lambda g, p: g + 0.3 * p),
}


def poisoned(pairs, steps, value=jnp.nan):
    """The pairs with one bad number at each of the steps, in either gradient by turns."""
    pairs = jax.tree.map(np.copy, pairs)
    kernel = pairs["trunk"]["kernel"]
    for number, step in enumerate(steps):
        (kernel.prediction, kernel.alignment)[number % 2][step, 0, 1] = value
    return pairs


@pytest.mark.parametrize("name", LIFTED_BEFORE)
def test_link_before_over_pairs(name):
    """The link works on each of the two gradients by itself."""
    link, by_hand = LIFTED_BEFORE[name]
    pairs = example_pairs()
    if name == "zero_nans":
        pairs = poisoned(pairs, [2, 3])
    reference = stateless(lambda pairs, params: map_pairs(by_hand, pairs, params))
    runs = assert_equal_runs(
        gdmam.over_pairs(lambda tx: optax.chain(link, tx), BASE),
        optax.chain(reference, BASE),
        pairs,
    )
    chex.assert_tree_all_finite(runs["found"].params)


def test_ema_before_over_pairs():
    """Each gradient is averaged over time by itself."""

    def update(pairs, averages, params=None):
        averages = jax.tree.map(lambda old, new: 0.8 * old + 0.2 * new, averages, pairs)
        return averages, averages

    reference = optax.GradientTransformation(
        lambda params: optax.tree.zeros_like(gdmam.pair_gradients(params, params)), update
    )
    assert_equal_runs(
        gdmam.over_pairs(lambda tx: optax.chain(optax.ema(0.8, debias=False), tx), BASE),
        optax.chain(reference, BASE),
    )


@pytest.mark.parametrize(
    "link", [optax.ema(0.8), optax.adaptive_grad_clip(1.0), optax.add_decayed_weights(0.3)]
)
def test_links_that_need_over_pairs_fail_at_once_without(link):
    optimizer, params = optax.chain(link, BASE), example_params()
    pairs = gdmam.pair_gradients(params, params)
    with pytest.raises(ValueError, match="pytree structure error"):
        jax.eval_shape(optimizer.update, pairs, optimizer.init(params), params)


def test_zero_nans_without_over_pairs_fails_in_a_scan():
    """Single steps go on, and compile a second time: its state has another structure then."""
    optimizer, params = optax.chain(optax.zero_nans(), BASE), example_params()
    start = optimizer.init(params)

    def step(state, pair):
        return optimizer.update(pair, state, params)[::-1]

    pair = gdmam.pair_gradients(params, params)
    second, _ = jax.eval_shape(step, start, pair)
    third, _ = jax.eval_shape(step, second, pair)
    structures = [jax.tree.structure(state) for state in (start, second, third)]
    assert structures[0] != structures[1] == structures[2]
    with pytest.raises(TypeError, match="must have the same pytree structure"):
        jax.lax.scan(step, start, example_pairs())


def test_add_noise_before():
    """Independent noise of the given variance on the two gradients."""
    link = optax.add_noise(eta=0.25, gamma=0.0, key=0)
    zeros = {"w": np.zeros((100, 100), np.float32)}
    noisy, _ = jax.jit(link.update)(gdmam.pair_gradients(zeros, zeros), link.init(zeros), zeros)
    halves = np.reshape([noisy["w"].prediction, noisy["w"].alignment], (2, -1))
    np.testing.assert_allclose(np.cov(halves), 0.25 * np.eye(2), atol=0.01)

    def update(pairs, state, params=None):
        noisy, noise_state = link.update(pairs, state[0], params)
        updates, inner = BASE.update(noisy, state[1], params)
        return updates, (noise_state, inner)

    reference = optax.GradientTransformation(
        lambda params: (link.init(params), BASE.init(params)), update
    )
    assert_equal_runs(optax.chain(link, BASE), reference)


def test_freeze_before():
    """Frozen parameters do not move, and do not count in the geometry either."""
    frozen = {"trunk": {"kernel": False}, "head": {"kernel": True, "bias": True}}
    frozen_run = run(optax.chain(optax.freeze(frozen), BASE))
    trunk = run(BASE, part(example_params(), "trunk"), part(example_pairs(), "trunk"))
    assert_close(part(frozen_run.params, "trunk"), trunk.params)
    chex.assert_trees_all_equal(frozen_run.after(STEPS)[0]["head"], example_params()["head"])


# Links after GDMAM: ordinary updates.


def scaled_to(limit, updates):
    return optax.tree.scale(jnp.minimum(1, limit / optax.tree.norm(updates)), updates)


AFTER = {
    "clip_by_global_norm": (optax.clip_by_global_norm(0.05), lambda u, p: scaled_to(0.05, u)),
    "clip_by_block_rms": (
        optax.clip_by_block_rms(0.02),
        lambda u, p: jax.tree.map(lambda x: x / jnp.maximum(1, jnp.sqrt(jnp.mean(x**2)) / 0.02), u),
    ),
    "adaptive_grad_clip": (
        optax.adaptive_grad_clip(0.02),
        lambda u, p: jax.tree.map(lambda x, w: clipped_to_parameter(x, 0.1 * w), u, p),
    ),
    "add_decayed_weights": (
        optax.add_decayed_weights(0.1),
        lambda u, p: jax.tree.map(lambda x, w: x + 0.1 * w, u, p),
    ),
    "add_decayed_weights, a tree for mask": (
        optax.add_decayed_weights(0.1, {"trunk": True, "head": {"kernel": True, "bias": False}}),
        lambda u, p: jax.tree.map(lambda x, w: x + 0.1 * w if x.ndim > 1 else x, u, p),
    ),
    "add_decayed_weights, a function for mask": (
        optax.add_decayed_weights(0.1, lambda tree: jax.tree.map(lambda x: x.ndim > 1, tree)),
        lambda u, p: jax.tree.map(lambda x, w: x + 0.1 * w if x.ndim > 1 else x, u, p),
    ),
    "freeze": (
        optax.freeze({"trunk": {"kernel": False}, "head": {"kernel": True, "bias": True}}),
        lambda u, p: {**u, "head": jax.tree.map(jnp.zeros_like, u["head"])},
    ),
    "zero_nans": (
        optax.chain(stateless(lambda u, p: {**u, "head": make_nan(u["head"])}), optax.zero_nans()),
        lambda u, p: {**u, "head": jax.tree.map(jnp.zeros_like, u["head"])},
    ),
    "flatten around other links": (
        optax.flatten(optax.clip_by_global_norm(0.05)),
        lambda u, p: scaled_to(0.05, u),
    ),
}


def make_nan(tree):
    return jax.tree.map(lambda leaf: jnp.full_like(leaf, jnp.nan), tree)


@pytest.mark.parametrize("name", AFTER)
def test_link_after(name):
    link, by_hand = AFTER[name]
    assert_equal_runs(optax.chain(BASE, link), optax.chain(replayed(), stateless(by_hand)))


def test_ema_after():
    def update(updates, average, params=None):
        average = jax.tree.map(lambda old, new: 0.8 * old + 0.2 * new, average, updates)
        return average, average

    reference = optax.GradientTransformation(optax.tree.zeros_like, update)
    assert_equal_runs(
        optax.chain(BASE, optax.ema(0.8, debias=False)), optax.chain(replayed(), reference)
    )


def test_add_noise_after():
    link = optax.add_noise(eta=0.01, gamma=0.5, key=0)
    noisy = run(optax.chain(BASE, link))
    # The pairs are given, so what differs is the noise, whose variance falls with the steps.
    noise = jax.tree.map(np.subtract, noisy.updates, plain().updates)
    noise = np.concatenate([leaf.reshape(STEPS, -1) for leaf in jax.tree.leaves(noise)], axis=1)
    standardised = noise / np.sqrt(0.01 / np.arange(1, STEPS + 1) ** 0.5)[:, None]
    assert 0.8 < np.std(standardised) < 1.2


def test_reduce_on_plateau():
    """The factor halves whenever the value handed over has not improved for three steps."""
    values = np.float32([5, 4, 3, 3, 3, 3, 3, 3, 3, 2, 2, 2])
    factors = np.float32([1, 1, 1, 1, 1, 0.5, 0.5, 0.5, 0.25, 0.25, 0.25, 0.25])
    assert_equal_runs(
        optax.chain(BASE, contrib.reduce_on_plateau(factor=0.5, patience=3)),
        optax.chain(
            replayed(), stateless(lambda u, p, factor, **extra: optax.tree.scale(factor, u))
        ),
        extra={"value": values, "factor": factors},
    )


# Chains and parts of trees.


def test_chain():
    optimizer = optax.chain(
        optax.clip_by_global_norm(0.5),
        gdmam.scale_by_gdmam(),
        optax.add_decayed_weights(0.1),
        optax.scale_by_learning_rate(0.1),
    )

    def update(pairs, state, params=None):
        scale = jnp.minimum(1, 0.5 / both_norms(pairs))
        direction, state = gdmam.scale_by_gdmam().update(
            map_pairs(lambda g: scale * g, pairs), state
        )
        return jax.tree.map(lambda d, p: -0.1 * (d + 0.1 * p), direction, params), state

    reference = optax.GradientTransformation(gdmam.scale_by_gdmam().init, update)
    assert_equal_runs(optimizer, reference)


def test_named_chain():
    optimizer = optax.named_chain(
        ("clip", optax.clip_by_global_norm(0.5)),
        ("gdmam", gdmam.scale_by_gdmam()),
        ("rate", optax.scale_by_learning_rate(0.1)),
    )
    found = run(optimizer)
    assert_same_way(found, run(CLIPPED))
    state = found.after(STEPS)[1]
    assert state["gdmam"].count == STEPS
    assert gdmam.diagnostics(state) == gdmam.diagnostics(state["gdmam"])


TRUNK = {"trunk": {"kernel": True}, "head": {"kernel": False, "bias": False}}
HEAD = jax.tree.map(lambda trunk: not trunk, TRUNK)
LABELS = jax.tree.map(lambda trunk: "trunk" if trunk else "head", TRUNK)


def part(tree, name):
    return {name: tree[name]}


def assert_parts_as_alone(whole, trunk, head):
    """Each part of the run goes as if its optimizer had no other parameters."""
    for name, optimizer in (("trunk", trunk), ("head", head)):
        alone = run(optimizer, part(example_params(), name), part(example_pairs(), name))
        assert_close(part(whole.params, name), alone.params)


HEADS = {
    "summed": gdmam.summed(optax.adam(0.1), alignment_weight=0.5),
    "nothing": gdmam.summed(optax.set_to_zero()),
    "another GDMAM": gdmam.gdmam(
        0.05, gate=gdmam.conflict_gate, momentum=gdmam.relative_momentum, amsgrad=True
    ),
    "released": gdmam.gdmam_released(0.05),
    "allocate": optax.chain(gdmam.allocate(), optax.adam(0.05)),
}


@pytest.mark.parametrize("head", HEADS)
def test_partition(head):
    """Each part goes as if it were alone: its own geometry, its own settings."""
    whole = run(optax.partition({"trunk": BASE, "head": HEADS[head]}, LABELS))
    assert_parts_as_alone(whole, BASE, HEADS[head])
    if head == "nothing":
        final = whole.after(STEPS)[0]["head"]
        chex.assert_trees_all_equal(final, example_params()["head"])
    report = gdmam.diagnostics(whole.after(STEPS)[1])
    several = head in ("another GDMAM", "released", "allocate")
    assert ("cosine" in report) != several
    assert sum(key.endswith("cosine") for key in report) == 1 + several


def test_masked():
    """Masked leaves pass through as the pairs they are: another link must take them."""
    sgd = gdmam.summed(optax.sgd(0.1))
    whole = run(optax.chain(optax.masked(BASE, TRUNK), optax.masked(sgd, HEAD)))
    assert_parts_as_alone(whole, BASE, sgd)


def test_masked_link_before():
    whole = optax.chain(optax.masked(optax.clip_by_global_norm(0.2), TRUNK), BASE)

    def clip_trunk(pairs):
        return {**pairs, "trunk": clipped_together(pairs["trunk"], 0.2)}

    assert_same_way(run(whole), run(BASE, pairs=each_step(clip_trunk, example_pairs())))


def label(tree):
    return jax.tree.map_with_path(lambda path, leaf: path[0].key, tree)


@pytest.mark.parametrize("function", [True, False])
def test_labels_by_a_function(function):
    """Optax calls it with the updates, here pairs: call it once on the parameters instead."""
    labels = label if function else label(example_params())
    optimizer = optax.partition({"trunk": BASE, "head": BASE}, labels)
    params = example_params()
    pairs = jax.tree.map(lambda leaf: leaf[0], example_pairs())
    state = optimizer.init(params)
    if function:
        with pytest.raises(ValueError, match="GradientPair"):
            optimizer.update(pairs, state, params)
    else:
        jax.jit(optimizer.update)(pairs, state, params)


# Numbers that change.


def restless(initial, minimum, maximum, prediction, parallel, orthogonal):
    """Choices for the raw components, with a rule that meets both bounds."""
    rule = gdmam.relative_momentum(
        initial=initial,
        minimum=minimum,
        maximum=maximum,
        sensitivity=(prediction, parallel, orthogonal),
    )
    return {
        "weighting": gdmam.constant_weighting(1, 1),
        "gate": gdmam.open_gate,
        "momentum": rule,
        "momenta": "separate",
    }


def restless_link(
    initial, minimum, maximum, prediction, parallel, orthogonal, statistics_decay, b2, eps
):
    choices = restless(initial, minimum, maximum, prediction, parallel, orthogonal)
    return gdmam.scale_by_gdmam(**choices, statistics_decay=statistics_decay, b2=b2, eps=eps)


def restless_gdmam(
    learning_rate, weight_decay, initial, minimum, maximum, prediction, parallel, orthogonal,
    statistics_decay, b2, eps,
):  # fmt: skip
    return gdmam.gdmam(
        learning_rate,
        **restless(initial, minimum, maximum, prediction, parallel, orthogonal),
        weight_decay=weight_decay,
        statistics_decay=statistics_decay,
        b2=b2,
        eps=eps,
    )


NUMBERS = {"statistics_decay": 0.9, "b2": 0.99, "eps": 1e-2}
RULE = {
    "initial": 0.95,
    "minimum": 0.9,
    "maximum": 0.94,
    "prediction": 0.5,
    "parallel": 0.1,
    "orthogonal": 0.5,
}
FACTORIES = {
    "scale_by_gdmam": (
        restless_link,
        NUMBERS | RULE,
        (),
    ),
    "gdmam": (
        restless_gdmam,
        NUMBERS | RULE | {"learning_rate": 0.1, "weight_decay": 0.1},
        (),
    ),
    "gdmam_released": (
        gdmam.gdmam_released,
        NUMBERS
        | {
            "initial_momentum": 0.93,
            "minimum_momentum": 0.6,
            "maximum_momentum": 0.94,
            "prediction_sensitivity": 0.3,
            "parallel_sensitivity": 0.02,
            "orthogonal_sensitivity": 0.3,
        }
        | {
            "learning_rate": 0.1,
            "weight_decay": 0.1,
            "bias_weight_decay": 0.2,
            "clip_factor": 0.5,
        },
        ("clip_window",),
    ),
}


def changing(value):
    """A schedule that starts at the value and goes somewhere else that is allowed."""
    return lambda count: value * (1 - 0.03 * count)


@pytest.mark.parametrize("name", FACTORIES)
def test_inject_hyperparams_schedules_every_scalar(name):
    factory, scalars, static = FACTORIES[name]
    schedules = {key: changing(value) for key, value in scalars.items()}
    optimizer = optax.inject_hyperparams(factory, static_args=static)(**schedules)

    def update(pairs, state, params=None):
        count, inner = state
        now = {key: schedule(count) for key, schedule in schedules.items()}
        updates, inner = factory(**now).update(pairs, inner, params)
        return updates, (count + 1, inner)

    def init(params):
        return jnp.zeros((), jnp.int32), factory(**scalars).init(params)

    runs = assert_equal_runs(optimizer, optax.GradientTransformation(init, update))
    hyperparams = runs["found"].after(STEPS)[1].hyperparams
    assert hyperparams.keys() >= scalars.keys()
    for key, value in scalars.items():
        np.testing.assert_allclose(hyperparams[key], changing(value)(STEPS - 1), rtol=1e-5)


@pytest.mark.parametrize("name", FACTORIES)
def test_inject_hyperparams_every_scalar_matters(name):
    """Each injected number, changed by hand alone, changes the result."""
    factory, scalars, static = FACTORIES[name]
    optimizer = optax.inject_hyperparams(factory, static_args=static)(**scalars)
    params = example_params()
    # A small prediction gradient and a seed with which some component meets each bound.
    prediction, alignment = gdmam.unpair_gradients(example_pairs(seed=4))
    small = jax.tree.map(lambda leaf: np.float32(0.1) * leaf, prediction)
    pairs = gdmam.pair_gradients(small, alignment)
    state = optimizer.init(params)
    names = sorted(scalars)
    # One run a row: the first as given, in each other one number changed.
    factors = np.where(np.eye(1 + len(names), len(names), -1), 0.9, 1).astype(np.float32)
    rows = {key: scalars[key] * column for key, column in zip(names, factors.T, strict=True)}

    @jax.jit
    @jax.vmap
    def final_params(hyperparams):
        # What an argument like initial_momentum does, it does in init.
        start = state._replace(
            hyperparams={**state.hyperparams, **hyperparams},
            inner_state=factory(**hyperparams).init(params),
        )

        def step(carry, pair):
            params, state = carry
            updates, state = optimizer.update(pair, state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, start), pairs)[0][0]

    finals = jax.device_get(final_params(rows))
    for number, key in enumerate(names):
        difference = jax.tree.map(lambda leaf, row=number + 1: leaf[row] - leaf[0], finals)
        assert optax.tree.norm(difference) > 1e-6, key


def test_learning_rate_schedule():
    schedule = optax.warmup_cosine_decay_schedule(0.0, 0.2, 3, STEPS)
    runs = train(
        {
            "scheduled": gdmam.gdmam(schedule, weight_decay=0.0),
            "plain": gdmam.gdmam(1.0, weight_decay=0.0),
        },
        example_params(),
        example_pairs(),
    )
    rates = np.asarray(jax.jit(schedule)(np.arange(STEPS)))
    expected = jax.tree.map(lambda u: (u.T * rates).T, runs["plain"].updates)
    assert_close(runs["scheduled"].updates, expected)


# Wrappers.


@pytest.mark.parametrize("optimizer", [BASE, RELEASED, ALLOCATED])
@pytest.mark.parametrize("keywords", [False, True])
def test_multi_steps(optimizer, keywords):
    """Equal to one step on the averaged pair, and no step in between."""
    lifted = gdmam.over_pairs(lambda tx: optax.MultiSteps(tx, 3), optimizer)
    pairs = example_pairs()
    averaged = jax.tree.map(lambda x: np.mean(x.reshape(4, 3, *x.shape[1:]), axis=1), pairs)
    found = run(lifted, pairs=pairs, keywords=keywords)
    expected = run(optimizer, pairs=averaged)
    assert_close(jax.tree.map(lambda leaf: leaf[2::3], found.params), expected.params)
    for step in (1, 2, 4, 5):
        chex.assert_trees_all_equal(found.after(step)[0], found.after(step - step % 3)[0])


OPTIMIZERS = {"gdmam": GDMAM, "gdmam_released": RELEASED, "allocate": ALLOCATED}
SKIPPING = {
    name: gdmam.over_pairs(lambda tx: optax.apply_if_finite(tx, 5), optimizer)
    for name, optimizer in OPTIMIZERS.items()
}


@pytest.mark.parametrize("value", [jnp.nan, jnp.inf])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_apply_if_finite(name, value):
    """A poisoned pair leaves parameters and state as they were, bit for bit."""
    bad = [0, 4, 5]
    found = run(SKIPPING[name], pairs=poisoned(example_pairs(), bad, value))
    for step in bad:
        (params, state), (old_params, old_state) = found.after(step + 1), found.after(step)
        chex.assert_trees_all_equal(params, old_params)
        chex.assert_trees_all_equal(state.inner_state, old_state.inner_state)
    good = [step for step in range(STEPS) if step not in bad]
    clean = run(OPTIMIZERS[name], pairs=jax.tree.map(lambda x: x[good], example_pairs()))
    assert_close(found.after(STEPS)[0], clean.after(len(good))[0])
    assert found.after(STEPS)[1].total_notfinite == len(bad)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_skip_not_finite(name):
    """A poisoned mini-step never happened: not to parameters, state or accumulated gradients."""
    optimizer = OPTIMIZERS[name]
    lifted = gdmam.over_pairs(
        lambda tx: optax.MultiSteps(tx, 2, should_skip_update_fn=optax.skip_not_finite), optimizer
    )
    bad = [0, 5]
    found = run(lifted, pairs=poisoned(example_pairs(), bad))
    for step in bad:
        (params, state), (old_params, old_state) = found.after(step + 1), found.after(step)
        chex.assert_trees_all_equal(params, old_params)
        chex.assert_trees_all_equal(
            state._replace(skip_state=()), old_state._replace(skip_state=())
        )
        assert state.skip_state["should_skip"]
    assert found.after(STEPS)[1].gradient_step == (STEPS - len(bad)) // 2


def test_lookahead():
    """The slow parameters go half of the way to the fast ones at every third step."""
    optimizer = optax.lookahead(BASE, sync_period=3, slow_step_size=0.5)
    params = optax.LookaheadParams.init_synced(example_params())

    def update(pairs, state, params):
        inner, count = state
        updates, inner = BASE.update(pairs, inner, params.fast)
        fast = optax.apply_updates(params.fast, updates)
        sync = count % 3 == 2
        slow = jax.tree.map(lambda s, f: jnp.where(sync, 0.5 * (s + f), s), params.slow, fast)
        fast = jax.tree.map(lambda s, f: jnp.where(sync, s, f), slow, fast)
        new = optax.LookaheadParams(fast=fast, slow=slow)
        return jax.tree.map(jnp.subtract, new, params), (inner, count + 1)

    reference = optax.GradientTransformation(
        lambda params: (BASE.init(params.fast), jnp.zeros((), jnp.int32)), update
    )
    runs = train({"found": optimizer, "expected": reference}, params, example_pairs())
    assert_close(runs["found"].params, runs["expected"].params)
    chex.assert_trees_all_equal_comparator(
        lambda a, b: bool(np.any(a != b)),
        lambda a, b: "nothing moved",
        runs["found"].after(STEPS)[0].slow,
        example_params(),
    )


def test_schedule_free():
    """With one learning rate, x is the plain average of z, and training goes between the two."""
    optimizer = contrib.schedule_free(BASE, 0.1, b1=0.9)

    def update(pairs, state, params):
        inner, z, total, count = state
        updates, inner = BASE.update(pairs, inner, params)
        z = optax.apply_updates(z, updates)
        total, count = optax.tree.add(total, z), count + 1
        new = jax.tree.map(lambda total, z: 0.9 * total / count + 0.1 * z, total, z)
        return jax.tree.map(jnp.subtract, new, params), (inner, z, total, count)

    def init(params):
        zeros = optax.tree.zeros_like(params)
        return BASE.init(params), params, zeros, jnp.zeros(())

    runs = assert_equal_runs(optimizer, optax.GradientTransformation(init, update))
    params, state = runs["found"].after(STEPS)
    _, (_, _, total, count) = runs["expected"].after(STEPS)
    assert_close(
        contrib.schedule_free_eval_params(state, params), optax.tree.scale(1 / count, total)
    )


def test_mechanize():
    """Its learned scale follows the inner product of the step with the sum of both gradients."""
    optimizer = gdmam.over_pairs(
        lambda tx: contrib.mechanize(tx, weight_decay=0.0, s_init=1e-2, num_betas=1), BASE
    )

    # What it keeps of both halves lies in buffers of their own.
    jax.jit(lambda state: state, donate_argnums=0)(optimizer.init(example_params()))

    def update(pairs, state, params):
        inner, start, scale, limit, reward, variance = state
        updates, inner = BASE.update(pairs, inner, params)
        total = optax.tree.add(*gdmam.unpair_gradients(pairs))
        offset = jax.tree.map(lambda p, p0: (p0 - p) / (scale + 1e-8), params, start)
        h = optax.tree.vdot(total, offset)
        limit, clipped = (
            jnp.maximum(0.9 * limit, jnp.abs(h) + 1e-8),
            jnp.clip(h, -limit, limit),
        )
        variance = 0.81 * variance + h**2
        reward = 0.9 * reward + clipped * scale
        scale = (1e-2 * limit + jnp.maximum(reward, 0)) / (jnp.sqrt(variance) + 1e-8)
        new = jax.tree.map(lambda p0, o, u: p0 - scale * (o - u), start, offset, updates)
        return (
            jax.tree.map(jnp.subtract, new, params),
            (inner, start, scale, limit, reward, variance),
        )

    def init(params):
        zero = jnp.zeros(())
        return BASE.init(params), params, zero + 1e-2, zero, zero, zero

    runs = train(
        {"found": optimizer, "expected": optax.GradientTransformation(init, update)},
        example_params(),
        example_pairs(),
    )
    assert_close(runs["found"].params, runs["expected"].params, rtol=1e-4)
    assert runs["found"].after(STEPS)[1].s != 1e-2


# Other ways in.


KEYWORD_OPTIMIZERS = {
    "scale_by_gdmam": BASE,
    "gdmam": GDMAM,
    "gdmam_released": RELEASED,
    "allocate": ALLOCATED,
    "summed": gdmam.summed(optax.adam(0.1)),
    "over_pairs": gdmam.over_pairs(
        lambda tx: optax.chain(optax.clip_by_global_norm(0.5), tx), BASE
    ),
    "over_pairs around partition": gdmam.over_pairs(
        same, optax.partition({"trunk": BASE, "head": gdmam.summed(optax.sgd(0.1))}, LABELS)
    ),
}


@pytest.mark.parametrize("name", KEYWORD_OPTIMIZERS)
def test_alignment_gradients_by_keyword(name):
    optimizer = KEYWORD_OPTIMIZERS[name]
    assert_close(run(optimizer, keywords=True).params, run(optimizer).params)


def test_links_before_see_only_the_prediction_gradients_of_a_keyword_call():
    """As documented: `over_pairs` around the chain lets them see both."""

    def clip_prediction(pairs):
        prediction, alignment = gdmam.unpair_gradients(pairs)
        return gdmam.pair_gradients(clipped_together(prediction, 0.5), alignment)

    found = run(CLIPPED, keywords=True)
    expected = run(BASE, pairs=each_step(clip_prediction, example_pairs()))
    assert_close(found.params, expected.params)


EXTRA_OPTIMIZERS = KEYWORD_OPTIMIZERS | {
    "multi_steps": gdmam.over_pairs(lambda tx: optax.MultiSteps(tx, 2), BASE),
    "injected": optax.inject_hyperparams(gdmam.gdmam)(0.1),
    "masked": optax.masked(BASE, True),
    "clip_by_recent_norm": optax.chain(BASE, gdmam.clip_by_recent_norm()),
}


@pytest.mark.parametrize("name", EXTRA_OPTIMIZERS)
def test_unknown_extra_arguments(name):
    optimizer = optax.with_extra_args_support(EXTRA_OPTIMIZERS[name])
    params, pairs = example_params(), jax.tree.map(lambda leaf: leaf[0], example_pairs())
    extra = {"value": np.float32(1), "unheard_of": np.float32(0)}
    state = jax.eval_shape(optimizer.init, params)
    updates, new = jax.eval_shape(lambda *a: optimizer.update(*a, **extra), pairs, state, params)
    assert typed(new) == typed(state)
    assert typed(updates) == typed(params)


# What cannot work.


@pytest.mark.parametrize(
    "optimizer",
    [
        optax.flatten(gdmam.scale_by_gdmam()),
        optax.flatten(gdmam.gdmam_released()),
        gdmam.over_pairs(optax.flatten, gdmam.scale_by_gdmam()),
    ],
)
@pytest.mark.parametrize("keywords", [False, True])
def test_flatten_says_why_not_and_what_to_do(optimizer, keywords):
    with pytest.raises(
        (TypeError, ValueError), match=r"optax\.flatten\?(.|\n)*around the other links"
    ):
        train({"it": optimizer}, example_params(), example_pairs(), keywords=keywords)


# The state as a tree.


MAPPED = {
    "scale_by_gdmam": (BASE, 1),
    "separate": (gdmam.scale_by_gdmam(momenta="separate"), 3),
    "gdmam": (gdmam.gdmam(0.1), 2),
    "amsgrad": (gdmam.gdmam(0.1, amsgrad=True), 3),
    "gdmam_released": (gdmam.gdmam_released(0.1), 3),
    "allocate": (ALLOCATED, 2),
    "scopes": (gdmam.scale_by_gdmam(scope=gdmam.leaf_scope), 1),
    "partition": (optax.partition({"trunk": BASE, "head": BASE}, LABELS), 1),
    "multi_steps": (gdmam.over_pairs(lambda tx: optax.MultiSteps(tx, 2), BASE), 3),
    "injected": (optax.inject_hyperparams(gdmam.gdmam)(0.1), 2),
}


@pytest.mark.parametrize("name", MAPPED)
def test_map_params(name):
    """`optax.tree.map_params` finds the buffers that are like parameters, and nothing else."""
    optimizer, buffers = MAPPED[name]
    state = optimizer.init(example_params())
    state = jax.device_get(state)
    mapped = optax.tree.map_params(optimizer, lambda leaf: leaf + 7, state)
    assert jax.tree.structure(mapped) == jax.tree.structure(state)
    changed = jax.tree.map(lambda old, new: bool(np.any(old != new)), state, mapped)
    assert sum(jax.tree.leaves(changed)) == buffers * len(jax.tree.leaves(example_params()))


@pytest.mark.parametrize("jit", [False, True])
def test_injected_numbers_narrower_than_float32_are_refused(jit):
    """In bfloat16 b2 = 0.999 is 1, and nothing would ever move."""
    params = np.ones(2, jnp.bfloat16)
    injected = optax.inject_hyperparams(gdmam.gdmam)(0.1)
    with pytest.raises(ValueError, match=r"must be float32 or better, got bfloat16; .*dtype="):
        (jax.jit(injected.init) if jit else injected.init)(params)
    wide = optax.inject_hyperparams(gdmam.gdmam, hyperparam_dtype=jnp.float32)(0.1)
    pair = gdmam.GradientPair(params, params)
    update, _ = jax.jit(lambda: wide.update(pair, wide.init(params), params))()
    assert (np.asarray(update) < 0).all()
