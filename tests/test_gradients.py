"""One weighed gradient of many losses: equal to the sum of theirs, whatever the way to it."""

import itertools
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import gdmam_jax as gdmam
import gdmam_jax.nnx
from tests.conftest import skipped_under_strict_promotion

X = np.linspace(-1, 1, 15, dtype=np.float32).reshape(5, 3)
Y = np.float32([1, -1, 2, 0, 0.5])
PARAMS = {
    "w": np.linspace(0.1, 0.9, 12, dtype=np.float32).reshape(3, 4),
    "b": np.full(4, 1 / 3, np.float32),
}
WEIGHTINGS = {
    "upgrad": gdmam.upgrad_weighting,
    "unit": gdmam.unit_weighting(preference=0.5),
    "mean": gdmam.mean_weighting,
}
close = partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)


def loss_of_example(params, x, y):
    hidden = jnp.tanh(x @ params["w"] + params["b"])
    return (jnp.sum(hidden) - y) ** 2


def losses_of_example(params, x, y):
    hidden = jnp.tanh(x @ params["w"] + params["b"])
    return {"fit": (hidden[0] - y) ** 2, "small": hidden[:2] ** 2}


def losses(params, x=X, y=Y):
    return jax.vmap(loss_of_example, (None, 0, 0))(params, x, y)


def expected(losses, weighting, params, order=None):
    """Gramian, weights and gradient from the whole Jacobian."""
    values, jacobian = jax.jit(lambda params: (losses(params), jax.jacrev(losses)(params)))(params)
    flat = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(values)])
    rows = [
        np.concatenate(
            [np.reshape(leaf, (np.size(value), -1)) for leaf in jax.tree.leaves(part)], axis=1
        )
        for value, part in zip(
            jax.tree.leaves(values), jax.tree.leaves(jacobian, is_leaf=is_params), strict=True
        )
    ]
    rows = np.concatenate(rows)[order if order is not None else slice(None)]
    gramian = rows @ rows.T
    weights = jax.jit(weighting)(gramian, np.sqrt(np.diagonal(gramian)))
    assert flat.size == len(weights)
    return gramian, weights, np.asarray(weights) @ rows


def double():
    return jax.tree.map(np.float64, PARAMS)


def is_params(node):
    return isinstance(node, dict) and set(node) == set(PARAMS)


def assert_weighed(result, reference):
    _, gradient, weighing = result
    for found, wanted in zip(
        (weighing.gramian, weighing.weights, flattened(gradient)), reference, strict=True
    ):
        close(found, wanted)


def flattened(tree):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


@pytest.mark.parametrize(
    ("name", "chunk"),
    [*itertools.product(WEIGHTINGS, (None, 2)), ("upgrad", 1), ("upgrad", 9)],
)
def test_equals_the_weighed_sum_of_all_gradients(name, chunk, x64):
    result = jax.jit(gdmam.value_and_weighed_grad(losses, WEIGHTINGS[name], chunk=chunk))(double())
    close(result[0], jax.jit(losses)(double()))
    assert_weighed(result, expected(losses, WEIGHTINGS[name], double()))


@pytest.mark.parametrize("chunk", [None, 2])
def test_losses_of_examples_are_differentiated_example_by_example(chunk, x64):
    params, weighting = double(), gdmam.unit_weighting

    def step(losses, **given):
        return jax.jit(gdmam.value_and_weighed_grad(losses, weighting, chunk=chunk, **given))

    found = step(loss_of_example, example_argnums=(1, 2))(params, X, Y)
    close(found[0], losses(params))
    assert_weighed(found, expected(losses, weighting, params))

    def several(params):
        return jax.vmap(losses_of_example, (None, 0, 0))(params, X, Y)

    # By loss in the batch: fit of each example, then both others. By example here.
    order = np.array([[k, 5 + 2 * k, 6 + 2 * k] for k in range(5)]).ravel()
    found = step(losses_of_example, example_argnums=(-2, -1))(params, X, Y)
    chex.assert_trees_all_close(found[0], several(params), rtol=1e-6)
    assert_weighed(found, expected(several, weighting, params, order))
    # Without the hint the same update, but for the order of what is logged.
    assert_weighed(step(several)(params), expected(several, weighting, params))


def test_losses_of_any_structure_argnums_and_aux():
    def many(a, x, b):
        values = {"matrix": jnp.outer(a, b["v"]) ** 2, "scalar": jnp.sum(a * x)}
        return values, {"sum": jnp.sum(a), "text": 3}

    args = np.arange(1.0, 3.0), np.array([0.5, 1.5]), {"v": np.array([2.0, 1.0])}
    step = gdmam.value_and_weighed_grad(many, gdmam.sum_weighting, argnums=(-1, 0), has_aux=True)
    (values, aux), gradient, weighing = jax.jit(step)(*args)
    total = jax.grad(
        lambda *args: sum(jnp.sum(leaf) for leaf in jax.tree.leaves(many(*args)[0])), (2, 0)
    )
    chex.assert_trees_all_close(gradient, jax.jit(total)(*args), rtol=1e-6)
    chex.assert_trees_all_close(values, jax.jit(many)(*args)[0])
    assert aux["text"] == 3
    assert weighing.gramian.shape == (5, 5)


