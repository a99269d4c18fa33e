"""The two gradients of an NNX model, and its state after them."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import gdmam_jax as gdmam
from gdmam_jax.nnx import value_and_paired_grad
from tests.conftest import skipped_under, skipped_under_strict_promotion


class Model(nnx.Module):
    """A bit of everything that has state: batch statistics, dropout, a counter, a frozen layer."""

    def __init__(self, rngs: nnx.Rngs):
        self.hidden = nnx.Linear(3, 8, rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.out = nnx.LoRALinear(8, 2, lora_rank=2, rngs=rngs)
        self.calls = nnx.Variable(jnp.array(0))

    def __call__(self, x):
        self.calls[...] += 1
        hidden = self.dropout(nnx.relu(self.norm(self.hidden(x))))
        self.sow(nnx.Intermediate, "features", hidden)
        return self.out(hidden)


def losses_and_sown(model, batch, rngs=None):
    noise = 0.0 if rngs is None else 0.1 * jax.random.normal(rngs.noise(), batch["y"].shape)
    output, sown = nnx.capture(model, nnx.Intermediate)(batch["x"])
    prediction = jnp.mean((output + noise - batch["y"]) ** 2)
    return (prediction, jnp.mean(sown["features"][0] ** 2)), sown


def losses(model, batch, rngs=None):
    return losses_and_sown(model, batch, rngs)[0]


def plain_losses(model, batch):
    output = model(batch["x"])
    return jnp.mean((output - batch["y"]) ** 2), jnp.mean(output**2)


def arrays(node):
    """The state of an NNX object as plain arrays, random keys as their numbers."""

    def plain(leaf):
        is_key = jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        return jax.random.key_data(leaf) if is_key else leaf

    return jax.tree.map(plain, nnx.as_pure(nnx.state(node)))


@pytest.fixture
def batch():
    key = jax.random.key(0)
    return {"x": jax.random.normal(key, (16, 3), "float32"), "y": np.ones((16, 2), np.float32)}


@pytest.fixture
def model():
    return Model(nnx.Rngs(0, dropout=1))


def eager(function):
    return function


def pure_jit(function):
    """Runs ``function(model, batch, rngs)`` under `jax.jit`, split and merged by hand."""

    @jax.jit
    def compiled(graphdef, state, batch):
        model, rngs = nnx.merge(graphdef, state)
        result = function(model, batch, rngs)
        return result, nnx.state((model, rngs))

    def wrapped(model, batch, rngs):
        result, state = compiled(*nnx.split((model, rngs)), batch)
        nnx.update((model, rngs), state)
        return result

    return wrapped


@pytest.mark.parametrize("compiler", [eager, nnx.jit, pure_jit])
def test_state_advances_as_in_one_forward_pass(model, batch, compiler):
    rngs = nnx.Rngs(noise=2)
    plain_model, plain_rngs = nnx.clone(model), nnx.clone(rngs)
    step = compiler(value_and_paired_grad(losses_and_sown, has_aux=True))
    forward = compiler(losses_and_sown)
    for _ in range(2):
        found, _ = step(model, batch, rngs)
        expected = forward(plain_model, batch, plain_rngs)
        # Losses and intermediates, then every variable: keys, counters, statistics, parameters.
        chex.assert_trees_all_close(found, expected, rtol=1e-6)
        chex.assert_trees_all_close(
            arrays((model, rngs)), arrays((plain_model, plain_rngs)), rtol=1e-6
        )
    assert model.calls[...] == 2
    assert rngs.noise.count[...] == 2
    assert model.dropout.rngs.count[...] == 2


def test_gradients_are_those_of_each_loss(model, batch):
    copies = [nnx.clone(model) for _ in range(2)]
    _, pairs = value_and_paired_grad(losses_and_sown, has_aux=True)(model, batch)
    for index, (copy, found) in enumerate(zip(copies, gdmam.unpair_gradients(pairs), strict=True)):
        expected = nnx.grad(lambda model, index=index: losses_and_sown(model, batch)[0][index])(
            copy
        )
        chex.assert_trees_all_close(nnx.as_pure(found), nnx.as_pure(expected), rtol=1e-5, atol=1e-7)
        assert max(np.max(np.abs(leaf)) for leaf in jax.tree.leaves(found)) > 0.01


def test_structure_changes_are_kept(batch):
    """Attributes that the loss function adds, replaces or removes end as after a forward pass."""

    class Changing(nnx.Module):
        def __init__(self, rngs):
            self.linear = nnx.Linear(3, 2, rngs=rngs)
            self.last = nnx.Intermediate(jnp.zeros(1))
            self.mode = "before"

        def __call__(self, x):
            if hasattr(self, "last"):
                nnx.pop(self, nnx.Intermediate)
            self.mode = "after"
            self.seen = nnx.Cache(jnp.sum(x))
            return self.linear(x)

    model = Changing(nnx.Rngs(0))
    linear = model.linear
    value_and_paired_grad(plain_losses)(model, batch)
    assert model.linear is linear
    assert model.mode == "after"
    assert not hasattr(model, "last")
    assert model.seen[...] == jnp.sum(batch["x"])


@pytest.mark.parametrize("wrt", [nnx.LoRAParam, nnx.PathContains("lora")])
def test_wrt_differentiates_and_trains_only_what_it_chooses(model, batch, wrt):
    frozen = jax.tree.map(np.array, nnx.state(model, nnx.All(nnx.Param, nnx.Not(wrt))))
    optimizer = nnx.Optimizer(model, gdmam.gdmam(0.1), wrt=wrt)
    before = jax.tree.map(np.array, nnx.state(model, wrt))
    _, pairs = value_and_paired_grad(losses, wrt=wrt)(model, batch)
    assert jax.tree.structure(nnx.as_pure(pairs)) == jax.tree.structure(
        jax.tree.map(lambda leaf: gdmam.GradientPair(leaf, leaf), nnx.as_pure(before))
    )
    nnx.jit(nnx.Optimizer.update)(optimizer, model, pairs)
    assert set(nnx.to_pure_dict(before)) == {"out"}
    chex.assert_trees_all_equal(nnx.state(model, nnx.All(nnx.Param, nnx.Not(wrt))), frozen)
    # LoRA's second factor starts at zero, so only that one has a gradient at the first step.
    assert np.any(model.out.lora.lora_b[...] != before["out"]["lora"]["lora_b"][...])


def test_several_arguments_in_any_order(model, batch):
    head = nnx.Linear(2, 2, rngs=nnx.Rngs(3))

    def two_losses(head, batch, model, scale):
        output = head(model.out(model.hidden(batch["x"]))) * scale
        return jnp.mean((output - batch["y"]) ** 2), jnp.mean(model.hidden.kernel[...] ** 2)

    _, (of_model, of_head) = value_and_paired_grad(two_losses, argnums=(-2, 0))(
        head, batch, model, 2.0
    )
    expected = nnx.grad(lambda *args: two_losses(*args)[0], argnums=(2, 0))(head, batch, model, 2.0)
    found = [gdmam.unpair_gradients(pairs)[0] for pairs in (of_model, of_head)]
    chex.assert_trees_all_close(nnx.as_pure(found), nnx.as_pure(list(expected)), rtol=1e-5)
    alignment_of_head = jax.tree.leaves(gdmam.unpair_gradients(of_head)[1])
    assert all(np.all(np.asarray(leaf) == 0) for leaf in alignment_of_head)


def test_variables_and_containers_of_modules_are_arguments_too(batch):
    weight = nnx.Param(jnp.ones(3))
    models = {"a": nnx.Linear(3, 2, rngs=nnx.Rngs(0)), "b": nnx.Linear(3, 2, rngs=nnx.Rngs(1))}

    def two_losses(weight, models):
        x = batch["x"] * weight[...][None]
        return jnp.mean(models["a"](x) ** 2), jnp.mean(models["b"](x) ** 2)

    _, (of_weight, of_models) = value_and_paired_grad(two_losses, argnums=(0, 1))(weight, models)
    assert of_weight.get_value().prediction.shape == (3,)
    a, b = (jax.device_get(of_models[name]["kernel"].get_value()) for name in "ab")
    assert np.any(a.prediction != 0)
    assert not np.any(a.alignment != 0)
    assert np.any(b.alignment != 0)


def test_references_shared_between_arguments_stay_shared(batch):
    rngs = nnx.Rngs(0)
    model = nnx.Dropout(0.5, rngs=rngs)

    def two_losses(weight, dropout, rngs):
        value = jnp.sum(dropout(batch["x"], rngs=rngs) @ weight[...])
        return value, rngs.noise() is not None and value**2

    weight = nnx.Param(jnp.ones(3))
    before = int(rngs.default.count[...])
    value_and_paired_grad(two_losses)(weight, model, rngs)
    assert rngs.default.count[...] == before + 2


def test_modules_and_variables_in_aux_are_the_same_objects(batch):
    """As with `nnx.value_and_grad`; what is not a module comes as it is."""

    def two_losses(model, x):
        total = jnp.sum(model(x))
        aux = {"model": model, "kernel": model.kernel, "total": total, "name": "linear"}
        return (total, total**2), aux

    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    (losses, aux), _ = value_and_paired_grad(two_losses, has_aux=True)(model, batch["x"])
    assert aux["model"] is model
    assert aux["kernel"] is model.kernel
    assert aux["total"] == losses[0]
    assert aux["name"] == "linear"


@skipped_under_strict_promotion("a metric of Flax")
def test_metrics_in_the_loss_function(model, batch):
    metric = nnx.metrics.Average()

    def counted(model, batch, *, metric):
        prediction, alignment = losses(model, batch)
        metric.update(values=prediction)
        return prediction, alignment

    (first, _), _ = value_and_paired_grad(counted)(model, batch, metric=metric)
    (second, _), _ = value_and_paired_grad(counted)(model, batch, metric=metric)
    assert metric.count[...] == 2
    np.testing.assert_allclose(metric.compute(), (first + second) / 2, rtol=1e-6)


@skipped_under("jax_disable_jit", "compiles nothing")
@pytest.mark.parametrize("graph", [True, False])
def test_training_learns_and_compiles_once(batch, graph):
    class Small(nnx.Module):
        def __init__(self, rngs):
            self.hidden = nnx.Linear(3, 8, rngs=rngs)
            self.norm = nnx.BatchNorm(8, rngs=rngs)
            self.dropout = nnx.Dropout(0.1, rngs=rngs.fork())
            self.out = nnx.Linear(8, 2, rngs=rngs)

        def __call__(self, x):
            return self.out(self.dropout(nnx.relu(self.norm(self.hidden(x)))))

    with nnx.set_graph_mode(graph):
        model = Small(nnx.Rngs(0))
        optimizer = nnx.Optimizer(model, gdmam.gdmam(0.05), wrt=nnx.Param)
        traces = []

        @nnx.jit
        def step(model, optimizer, batch):
            traces.append(None)
            values, pairs = value_and_paired_grad(plain_losses)(model, batch)
            optimizer.update(model, pairs)
            return values

        structure = jax.tree.structure(nnx.state(optimizer))
        types = jax.tree.map(jax.typeof, nnx.state(optimizer))
        first = step(model, optimizer, batch)
        for _ in range(60):
            last = step(model, optimizer, batch)
    assert len(traces) == 1
    assert jax.tree.structure(nnx.state(optimizer)) == structure
    assert jax.tree.map(jax.typeof, nnx.state(optimizer)) == types
    assert last[0] < 0.3 * first[0]
    assert gdmam.diagnostics(nnx.as_pure(optimizer.opt_state))["prediction_norm"] > 0


def test_ordinary_optimizer_through_summed_is_nnx_grad_of_the_sum(model, batch):
    plain = nnx.clone(model)
    optimizer = nnx.Optimizer(model, gdmam.summed(optax.sgd(0.1)), wrt=nnx.Param)
    plain_optimizer = nnx.Optimizer(plain, optax.sgd(0.1), wrt=nnx.Param)
    for _ in range(3):
        _, pairs = value_and_paired_grad(losses)(model, batch)
        optimizer.update(model, pairs)
        plain_optimizer.update(plain, nnx.grad(lambda model: sum(losses(model, batch)))(plain))
    chex.assert_trees_all_close(arrays(model), arrays(plain), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"wrt": nnx.Cache}, "argument 0 holds no variable that wrt=.*Cache"),
        ({"argnums": 1}, "argument 1 holds no variable that wrt=.*Param.*, or only those of an"),
        ({"argnums": 5}, "argnums=5 needs an argument at position 5, but 2"),
        (
            {"wrt": nnx.RngCount},
            r"argument 0 of the loss function, at dropout/rngs/count.* has dtype uint32",
        ),
        ({"has_aux": True}, r"must return \(losses, aux\), got list"),
    ],
)
def test_errors_say_what_is_wrong(model, batch, kwargs, message):
    def one_loss(model, batch):
        return [jnp.mean(model.hidden(batch["x"])), 1.0]

    with pytest.raises(TypeError, match=message):
        value_and_paired_grad(one_loss, **kwargs)(model, batch)


def test_state_is_untouched_after_an_error(model, batch):
    before = jax.tree.map(jnp.copy, nnx.state(model))

    def broken(model, batch):
        model.norm(model.hidden(batch["x"]))
        model.calls[...] += 1
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        value_and_paired_grad(broken)(model, batch)
    chex.assert_trees_all_equal(nnx.state(model), before)
    assert model.calls[...] == 0
