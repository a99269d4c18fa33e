"""Steps that are not finite: taken or left out, and how long a spike is felt."""

import contextlib
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import gdmam_jax as gdmam

PARAMS = {"w": jnp.array([1.0, -0.0, 2.0]), "b": jnp.ones(4)}


def example(seed):
    random = np.random.default_rng(seed)
    halves = (
        jax.tree.map(lambda p: np.float32(random.normal(size=p.shape)), PARAMS) for _ in range(2)
    )
    return gdmam.pair_gradients(*halves)


def spoiled(half, value):
    pairs = example(99)
    getattr(pairs["w"], half)[1] = value
    return pairs


def stepper(optimizer):
    @jax.jit
    def step(params, state, pairs):
        updates, state = optimizer.update(pairs, state, params)
        return optax.apply_updates(params, updates), state

    return step


def bits(tree):
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def counts(state):
    report = gdmam.diagnostics(state)
    return int(report["skipped"]), int(report["skipped_in_a_row"])


def kept(state):
    """All of a state but the counts."""
    first, *links = state if type(state) is tuple else (state,)
    allocation = first.allocation.replace(skipped=None, skipped_in_a_row=None)
    return first.replace(allocation=allocation), links


SKIPPING = {
    "gdmam": functools.partial(gdmam.gdmam, optax.cosine_decay_schedule(0.1, 20)),
    "scopes": functools.partial(gdmam.gdmam, 0.1, scope=gdmam.leaf_scope, amsgrad=True),
    "scale_by_gdmam": gdmam.scale_by_gdmam,
}


@pytest.mark.parametrize("name", SKIPPING)
def test_a_step_that_is_not_finite_is_as_if_it_had_not_been(name):
    optimizer = SKIPPING[name](not_finite="skip")
    step, params, state = stepper(optimizer), PARAMS, optimizer.init(PARAMS)
    expected_state = optimizer.init(PARAMS)
    expected = PARAMS
    bad = [("prediction", jnp.nan), ("alignment", jnp.inf), ("alignment", -1e30)]
    for seed in range(3):
        params, state = step(params, state, example(seed))
        before = bits((params, kept(state)))
        params, state = step(params, state, spoiled(*bad[seed]))
        assert bits((params, kept(state))) == before
        assert counts(state) == (seed + 1, 1)
        expected, expected_state = step(expected, expected_state, example(seed))
    assert bits((params, kept(state))) == bits((expected, kept(expected_state)))
    assert step._cache_size() == 1
    assert counts(state) == (3, 1)