def test_the_first_loss_is_the_prediction():
    step = gdmam.value_and_weighed_grad(lambda w: (w[0], w[1]), gdmam.constant_weighting(3.0, 0.5))
    assert step(jnp.ones(2))[1].tolist() == [3.0, 0.5]


def test_the_size_of_the_program_does_not_depend_on_the_number_of_losses():
    def size(count, **given):
        x, y = jnp.ones((count, 3)), jnp.ones(count)
        step = gdmam.value_and_weighed_grad(losses, gdmam.mean_weighting, **given)
        text = jax.jit(step).lower(PARAMS, x, y).as_text()
        return len(text.splitlines())

    assert size(100) == size(4)
    assert size(100, chunk=2) == size(4, chunk=2)


def test_no_more_than_a_chunk_of_gradients_is_held(x64):
    """By the compiler's account: beside the parameters' size, a chunk of it, and not K of it."""
    params, count = jnp.ones((64, 64)), 32

    def losses(w):
        return jnp.sum(jnp.tanh(jnp.eye(64)[:count] @ w), axis=1)

    def held(chunk):
        step = gdmam.value_and_weighed_grad(losses, gdmam.mean_weighting, chunk=chunk)
        return jax.jit(step).lower(params).compile().memory_analysis().temp_size_in_bytes

    assert held(None) > count * params.nbytes
    assert held(4) < held(None) / 2
    assert held(1) < held(4) < held(16)


@pytest.mark.parametrize("chunk", [None, 2])
def test_checkpointed_custom_and_looped_functions(chunk, x64):
    @jax.custom_vjp
    def doubled(x):
        return x

    doubled.defvjp(lambda x: (x, None), lambda _, cotangent: (2 * cotangent,))

    x = X.astype(jnp.float64)

    def looped(params):
        hidden, _ = jax.lax.scan(
            lambda h, _: (jnp.tanh(h @ params["w"] @ params["w"].T), None), x, length=2
        )
        return doubled(jax.checkpoint(jnp.sum, static_argnums=1)(hidden, 1))

    def plain(params):
        hidden = jnp.tanh(jnp.tanh(X @ params["w"] @ params["w"].T) @ params["w"] @ params["w"].T)
        return 2 * jnp.sum(hidden, axis=1)

    step = gdmam.value_and_weighed_grad(looped, gdmam.upgrad_weighting, chunk=chunk)
    assert_weighed(jax.jit(step)(double()), expected(plain, gdmam.upgrad_weighting, double()))


@skipped_under_strict_promotion("the loss")
@pytest.mark.parametrize("chunk", [None, 2])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(dtype, chunk):
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), PARAMS)
    step = gdmam.value_and_weighed_grad(losses, gdmam.unit_weighting, chunk=chunk)
    _, gradient, weighing = jax.jit(step)(params)
    assert {leaf.dtype for leaf in jax.tree.leaves(gradient)} == {jnp.dtype(dtype)}
    assert weighing.gramian.dtype == weighing.weights.dtype == jnp.float32
    wanted, *_ = expected(losses, gdmam.unit_weighting, PARAMS)
    np.testing.assert_allclose(weighing.gramian, wanted, rtol=0.05, atol=0.05 * np.max(wanted))


def test_sums_of_half_precision_are_taken_in_float32():
    """A sum of 65,536 ones stops at 256 in bfloat16."""
    w = jnp.ones(65536, jnp.bfloat16)
    step = gdmam.value_and_weighed_grad(lambda w: (jnp.sum(w), jnp.sum(-w)), gdmam.mean_weighting)
    assert step(w)[2].gramian.tolist() == [[65536, -65536], [-65536, 65536]]


def test_data_parallel_on_a_mesh_is_one_device(x64):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    x = np.tile(X, (8, 1)) + np.arange(40.0)[:, None] / 40
    y = np.tile(Y, 8)
    step = jax.jit(gdmam.value_and_weighed_grad(losses, gdmam.unit_weighting))
    alone = step(double(), x, y)
    placed = [jax.device_put(leaf, NamedSharding(mesh, P("data"))) for leaf in (x, y)]
    chex.assert_trees_all_close(step(double(), *placed), alone, rtol=1e-9)


