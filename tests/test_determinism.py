"""The same seed, device and versions give the same bits: the lines of docs/determinism.md."""

import functools
import hashlib
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import gdmam_jax as gdmam

OPTIMIZERS = {
    "gdmam": lambda: gdmam.gdmam(1e-2),
    "gdmam_released": lambda: gdmam.gdmam_released(1e-2),
    "allocate": lambda: optax.chain(gdmam.allocate(), optax.adamw(1e-2)),
}
# Few programs, and those without what makes them fast: compilation is all the time there is.
compiled = functools.partial(
    jax.jit,
    compiler_options={
        "xla_backend_optimization_level": 0,
        "xla_llvm_disable_expensive_passes": True,
    },
)
RANDOM = np.random.default_rng(0)
PARAMS = {
    "w": RANDOM.normal(size=(8, 4)).astype("float32"),
    "b": RANDOM.normal(size=4).astype("float32"),
}
BATCHES = RANDOM.normal(size=(6, 16, 8)).astype("float32")


def losses(params, x):
    hidden = jnp.tanh(x @ params["w"]) + params["b"]
    return jnp.mean((hidden - 1) ** 2), jnp.mean(hidden**2 * x[:, :1])


def step(optimizer, params, state, x):
    _, pairs = gdmam.value_and_paired_grad(losses)(params, x)
    updates, state = optimizer.update(pairs, state, params)
    return jax.tree.map(jnp.add, params, updates), state


def train(name, params, batches):
    """From parameters through all batches to parameters and state."""
    optimizer = OPTIMIZERS[name]()

    def body(carry, x):
        return step(optimizer, *carry, x), None

    return jax.lax.scan(body, (params, optimizer.init(params)), batches)[0]


@functools.cache
def training(name):
    return compiled(functools.partial(train, name))


def digest(tree):
    """A hash of every bit of a tree."""
    total = hashlib.sha256()
    for leaf in jax.tree.leaves(tree):
        total.update(np.asarray(leaf).tobytes())
    return total.hexdigest()


def assert_close(found, expected):
    for left, right in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(left, right, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_run_to_run(name):
    first = digest(training(name)(PARAMS, BATCHES))
    assert digest(training(name)(PARAMS, BATCHES)) == first
    # The hash sees a small change of one number.
    others = BATCHES.copy()
    others[0, 0, 0] += 1e-3
    assert digest(training(name)(PARAMS, others)) != first


def test_process_to_process():
    program = (
        "from tests.test_determinism import *\nprint(digest(training('gdmam')(PARAMS, BATCHES)))"
    )
    # Another seed of Python's own hashes, one device where there are eight here, compiled again.
    environment = os.environ | {"PYTHONHASHSEED": "7", "JAX_ENABLE_COMPILATION_CACHE": "false"}
    result = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == digest(training("gdmam")(PARAMS, BATCHES))


def test_order_of_keys_does_not_matter():
    """The program is the same, though it is made from the dictionaries as they are written."""

    def program(params):
        # As an argument of a compiled function, a dictionary would come in the order of its keys.
        optimizer = OPTIMIZERS["gdmam"]()
        once = jax.jit(lambda x: step(optimizer, params, optimizer.init(params), x))
        return once.lower(BATCHES[0]).as_text()

    turned = dict(reversed(PARAMS.items()))
    assert list(turned) != list(PARAMS)
    assert program(turned) == program(PARAMS)


def test_stop_and_continue_and_one_program_for_all_steps():
    optimizer = OPTIMIZERS["gdmam"]()
    once = compiled(functools.partial(step, optimizer))
    states = [(PARAMS, optimizer.init(jax.tree.map(jnp.asarray, PARAMS)))]
    for x in BATCHES:
        states.append(once(*states[-1], x))
    # Stopped after two steps, everything written and read again.
    stopped, structure = jax.tree.flatten(states[2])
    read = [np.frombuffer(leaf.tobytes(), leaf.dtype) for leaf in map(np.asarray, stopped)]
    read = [new.reshape(old.shape) for new, old in zip(read, stopped, strict=True)]
    continued = structure.unflatten(read)
    for x in BATCHES[2:]:
        continued = once(*continued, x)
    assert digest(continued) == digest(states[-1])
    # Another program is close, and no more is promised.
    assert_close(states[-1], training("gdmam")(PARAMS, BATCHES))


def test_replicas_are_the_same_and_other_device_counts_close():
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    whole, split = NamedSharding(mesh, P()), NamedSharding(mesh, P(None, "data"))
    sharded = compiled(
        functools.partial(train, "gdmam"), in_shardings=(whole, split), out_shardings=whole
    )
    result = sharded(PARAMS, BATCHES)
    for leaf in jax.tree.leaves(result):
        copies = {np.asarray(shard.data).tobytes() for shard in leaf.addressable_shards}
        assert len(leaf.addressable_shards) == 4
        assert len(copies) == 1
    assert_close(result, training("gdmam")(PARAMS, BATCHES))