def test_skipping_finite_steps_only_is_the_plain_optimizer():
    plain, careful = gdmam.gdmam(0.1), gdmam.gdmam(0.1, not_finite="skip")
    one = two = PARAMS
    plain_step, careful_step = stepper(plain), stepper(careful)
    state, careful_state = plain.init(PARAMS), careful.init(PARAMS)
    for seed in range(4):
        one, state = plain_step(one, state, example(seed))
        two, careful_state = careful_step(two, careful_state, example(seed))
    for found, expected in zip(jax.tree.leaves(two), jax.tree.leaves(one), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize("not_finite", ["skip", "skip_loss"])
def test_after_so_many_in_a_row_the_failure_shows(not_finite):
    """Where losses are left out one by one, once none is left."""
    optimizer = gdmam.gdmam(0.1, not_finite=not_finite, max_skips=2)
    step, params, state = stepper(optimizer), PARAMS, optimizer.init(PARAMS)
    bad = spoiled("prediction", jnp.nan)
    if not_finite == "skip_loss":
        bad = jax.tree.map(lambda leaf: np.full_like(leaf, np.nan), bad)
    for pairs in (bad, bad, example(0), bad, bad):
        params, state = step(params, state, pairs)
        assert np.isfinite(params["w"]).all()
    params, state = step(params, state, bad)
    assert np.isnan(params["w"]).all()
    assert counts(state) == (4, 3)


def test_weights_that_are_not_finite_are_skipped_too():
    def weighting(gramian, norms):
        return jnp.where(gramian[0, 0] > 1, jnp.nan, 1.0) * jnp.ones_like(norms)

    optimizer = gdmam.gdmam(0.1, weighting=weighting, not_finite="skip")
    step, state = stepper(optimizer), optimizer.init(PARAMS)
    for length, skipped in ((1e-3, 0), (1e3, 1)):
        pairs = jax.tree.map(lambda leaf, length=length: np.full_like(leaf, length), example(0))
        params, state = step(PARAMS, state, pairs)
        assert counts(state) == (skipped, skipped)
        assert (bits(params) == bits(PARAMS)) == bool(skipped)


def test_by_default_numbers_that_are_not_finite_spread_as_in_optax():
    optimizer = gdmam.gdmam(0.1)
    params, _ = stepper(optimizer)(PARAMS, optimizer.init(PARAMS), spoiled("prediction", jnp.nan))
    assert np.isnan(params["w"]).all()


def test_wrong_choices_and_states_of_another_choice_are_named():
    with pytest.raises(
        ValueError, match="not_finite must be 'apply', 'skip' or 'skip_loss', got 'raise'"
    ):
        gdmam.gdmam(0.1, not_finite="raise")
    with pytest.raises(ValueError, match="max_skips needs not_finite='skip'"):
        gdmam.scale_by_gdmam(max_skips=3)
    with pytest.raises(ValueError, match="max_skips must"):
        gdmam.scale_by_gdmam(not_finite="skip", max_skips=-1)
    plain, careful = gdmam.gdmam(0.1), gdmam.gdmam(0.1, not_finite="skip")
    for one, other in ((plain, careful), (careful, plain)):
        with pytest.raises(ValueError, match="another choice of not_finite"):
            one.update(example(0), other.init(PARAMS), PARAMS)
    remembers = gdmam.gdmam(0.1, weighting=gdmam.gradvac_weighting)
    for one, other in ((plain, remembers), (remembers, plain)):
        with pytest.raises(ValueError, match="another choice of weighting"):
            one.update(example(0), other.init(PARAMS), PARAMS)


def test_wrappers_around_a_skipping_optimizer():
    optimizer = optax.inject_hyperparams(
        lambda rate: gdmam.gdmam(rate, not_finite="skip", max_skips=5)
    )(rate=0.1)
    step = stepper(optimizer)
    _, state = step(PARAMS, optimizer.init(PARAMS), spoiled("prediction", jnp.nan))
    assert int(gdmam.diagnostics(state)["skipped"]) == 1
    steps = gdmam.over_pairs(
        lambda tx: optax.MultiSteps(tx, 2), gdmam.gdmam(0.1, not_finite="skip")
    )
    step, state, params = stepper(steps), steps.init(PARAMS), PARAMS
    for pairs in (example(0), spoiled("alignment", jnp.inf)):
        params, state = step(params, state, pairs)
    assert int(gdmam.diagnostics(state)["skipped"]) == 1
    for found, expected in zip(jax.tree.leaves(params), jax.tree.leaves(PARAMS), strict=True):
        np.testing.assert_array_equal(found, expected)


def test_all_devices_decide_alike_and_send_nothing_more():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    whole = np.arange(16, dtype=np.float32)
    params = jax.device_put(whole, sharding)
    pair = gdmam.GradientPair(np.where(whole == 3, np.nan, np.ones_like(whole)), whole)
    pair = jax.device_put(pair, sharding)

    def run(**choices):
        optimizer = gdmam.gdmam(0.1, axis_name="data", **choices)
        state = optimizer.init(params)

        def step(params, pair):
            updates, after = optimizer.update(pair, state_of(params), params)
            skipped = after[0].allocation.skipped if choices else jnp.zeros((), jnp.int32)
            return updates, skipped[None]

        def state_of(local):
            # Momenta lie as the parameters do, all else is on every device.
            return jax.tree.map(
                lambda leaf: jnp.zeros_like(local) if leaf.shape == params.shape else leaf, state
            )

        spec = PartitionSpec("data")
        return jax.jit(jax.shard_map(step, mesh=mesh, in_specs=spec, out_specs=spec))

    updates, skipped = run(not_finite="skip")(params, pair)
    assert skipped.tolist() == [1] * 8
    assert bits(params + updates) == bits(params)

    def messages(**choices):
        text = run(**choices).lower(params, pair).compile().as_text()
        return len(re.findall(r" all-reduce(?:-start)?\(", text))

    assert messages() == messages(not_finite="skip") == 1


@pytest.mark.parametrize("kind", ["pmap", "auto", "explicit"])
def test_replicas_leave_out_the_step_that_one_device_spoils(kind):
    """Of data-parallel training, where only the batch on one of eight devices is not finite."""
    optimizer = gdmam.gdmam(0.1, not_finite="skip")
    batches = np.ones((2, 8, 16), np.float32)
    batches[1, 5, 3] = np.nan

    def losses(w, x):
        return jnp.mean((x * w - 2) ** 2), jnp.mean(jnp.abs(w - x))

    def step(w, state, x, average=lambda pair: pair):
        _, pair = gdmam.value_and_paired_grad(losses)(w, x)
        updates, state = optimizer.update(average(pair), state, w)
        return w + updates, state

    w = np.linspace(-1, 1, 16, dtype=np.float32)
    state = optimizer.init(w)
    if kind == "pmap":
        average = functools.partial(jax.lax.pmean, axis_name="data")
        whole = functools.partial(step, average=average)
        step_once = jax.pmap(whole, axis_name="data")
        w, state = (jax.tree.map(lambda x: np.stack([x] * 8), tree) for tree in (w, state))
        mesh = contextlib.nullcontext()
    else:
        types = {"auto": AxisType.Auto, "explicit": AxisType.Explicit}
        mesh = jax.set_mesh(jax.make_mesh((8,), ("data",), axis_types=(types[kind],)))
        step_once = jax.jit(step)
    with mesh:
        if kind != "pmap":
            w, state = jax.device_put((w, state), PartitionSpec())
            batches = jax.device_put(batches, PartitionSpec(None, "data"))
        taken = step_once(w, state, batches[0])
        left_out = step_once(*taken, batches[1])
    assert np.abs(np.asarray(taken[0]) - np.asarray(w)).min() > 0.05
    assert bits((left_out[0], kept(left_out[1]))) == bits((taken[0], kept(taken[1])))
    skipped = left_out[1][0].allocation.skipped
    assert [int(shard.data.sum()) for shard in skipped.addressable_shards] == [1] * 8


def steps_off(optimizer, steps):
    """For how many steps each quantity is off after one gradient of 1e10 times its length.

    By 0.01 a momentum coefficient, by a tenth of what it was before anything else. And the longest
    update over the last one before.
    """
    g = np.array([[1.0, 0.0], [0.6, 0.8]])

    def step(state, scale):
        updates, state = optimizer.update(gdmam.GradientPair(g[0], scale * g[1]), state)
        allocation = state.allocation
        return state, {
            "weights": allocation.weights,
            "norms": allocation.norms,
            "statistics": state.statistics.mean,
            "coefficients": state.statistics.momentum,
            "update": updates,
        }

    spike = steps // 4
    scales = np.where(np.arange(steps) == spike, 1e10, 1.0)
    seen = jax.device_get(
        jax.jit(lambda scales: jax.lax.scan(step, optimizer.init(g[0]), scales)[1])(scales)
    )
    assert all(np.isfinite(values).all() for values in seen.values())
    off = {}
    for name, values in seen.items():
        before = values[spike - 1]
        most = 0.01 if name == "coefficients" else 0.1 * np.abs(before) + 1e-6
        away = np.any(np.abs(values[spike:] - before) > most, axis=-1)
        off[name] = int(np.max(np.nonzero(away)[0], initial=-1)) + 1
    lengths = np.linalg.norm(seen["update"], axis=-1)
    return off, np.max(lengths) / lengths[spike - 1]


# The running means forget at 0.9 a step, the momentum at 0.95, the second moment at 0.999.
RECOVERY = {
    ("unit", "constant"): {"weights": 218, "norms": 219, "coefficients": 0, "update": 249},
    ("balanced", "constant"): {"weights": 1, "norms": 219, "statistics": 0, "update": 0},
    ("config", "constant"): {"weights": 1, "norms": 219, "statistics": 212, "update": 422},
    ("norm", "constant"): {"weights": 1, "norms": 219, "coefficients": 0, "update": 449},
    ("pcgrad", "constant"): {"weights": 0, "norms": 219, "statistics": 219, "update": 436},
    ("unit", "ratcheted"): {"coefficients": 0, "statistics": 231, "update": 221},
    ("unit", "anchored"): {"coefficients": 232, "update": 245},
    ("unit", "relative"): {"coefficients": 257, "update": 235},
    ("norm", "anchored"): {"coefficients": 455, "statistics": 226, "update": 114},
    ("norm", "relative"): {"coefficients": 490, "update": 111},
}
SECOND_MOMENT = {"unit": 236, "balanced": 0, "config": 39_189, "norm": 41_960}


@pytest.mark.parametrize(("weighting", "momentum"), RECOVERY)
def test_a_spike_is_forgotten(weighting, momentum):
    optimizer = gdmam.scale_by_gdmam(
        weighting=getattr(gdmam, f"{weighting}_weighting"),
        momentum=getattr(gdmam, f"{momentum}_momentum"),
    )
    off, longest = steps_off(optimizer, 2000)
    for quantity, steps in RECOVERY[weighting, momentum].items():
        assert off[quantity] == pytest.approx(steps, rel=0.05), quantity
    if weighting == "unit":
        # The spike itself counts as much as any other gradient.
        assert longest < 1.5


@pytest.mark.parametrize("weighting", SECOND_MOMENT)
def test_a_second_moment_forgets_a_spike_slowly_unless_the_weights_keep_it_out(weighting):
    chosen = getattr(gdmam, f"{weighting}_weighting")
    off, _ = steps_off(gdmam.scale_by_gdmam(weighting=chosen, b2=0.999), 60_000)
    assert off["update"] == pytest.approx(SECOND_MOMENT[weighting], rel=0.05)
