"""Whatever the public functions are given, they answer rightly or refuse in their own words.

A few examples of each in an ordinary run, always the same; for more and others
`FUZZING_EXAMPLES=1000 pytest tests/test_fuzzing.py`.
"""

import functools
import os
import traceback
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import gdmam_jax as gdmam

PACKAGE = Path(gdmam.__file__).parent
EXAMPLES = os.environ.get("FUZZING_EXAMPLES")


def fuzzed(examples):
    """So many examples, always the same, unless the environment asks for others."""
    return settings(
        max_examples=int(EXAMPLES or examples),
        derandomize=EXAMPLES is None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


# Few shapes, so that little is compiled.
LEAVES = [
    lambda: jnp.array([1.0, -2.0]),
    lambda: jnp.array([0.5, 3.0]),
    lambda: jnp.array([0.0, 0.0]),
    lambda: np.array([3.0, 4.0], np.float32),
    lambda: jnp.array([1.0, 2.0], jnp.bfloat16),
    lambda: jnp.array([-2.0, 0.5], jnp.float16),
    lambda: jnp.zeros((0,)),
    lambda: jnp.array(0.5),
    lambda: np.float32(2),
    lambda: 1.5,  # weakly typed, as is the next
    lambda: jnp.asarray(-1.0),
    lambda: None,
]
NO_GRADIENTS = [
    lambda: 3,
    lambda: True,
    lambda: 1j,
    lambda: "text",
    lambda: object(),
    lambda: len,
    lambda: jnp.arange(2),
    lambda: jnp.ones(2, bool),
    lambda: jnp.ones(2, jnp.complex64),
    lambda: jax.random.key(0),
    lambda: np.array(["a", "b"]),
    lambda: np.array([None, 1.0], object),
    lambda: np.datetime64("2020-01-01"),
    lambda: jnp.float32,
    lambda: np.ones(2, ">f4"),
    lambda: np.ones(2, np.longdouble),
    lambda: np.ma.array([1.0, 2.0], dtype=np.float32),
]


def refusal(error):
    """Whether one of the package's own ``raise`` statements raised an error."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    return Path(last.filename).parent == PACKAGE and last.line.startswith("raise ")


def answer(function, *arguments, **keywords):
    """What a function returns, or None where it refuses; any other error is passed on."""
    try:
        return function(*arguments, **keywords)
    except (TypeError, ValueError) as error:
        if not refusal(error):
            raise
        return None


def nested(leaves):
    """Trees of up to two levels."""
    inner = st.one_of(
        leaves,
        st.lists(leaves, max_size=2),
        st.dictionaries(st.sampled_from("ab"), leaves, max_size=2),
    )
    return st.one_of(
        inner,
        st.lists(inner, max_size=2).map(tuple),
        st.dictionaries(st.sampled_from("ab"), inner, max_size=2),
    )


gradients = st.sampled_from(LEAVES).map(lambda make: make())
anything = st.sampled_from(LEAVES * 4 + NO_GRADIENTS).map(lambda make: make())


@st.composite
def beside(draw, tree, leaves=gradients):
    """A tree much like another, one leaf in a few of another kind, now and then another tree."""
    if draw(st.integers(0, 9)) == 0:
        return draw(nested(leaves))

    def leaf(each):
        if draw(st.integers(0, 7)) == 0 or not hasattr(each, "dtype"):
            return draw(leaves) if draw(st.integers(0, 4)) == 0 else each
        return each * draw(st.sampled_from([1, -1, 2, 0])) if _is_float(each) else each

    return jax.tree.map(leaf, tree)


def _is_float(leaf):
    return hasattr(leaf, "shape") and jnp.issubdtype(leaf.dtype, jnp.floating)


def equal(found, expected, rtol=0.0):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for left, right in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert jnp.shape(left) == jnp.shape(right)
        np.testing.assert_allclose(wide(left), wide(right), rtol=rtol, atol=rtol)


def wide(leaf):
    return np.asarray(leaf, np.float64)


def precision(tree):
    return max([4 * float(jnp.finfo(jnp.result_type(x)).eps) for x in jax.tree.leaves(tree)] + [0])


@fuzzed(15)
@given(st.data())
def test_pairs(data):
    prediction = data.draw(nested(anything))
    alignment = data.draw(beside(prediction, anything))
    pairs = answer(gdmam.pair_gradients, prediction, alignment)
    if pairs is not None and jax.tree.leaves(prediction):
        equal(gdmam.unpair_gradients(pairs), (prediction, alignment))
    answer(gdmam.unpair_gradients, data.draw(nested(anything)))


@fuzzed(8)
@given(st.data())
def test_decompose(data):
    prediction = data.draw(nested(gradients))
    pairs = answer(gdmam.pair_gradients, prediction, data.draw(beside(prediction)))
    if data.draw(st.booleans()):
        pairs = data.draw(beside(pairs, anything))
    parts = answer(gdmam.decompose, pairs)
    if parts is None:
        return
    prediction, alignment = gdmam.unpair_gradients(pairs)
    if jax.tree.structure(prediction) != jax.tree.structure(alignment):
        return  # several alignment losses, or one in a container
    p, a = (flat(tree) for tree in (prediction, alignment))
    along = (p @ a) / max(p @ p, 1e-30) * p
    rounding = precision(alignment) * (1 + np.abs(flat(parts.parallel)).max(initial=0))
    np.testing.assert_allclose(flat(parts.parallel), along, atol=rounding, rtol=1e-2)
    np.testing.assert_allclose(flat(parts.orthogonal), a - along, atol=4 * rounding, rtol=1e-2)
    assert float(parts.geometry.alignment_norm) == pytest.approx(np.linalg.norm(a), rel=1e-5)


def flat(tree):
    return np.concatenate([np.zeros(0), *(np.ravel(wide(leaf)) for leaf in jax.tree.leaves(tree))])


# What each computes at its first step, from the two gradients as vectors.
OPTIMIZERS = {
    "scale_by_gdmam": (
        gdmam.scale_by_gdmam(weighting=gdmam.sum_weighting, gate=gdmam.conflict_gate),
        lambda p, a: p + a - min(p @ a, 0) / max(p @ p, 1e-30) * p,
    ),
    "separate": (
        gdmam.scale_by_gdmam(
            weighting=gdmam.mean_weighting, gate=gdmam.open_gate, momenta="separate"
        ),
        lambda p, a: (p + a) / 2,
    ),
    "summed": (gdmam.summed(optax.identity(), 1, 0.5), lambda p, a: p + a / 2),
    "weighed": (gdmam.weighed(optax.identity(), gdmam.sum_weighting), lambda p, a: p + a),
    "over_pairs": (
        gdmam.over_pairs(lambda tx: tx, gdmam.weighed(optax.identity(), gdmam.mean_weighting)),
        lambda p, a: (p + a) / 2,
    ),
}


@fuzzed(8)
@given(st.data(), st.sampled_from(sorted(OPTIMIZERS)))
def test_update(data, name):
    optimizer, formula = OPTIMIZERS[name]
    params = data.draw(nested(anything))
    state = answer(optimizer.init, params)
    if state is None:
        return
    prediction, alignment = (data.draw(beside(params, anything)) for _ in range(2))
    if data.draw(st.booleans()):
        result = answer(optimizer.update, prediction, state, alignment=alignment)
    else:
        pairs = answer(gdmam.pair_gradients, prediction, alignment)
        if data.draw(st.integers(0, 4)) == 0:
            pairs = data.draw(beside(prediction, anything))
        result = None if pairs is None else answer(optimizer.update, pairs, state)
    if result is None or jax.tree.structure(prediction) != jax.tree.structure(alignment):
        return  # refused, or several alignment losses, which are another formula
    updates, state_after = result
    assert jax.tree.structure(updates) == jax.tree.structure(prediction)
    expected = formula(flat(prediction), flat(alignment))
    tolerance = 4 * precision((prediction, params))
    np.testing.assert_allclose(flat(updates), expected, rtol=tolerance, atol=4 * tolerance)
    assert jax.tree.structure(state_after) == jax.tree.structure(state)
    for before, after in zip(jax.tree.leaves(state), jax.tree.leaves(state_after), strict=True):
        assert jnp.shape(before) == jnp.shape(after)
        assert jnp.result_type(before) == jnp.result_type(after)


@fuzzed(5)
@given(nested(anything))
def test_value_and_paired_grad(tree):
    def losses(tree):
        leaves = [jnp.asarray(leaf, jnp.float32) for leaf in jax.tree.leaves(tree)]
        total = jnp.float32(0)
        return sum(map(jnp.sum, leaves), total), sum((jnp.sum(x**2) for x in leaves), total)

    result = answer(gdmam.value_and_paired_grad(losses), tree)
    if result is None:
        return
    values, pairs = result
    vector = flat(tree)
    np.testing.assert_allclose(np.stack(values), [vector.sum(), vector @ vector], rtol=1e-5)
    prediction = jax.tree.map(np.ones_like, tree)
    alignment = jax.tree.map(lambda leaf: 2 * wide(leaf), tree)
    if jax.tree.leaves(tree):
        equal(gdmam.unpair_gradients(pairs), (prediction, alignment))


LARGEST = np.finfo(float).max
BOUNDS = {
    "initial": (0, np.nextafter(1, 0)),
    "minimum": (0, 0.999),
    "maximum": (0.7, np.nextafter(1, 0)),
    "sensitivity": (0, LARGEST),
    "statistics_decay": (0, np.nextafter(1, 0)),
    "b2": (0, np.nextafter(1, 0)),
    "eps": (np.nextafter(0, 1), LARGEST),
}


@fuzzed(30)
@given(
    st.sampled_from(sorted(BOUNDS)),
    st.one_of(
        st.floats(),
        st.floats(0, 1),
        st.integers(-2, 2),
        st.booleans(),
        st.floats(0, 1, width=16).map(lambda number: jnp.asarray(number, jnp.bfloat16)),
        st.floats(0, 1, width=32).map(np.float32),
    ),
)
def test_numbers(name, value):
    low, high = BOUNDS[name]
    of_rule = name in ("initial", "minimum", "maximum", "sensitivity")
    make = gdmam.ratcheted_momentum if of_rule else functools.partial(gdmam.scale_by_gdmam, b2=0.9)
    made = answer(make, **{name: value})
    short = getattr(value, "dtype", None) == jnp.bfloat16
    assert (made is not None) == (low <= float(value) <= high and not short)


W = jnp.array([1.0, 2.0])
PAIR = gdmam.GradientPair(W, -W)


def update(optimizer, pairs=PAIR, params=W, **keywords):
    return optimizer.update(pairs, optimizer.init(W), params, **keywords)


# What is given by mistake, one at a time.
REFUSED = {
    "a tree in a pair": lambda: gdmam.decompose(gdmam.GradientPair({"w": W}, {"w": W})),
    "no pairs": lambda: update(gdmam.gdmam(0.1), W),
    "alignment of another structure": lambda: update(gdmam.gdmam(0.1), W, alignment=[W, W]),
    "params of another structure": lambda: update(gdmam.gdmam(0.1), params={"w": W}),
    "more alignment losses": lambda: update(gdmam.gdmam(0.1), gdmam.GradientPair(W, (W, W))),
    "another state": lambda: gdmam.gdmam(0.1).update(
        PAIR, gdmam.gdmam(0.1, momenta="separate").init(W), W
    ),
    "no state": lambda: gdmam.diagnostics((W, None)),
    "a number for a function": lambda: gdmam.gdmam(0.1, gate=3),
    "gate with one factor": lambda: update(gdmam.gdmam(0.1, gate=lambda cosine, ratio: cosine)),
    "weights of another shape": lambda: update(
        gdmam.gdmam(0.1, weighting=gdmam.constant_weighting(1, 1, 1))
    ),
    "too few weights": lambda: update(gdmam.gdmam(0.1, weighting=gdmam.constant_weighting(0.5))),
    "no learning rate": lambda: gdmam.gdmam(None),
    "text for a learning rate": lambda: gdmam.gdmam_released("0.1"),
    "a mask for a schedule": lambda: optax.inject_hyperparams(gdmam.gdmam)(
        0.1, mask=lambda tree: jax.tree.map(lambda leaf: leaf.ndim > 1, tree)
    ).init(W),
    "a dtype for a schedule": lambda: optax.inject_hyperparams(gdmam.gdmam)(
        0.1, mu_dtype=jnp.bfloat16
    ).init(W),
    "losses of other names": lambda: update(
        gdmam.gdmam(0.1, alignment_losses=("a", "b")), gdmam.GradientPair(W, {"a": W, "c": W})
    ),
    "losses below a name": lambda: update(
        gdmam.gdmam(0.1, alignment_losses=("a",)), gdmam.GradientPair(W, {"a": {"x": W, "y": W}})
    ),
    "losses by name, over_pairs": lambda: update(
        gdmam.over_pairs(lambda tx: tx, gdmam.gdmam(0.1, alignment_losses=2), alignment_losses=2),
        gdmam.GradientPair(W, {"a": W, "b": W}),
    ),
    "names of two types": lambda: gdmam.gdmam(0.1, alignment_losses=("x", 1)),
    "names twice": lambda: gdmam.gdmam(0.1, alignment_losses=("x", "x")),
    "one loss": lambda: gdmam.value_and_paired_grad(jnp.sum)(W),
    "a vector for a loss": lambda: gdmam.value_and_paired_grad(lambda w: (w, w))(W),
    "text for losses": lambda: gdmam.value_and_paired_grad(lambda w: ("1", "2"))(W),
    "params of another shape": lambda: update(gdmam.gdmam(0.1), params=W[:, None]),
    "a number for a state": lambda: gdmam.scale_by_gdmam().update(PAIR, 3, W),
    "text for a number": lambda: gdmam.scale_by_gdmam(b2="0.9"),
    "a vector for a number": lambda: gdmam.scale_by_gdmam(b2=np.array([0.1, 0.2])),
    "None for a number": lambda: gdmam.scale_by_gdmam(eps=None),
    "infinite decay": lambda: gdmam.gdmam(0.1, weight_decay=jnp.inf),
    "no optimizer": lambda: gdmam.summed(None),
    "gate with text": lambda: update(gdmam.gdmam(0.1, gate=lambda cosine, ratio: ("1", "2"))),
    "other pairs than at the start, summed": lambda: update(
        gdmam.summed(optax.adam(0.1)), gdmam.GradientPair(jnp.ones(3), jnp.ones(3))
    ),
    "no pairs, weighed": lambda: update(gdmam.weighed(optax.adam(0.1), gdmam.mean_weighting), None),
    "text for params, clip_by_recent_norm": lambda: gdmam.clip_by_recent_norm().init("text"),
    "text for params, over_pairs": lambda: gdmam.over_pairs(
        lambda tx: optax.MultiSteps(tx, 2), gdmam.gdmam(0.1)
    ).init("text"),
    "text for params, summed": lambda: gdmam.summed(optax.adam(0.1)).init("text"),
    "integer params": lambda: gdmam.gdmam(0.1).init(jnp.arange(2)),
    "integer params, summed": lambda: gdmam.summed(optax.adam(0.1)).init(jnp.arange(2)),
    "integer params for an update": lambda: update(gdmam.gdmam(0.1), params=jnp.arange(2)),
    "integer params for an update, summed": lambda: update(
        gdmam.summed(optax.adam(0.1)), params=jnp.arange(2)
    ),
    "integer params for an update, released": lambda: update(
        gdmam.gdmam_released(0.1), params=jnp.arange(2)
    ),
    "a number for a wrapper": lambda: gdmam.over_pairs(3, gdmam.gdmam(0.1)),
    "a wrapper that wraps nothing": lambda: gdmam.over_pairs(lambda tx: None, gdmam.gdmam(0.1)),
    "half a loss, over_pairs": lambda: gdmam.over_pairs(
        lambda tx: tx, gdmam.gdmam(0.1), alignment_losses=1.5
    ),
    "a number for a dtype": lambda: gdmam.gdmam(0.1, mu_dtype=3),
    "text for a dtype": lambda: gdmam.gdmam(0.1, mu_dtype="text"),
    "an integer dtype": lambda: gdmam.gdmam(0.1, mu_dtype=jnp.int32),
    "a number for an axis": lambda: gdmam.gdmam(0.1, axis_name=3),
    "a number for an axis, weighed": lambda: gdmam.weighed(
        optax.adam(0.1), gdmam.sum_weighting, axis_name=(3,)
    ),
    "a number for an axis, released": lambda: gdmam.gdmam_released(0.1, axis_name=3),
    "a number for an axis, decompose": lambda: gdmam.decompose(PAIR, axis_name=3),
    "a number for a scope, decompose": lambda: gdmam.decompose(PAIR, scope=3),
    "a number for a loss function": lambda: gdmam.value_and_paired_grad(3),
    "text for argnums": lambda: gdmam.value_and_paired_grad(jnp.sum, "x"),
    "None for argnums": lambda: gdmam.value_and_paired_grad(jnp.sum, None),
    "argnums": lambda: gdmam.value_and_paired_grad(lambda w: (w.sum(), w.sum()), 1)(W),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    with pytest.raises((TypeError, ValueError)) as error:
        REFUSED[name]()
    assert refusal(error.value), str(error.value)


def test_a_deleted_buffer_is_never_read():
    array = jnp.array([1.0, 2.0])
    donated = jax.jit(gdmam.scale_by_gdmam().init, donate_argnums=0)(array)
    array.delete()  # where nothing of it could be used again, JAX leaves it
    assert donated.momenta[0].tolist() == [0, 0]
    with pytest.raises((RuntimeError, ValueError), match="deleted"):
        gdmam.decompose(gdmam.GradientPair(array, array))
