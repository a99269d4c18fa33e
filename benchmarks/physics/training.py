"""Training one network for every learning rate and seed, all in one compiled program."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import gdmam_jax as gdmam
from benchmarks.physics.equations import Equation
from benchmarks.physics.methods import DATA_FIRST, METHODS, MOMENTUM_CONFIG, Rate

WARM_UP = 100
"""Steps over which the learning rate climbs to its peak; after them it follows half a cosine."""


class Scale(NamedTuple):
    """How large networks, point sets and budgets are."""

    width: int = 32
    depth: int = 4
    residual_points: int = 200
    data_points: int = 100
    steps: int = 5000
    records: int = 25


SMALL = Scale()
PAPER = Scale(width=50, depth=5, residual_points=1000, data_points=500, steps=100_000, records=100)


class Curves(NamedTuple):
    """What training left: relative errors and cosines over time, shape ``(runs, records)``."""

    errors: np.ndarray
    cosines: np.ndarray


def init(key: jax.Array, sizes: list[int]) -> list[dict[str, jax.Array]]:
    """Glorot-normal layers without biases at first."""
    keys = jax.random.split(key, len(sizes) - 1)
    normal = jax.nn.initializers.glorot_normal()
    return [
        {"kernel": normal(key, (rows, columns)), "bias": jnp.zeros(columns)}
        for key, rows, columns in zip(keys, sizes[:-1], sizes[1:], strict=True)
    ]


def network(params: Any, equation: Equation, points: jax.Array) -> jax.Array:
    """Hyperbolic tangents over inputs scaled to [-1, 1]."""
    lower, upper = jnp.array(equation.lower), jnp.array(equation.upper)
    hidden = 2 * (points - lower) / (upper - lower) - 1
    for layer in params[:-1]:
        hidden = jnp.tanh(hidden @ layer["kernel"] + layer["bias"])
    return hidden @ params[-1]["kernel"] + params[-1]["bias"]


def train(equation: Equation, method: str, rates: Any, seeds: Any, scale: Scale = SMALL) -> Curves:
    """Trains one network for each pair of learning rate and seed.

    Args:
        equation: which.
        method: a name in `METHODS`, `DATA_FIRST` or `MOMENTUM_CONFIG`.
        rates: peak learning rates, shape ``(runs,)``.
        seeds: of parameters and points, shape ``(runs,)``.
        scale: sizes.

    Returns:
        Relative errors in the root mean square against the reference, and cosines of the two
        gradients, every ``steps / records`` steps.
    """
    program = _program(equation, method, scale)
    curves = program(jnp.asarray(rates, jnp.float32), jnp.asarray(seeds, jnp.uint32))
    return Curves(*(np.asarray(each, np.float64) for each in curves))


@functools.cache
def _program(equation: Equation, method: str, scale: Scale) -> Any:
    sizes = [len(equation.lower), *[scale.width] * scale.depth, equation.outputs]
    points, solution = (jnp.asarray(array, jnp.float32) for array in equation.reference)
    every = scale.steps // scale.records

    def losses(params: Any, sample: Any) -> tuple[jax.Array, jax.Array]:
        found = equation.losses(lambda x: network(params, equation, x), sample)
        residual = found.pop("residual")
        data = sum(found.values())
        return (data, residual) if method == DATA_FIRST else (residual, data)

    def run(rate: jax.Array, seed: jax.Array) -> tuple[jax.Array, jax.Array]:
        peak = optax.schedules.warmup_cosine_decay_schedule(0.0, 1.0, WARM_UP, scale.steps)
        start, step = _stepper(method, lambda count: rate * peak(count), losses)
        keys = jax.random.split(jax.random.key(seed))
        params = init(keys[0], sizes)

        def advance(carry: Any, key: jax.Array) -> tuple[Any, jax.Array]:
            sample = equation.sample(key, scale.residual_points, scale.data_points)
            return step(carry, sample)

        def record(carry: Any, key: jax.Array) -> tuple[Any, tuple[jax.Array, jax.Array]]:
            carry, cosines = jax.lax.scan(advance, carry, jax.random.split(key, every))
            wrong = network(carry[0], equation, points) - solution
            error = jnp.linalg.norm(wrong) / jnp.linalg.norm(solution)
            return carry, (error, jnp.mean(cosines))

        keys = jax.random.split(keys[1], scale.records)
        return jax.lax.scan(record, (params, start(params)), keys)[1]

    return jax.jit(jax.vmap(run))


def _stepper(method: str, rate: Rate, losses: Callable[..., Any]) -> tuple[Any, Any]:
    """How a method starts, and its step ``(carry, sample) -> (carry, cosine)``."""
    if method == MOMENTUM_CONFIG:
        return _momentum_config(rate, losses)
    optimizer = METHODS["gdmam" if method == DATA_FIRST else method](rate)

    def step(carry: Any, sample: Any) -> tuple[Any, jax.Array]:
        params, state = carry
        _, pairs = gdmam.value_and_paired_grad(losses)(params, sample)
        updates, state = optimizer.update(pairs, state, params)
        return (optax.apply_updates(params, updates), state), gdmam.decompose(pairs).geometry.cosine

    return optimizer.init, step


def _momentum_config(rate: Rate, losses: Callable[..., Any]) -> tuple[Any, Any]:
    """M-ConFIG: each loss's gradient is evaluated in turn, and ConFIG combines their momenta.

    A step here evaluates both once, one after the other with an update after each, so that every
    method has the same number of gradients. The second moment follows the gradient that would
    have made the combined momentum. After Liu, Chu and Thuerey, ICLR 2025; not yet checked
    against their own code.
    """
    b1, b2, eps = 0.9, 0.999, 1e-8

    def start(params: Any) -> Any:
        zeros = jax.tree.map(jnp.zeros_like, params)
        return {"count": 0, "momenta": (zeros, zeros), "combined": zeros, "second": zeros}

    def substep(which: int, params: Any, state: Any, sample: Any) -> tuple[Any, Any]:
        gradient = jax.grad(lambda params: losses(params, sample)[which])(params)
        count = state["count"] + 1
        momenta = list(state["momenta"])
        momenta[which] = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, momenta[which], gradient)
        # Of two losses in turn, each has been seen in every second update.
        seen = [(count + 1 - loss) // 2 for loss in range(2)]
        known = [
            jax.tree.map(lambda m, n=n: m / jnp.maximum(1 - b1**n, 1e-8), momentum)
            for momentum, n in zip(momenta, seen, strict=True)
        ]
        norms = [optax.tree.norm(tree) + 1e-12 for tree in known]
        mean = 0.5 * (norms[0] + norms[1])
        direction = jax.tree.map(lambda a, b: mean * (a / norms[0] + b / norms[1]), *known)
        combined = jax.tree.map(lambda d: d * (1 - b1**count), direction)
        implied = jax.tree.map(
            lambda new, old: (new - b1 * old) / (1 - b1), combined, state["combined"]
        )
        second = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * g**2, state["second"], implied)
        scale = rate(count // 2)
        params = jax.tree.map(
            lambda p, d, v: p - scale * d / (jnp.sqrt(v / (1 - b2**count)) + eps),
            params,
            direction,
            second,
        )
        momenta_pair = (momenta[0], momenta[1])
        return params, {
            "count": count, "momenta": momenta_pair, "combined": combined, "second": second
        }  # fmt: skip

    def step(carry: Any, sample: Any) -> tuple[Any, jax.Array]:
        for which in range(2):
            carry = substep(which, *carry, sample)
        return carry, jnp.zeros(())

    return start, step