def test_trains_any_optimizer_without_recompiling():
    optimizer = optax.adam(0.05)
    step = gdmam.value_and_weighed_grad(losses, gdmam.upgrad_weighting, chunk=2)

    @chex.assert_max_traces(1)
    def update(params, state):
        values, gradient, _ = step(params)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, values

    update = jax.jit(update)
    params, state, first = update(PARAMS, optimizer.init(PARAMS))
    for _ in range(40):
        params, state, values = update(params, state)
    assert jnp.sum(values) < jnp.sum(first) / 2


def test_modules_of_flax_nnx_advance_once():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.hidden = nnx.Linear(3, 4, rngs=rngs)
            self.dropout = nnx.Dropout(0.5, rngs=rngs)
            self.calls = nnx.Variable(jnp.array(0))

        def __call__(self, x):
            self.calls[...] += 1
            return self.dropout(self.hidden(x))

    def losses(model, x):
        output = jnp.sum(model(x), axis=1)
        return (output - Y) ** 2, {"output": output}

    model = Model(nnx.Rngs(0, dropout=1))
    twin = nnx.clone(model)
    step = gdmam.nnx.value_and_weighed_grad(losses, gdmam.sum_weighting, has_aux=True, chunk=2)
    (values, aux), gradient, weighing = nnx.jit(step)(model, X)
    total = nnx.grad(lambda model: jnp.sum(losses(model, X)[0]))(twin)
    chex.assert_trees_all_close(nnx.as_pure(gradient), nnx.as_pure(total), rtol=1e-5)
    assert values.shape == aux["output"].shape == weighing.weights.shape == (5,)
    assert model.calls[...] == 1
    assert model.dropout.rngs.count[...] == 1


@pytest.mark.parametrize(
    ("given", "loss_fn", "error", "message"),
    [
        ({}, lambda w: jnp.sum(w), ValueError, "two losses or more, got 1"),
        ({}, lambda w: jnp.arange(3), TypeError, r"loss at \(root\) has dtype int"),
        ({"has_aux": True}, lambda w: w, TypeError, r"must return \(losses, aux\)"),
        ({"chunk": 0}, lambda w: w, ValueError, "chunk must be None or a number.*got 0"),
        ({"argnums": 2}, lambda w: w, TypeError, "argnums=2 needs an argument at position 2"),
        (
            {"argnums": (0, -1)},
            lambda w: w,
            ValueError,
            "names an argument twice",
        ),
        ({"example_argnums": 1}, lambda w: w, TypeError, "example_argnums=1 needs an argument"),
        ({"example_argnums": 0}, lambda w: w, TypeError, "argument 0 is in argnums and"),
        ({"argnums": ()}, lambda w: w, ValueError, "no array to differentiate"),
        ({"example_argnums": "a"}, lambda w: w, TypeError, "example_argnums must be an integer"),
    ],
)
def test_errors_say_what_is_wrong(given, loss_fn, error, message):
    with pytest.raises(error, match=message):
        gdmam.value_and_weighed_grad(loss_fn, gdmam.mean_weighting, **given)(jnp.ones(3))


def test_weightings_are_checked():
    with pytest.raises(TypeError, match="weighting must be a function, got None"):
        gdmam.value_and_weighed_grad(losses, None)
    for function in (gdmam.value_and_weighed_grad, gdmam.nnx.value_and_weighed_grad):
        with pytest.raises(TypeError, match="needs one without a memory"):
            function(losses, gdmam.famo_weighting)
    weighting = gdmam.constant_weighting({"prediction": 1.0, "b": 2.0})
    with pytest.raises(TypeError, match="constant_weighting by name needs an optimizer"):
        gdmam.value_and_weighed_grad(lambda w: w, weighting)(jnp.ones(2))
    with pytest.raises(ValueError, match="weighting must return 5 weights"):
        gdmam.value_and_weighed_grad(losses, lambda gramian, norms: jnp.ones(3))(PARAMS)
    model = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
    with pytest.raises(TypeError, match=r"NNX module Linear; use the function.*gdmam_jax\.nnx"):
        gdmam.value_and_weighed_grad(losses, gdmam.mean_weighting)(model)


@pytest.mark.parametrize(
    "choices", [{}, {"chunk": 2}, {"example_argnums": 1}, {"example_argnums": 1, "chunk": 4}]
)
def test_arrays_sharded_over_explicit_axes_are_refused(choices):
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,))
    with jax.set_mesh(mesh):
        x = jax.device_put(jnp.ones((8, 3)), jax.P("data"))
        with pytest.raises(
            ValueError, match=r"sharded over explicit axes, got one over \['data'\]"
        ):
            jax.jit(
                gdmam.value_and_weighed_grad(
                    lambda w, x: (x @ w - 1) ** 2, gdmam.mean_weighting, **choices
                )
            )(jnp.ones(3), x)
