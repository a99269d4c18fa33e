"""Checkpoints: saved, restored and continued as if nothing had happened."""

import chex
import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx

import gdmam_jax as gdmam
import gdmam_jax.nnx
from tests.compatibility.harness import example_pairs, example_params

OPTIMIZERS = {
    "gdmam": gdmam.gdmam(optax.cosine_decay_schedule(0.1, 8), amsgrad=True),
    "gdmam_released": gdmam.gdmam_released(0.1),
    "allocate": optax.chain(gdmam.allocate(not_finite="skip_loss"), optax.adamw(0.1)),
    "scopes": gdmam.gdmam(0.1, scope=gdmam.leaf_scope, b2=None),
    "several losses": gdmam.gdmam(0.1, alignment_losses=("one", "two"), momenta="separate"),
    "skipping": gdmam.gdmam(0.1, not_finite="skip"),
    "bfloat16 momentum": gdmam.gdmam(0.1, mu_dtype=jnp.bfloat16),
    "multi_steps": gdmam.over_pairs(lambda tx: optax.MultiSteps(tx, 3), gdmam.gdmam(0.1)),
    "inject_hyperparams": optax.inject_hyperparams(gdmam.gdmam)(0.1),
    "partition": optax.partition(
        {"trunk": gdmam.gdmam(0.1), "head": gdmam.summed(optax.adam(0.1))},
        {"trunk": "trunk", "head": "head"},
    ),
}


def steps_of(optimizer):
    """A compiled run over stacked pairs, and a list with an entry for every time it is traced."""
    traces = []

    @jax.jit
    def run(carry, pairs):
        traces.append(None)

        def step(carry, pair):
            params, state = carry
            updates, state = optimizer.update(pair, state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, carry, pairs)[0]

    return run, traces


def save(path, tree):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, tree)


def restore(path, like):
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(path, like)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_save_restore_continue(name, tmp_path):
    """Bit for bit as without a stop, and without compiling again."""
    optimizer = OPTIMIZERS[name]
    run, traces = steps_of(optimizer)
    params, pairs = example_params(), example_pairs(steps=8)
    if name == "several losses":
        prediction, alignment = gdmam.unpair_gradients(pairs)
        pairs = gdmam.pair_gradients(prediction, {"one": alignment, "two": prediction})
    first, second = (
        jax.tree.map(lambda leaf, part=part: leaf[part], jax.device_get(pairs))
        for part in (slice(0, 4), slice(4, 8))
    )
    start = jax.device_put((params, optimizer.init(params)), jax.devices()[0])
    middle = run(start, first)
    save(tmp_path / "checkpoint", middle)
    # What a new process knows: shapes, from the optimizer and the parameters' shapes alone.
    like = jax.eval_shape(lambda params: (params, optimizer.init(params)), params)
    restored = restore(tmp_path / "checkpoint", like)
    assert jax.tree.structure(restored) == jax.tree.structure(middle)
    chex.assert_trees_all_equal(*jax.device_get((restored, middle)))
    chex.assert_trees_all_equal(run(restored, second), run(middle, second))
    assert len(traces) == run._cache_size() == 1
    report = gdmam.diagnostics(restored[1])
    chex.assert_trees_all_equal(report, gdmam.diagnostics(middle[1]))


def test_restore_onto_another_sharding(tmp_path):
    """Saved from a mesh of 8, continued on one of 2 by 2 and on one device."""
    optimizer = gdmam.gdmam(0.1, scope=gdmam.leaf_scope)
    run, _ = steps_of(optimizer)
    params = {"kernel": jnp.arange(32.0).reshape(8, 4) / 32, "bias": jnp.ones(4)}
    pairs = example_pairs(params, steps=4)

    def placed(like, mesh, axis):
        """Shardings: what is like a kernel over its first axis, all else everywhere."""
        return jax.tree.map(
            lambda leaf: jax.NamedSharding(mesh, jax.P(axis) if leaf.shape == (8, 4) else jax.P()),
            like,
        )

    like = jax.eval_shape(lambda params: (params, optimizer.init(params)), params)
    eight = jax.make_mesh((8,), ("x",))
    four = jax.make_mesh((2, 2), ("x", "y"), devices=jax.devices()[:4])
    start = jax.device_put((params, optimizer.init(params)), placed(like, eight, "x"))
    middle = run(start, pairs)
    save(tmp_path / "checkpoint", middle)
    expected = jax.device_get(run(middle, pairs))
    for shardings in (
        placed(like, four, ("y", "x")),
        jax.tree.map(lambda _: jax.sharding.SingleDeviceSharding(jax.devices()[0]), like),
    ):
        targets = jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            like,
            shardings,
        )
        restored = restore(tmp_path / "checkpoint", targets)
        assert jax.tree.map(lambda leaf: leaf.sharding, restored) == shardings
        chex.assert_trees_all_equal(jax.device_get(restored), jax.device_get(middle))
        # Sums over devices round differently; nothing else does.
        chex.assert_trees_all_close(jax.device_get(run(restored, pairs)), expected, rtol=1e-4)


def test_checkpoint_manager_of_an_nnx_model(tmp_path):
    """Model, random streams and optimizer together, over a manager that keeps the last steps."""

    class Model(nnx.Module):
        def __init__(self, rngs):
            self.linear = nnx.Linear(3, 2, rngs=rngs)
            self.dropout = nnx.Dropout(0.5, rngs=rngs)

        def __call__(self, x):
            return self.dropout(self.linear(x))

    def losses(model, x):
        output = model(x)
        return jnp.mean((output - 1) ** 2), jnp.mean(output**2)

    def create(seed):
        model = Model(nnx.Rngs(seed))
        return model, nnx.Optimizer(model, gdmam.gdmam(0.1), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, x):
        _, pairs = gdmam_jax.nnx.value_and_paired_grad(losses)(model, x)
        optimizer.update(model, pairs)

    def arrays(nodes):
        """Keys as numbers, which every checkpoint handler knows."""
        return jax.tree.map(
            lambda leaf: (
                jax.random.key_data(leaf)
                if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
                else leaf
            ),
            nnx.to_pure_dict(nnx.state(nodes)),
        )

    x = jax.random.normal(jax.random.key(0), (5, 3))
    trained = create(0)
    for _ in range(3):
        step(*trained, x)
    with ocp.CheckpointManager(
        tmp_path / "run", options=ocp.CheckpointManagerOptions(max_to_keep=1)
    ) as manager:
        manager.save(3, args=ocp.args.StandardSave(arrays(trained)))
        manager.wait_until_finished()
        fresh = create(1)
        found = manager.restore(manager.latest_step(), args=ocp.args.StandardRestore(arrays(fresh)))
    state = nnx.state(fresh)
    nnx.replace_by_pure_dict(
        state,
        jax.tree.map(
            lambda old, new: (
                jax.random.wrap_key_data(new)
                if jax.dtypes.issubdtype(old.dtype, jax.dtypes.prng_key)
                else new
            ),
            nnx.to_pure_dict(state),
            found,
        ),
    )
    nnx.update(fresh, state)
    for nodes in (trained, fresh):
        step(*nodes, x)
    chex.assert_trees_all_equal(arrays(trained), arrays(fresh))
