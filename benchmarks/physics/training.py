"""Training one network for every learning rate and seed, all in one compiled program."""

import functools
import itertools
from collections.abc import Callable
from math import comb
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree

import gdmam_jax as gdmam
from benchmarks.physics.equations import Along, Equation, Network
from benchmarks.physics.methods import (
    METHODS,
    MOMENTUM_CONFIG,
    RESIDUAL_FIRST,
    Method,
    Rate,
    gradients,
    momentum_config,
)
from benchmarks.physics.quasi_newton import FIXED, PLANS, minimise

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


Layers = list[dict[str, jax.Array]]
"""Kernels and biases, as optimizers that know of matrices want them."""


def init(key: jax.Array, sizes: list[int]) -> Layers:
    """Glorot-normal layers without biases at first."""
    deviations = [
        np.repeat([np.sqrt(2 / (rows + columns)), 0], [rows * columns, columns])
        for rows, columns in itertools.pairwise(sizes)
    ]
    flat = np.concatenate(deviations).astype(np.float32)
    flat = flat * jax.random.normal(key, flat.shape)
    shapes = [(rows + 1, columns) for rows, columns in itertools.pairwise(sizes)]
    parts = jnp.split(flat, np.cumsum([np.prod(shape) for shape in shapes])[:-1])
    layers = [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]
    return [{"kernel": layer[:-1], "bias": layer[-1]} for layer in layers]


def network(params: Layers, equation: Equation) -> Network:
    r"""Hyperbolic tangents over inputs scaled to [-1, 1], with their derivatives.

    Derivatives go through the layers beside the values, all axes' of one order in one array. With
    $y = \tanh z$ and $s = 1 - y^2$, so that $y_1 = s z_1$, Leibniz' rule gives
    $y_n = \sum_k \binom{n - 1}{k} s_k z_{n - k}$ and $s_n = -\sum_k \binom{n}{k} y_k y_{n - k}$.

    Args:
      params: of `init`.
      equation: whose domain the points lie in.

    Returns:
      A function ``(points, orders) -> along``.
    """
    lower, upper = np.array(equation.lower), np.array(equation.upper)

    def along(points: jax.Array, orders: tuple[int, ...]) -> Along:
        axes = sorted(range(len(orders)), key=lambda axis: -orders[axis])
        counts = [sum(order >= k for order in orders) for k in range(1, max(orders) + 1)]
        scale = 2 / (upper - lower)
        # Before the first layer derivatives are the same at all points.
        slopes = np.diag(scale)[axes, None].astype(points.dtype)
        z = [(scale * (points - lower) - 1).astype(points.dtype)]
        z += [slopes[:count] * (k == 0) for k, count in enumerate(counts)]
        for number, layer in enumerate(params):
            z = [each @ layer["kernel"] for each in z]
            z[0] += layer["bias"]
            if number < len(params) - 1:
                z = _tanh(z, counts)
        return [
            [z[0], *(z[k][axes.index(axis)] for k in range(1, order + 1))]
            for axis, order in enumerate(orders)
        ]

    return along


def _tanh(z: list[jax.Array], counts: list[int]) -> list[jax.Array]:
    """The hyperbolic tangent of a value and of its derivatives, one array for each order."""
    y = [jnp.tanh(z[0])]
    s = [1 - y[0] ** 2]
    for n, count in enumerate(counts, 1):

        def first(terms: list[jax.Array], k: int, count: int = count) -> jax.Array:
            """What belongs to the axes that have this order, which come first."""
            return terms[k] if k == 0 else terms[k][:count]

        y.append(sum(comb(n - 1, k) * first(s, k) * first(z, n - k) for k in range(n)))
        s.append(-sum(comb(n, k) * first(y, k) * first(y, n - k) for k in range(n + 1)))
    return y


def train(
    equation: Equation,
    method: str | Method,
    rates: Any,
    seeds: Any,
    scale: Scale = SMALL,
    losses: int = 2,
) -> Curves:
    """Trains one network for each pair of learning rate and seed.

    Args:
      equation: which.
      method: a name in `ALL_METHODS`, or one of your own.
      rates: peak learning rates, shape ``(runs,)``.
      seeds: of parameters and points, shape ``(runs,)``.
      scale: sizes.
      losses: 2, residual and data, or 3, residual, boundary and initial.

    Returns:
      Relative errors in the root mean square against the reference, and cosines of the
      prediction gradient and the sum of the others, every ``steps / records`` steps.
    """
    # A quasi-Newton method tells apart what float32 cannot.
    with jax.enable_x64(method in PLANS):
        seeds = jnp.asarray(seeds, jnp.uint32)
        starts = _start(tuple(layer_sizes(equation, scale)), scale, seeds)
        program = _program(equation, method, scale, losses)
        curves = program(jnp.asarray(rates, jnp.float32), *starts)
        return Curves(*(np.asarray(each, np.float64) for each in curves))


def layer_sizes(equation: Equation, scale: Scale) -> list[int]:
    """Inputs, hidden layers and outputs of the network."""
    return [len(equation.lower), *[scale.width] * scale.depth, equation.outputs]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _start(sizes: tuple[int, ...], scale: Scale, seeds: jax.Array) -> tuple[Layers, jax.Array]:
    """Parameters and the keys of all steps, for each seed.

    A program of its own: random bits are long to compile, and all methods share these.
    """
    shape = scale.records, scale.steps // scale.records

    def start(seed: jax.Array) -> tuple[Layers, jax.Array]:
        first, second = jax.random.split(jax.random.key(seed))
        return init(first, list(sizes)), jax.random.split(second, shape)

    return jax.vmap(start)(seeds)


def objective(
    equation: Equation, method: str | Method, scale: Scale, losses: int
) -> Callable[[Layers, Any], tuple[jax.Array, Any]]:
    """The losses as a method takes them: ``(params, sample) -> (prediction, alignment)``."""
    if losses not in (2, 3) or (losses == 3 and not equation.timed):
        raise ValueError(
            f"{losses} losses are not to be had of {equation.name}: there are 2, or 3 where there "
            "is time"
        )
    first = _prediction(method, losses)

    def both(params: Layers, sample: Any) -> tuple[jax.Array, Any]:
        found = equation.losses(network(params, equation), sample)
        if losses == 2:
            found = {"residual": found.pop("residual"), "data": sum(found.values())}
        prediction = found.pop(first)
        return prediction, found if losses == 3 else sum(found.values())

    return both


def _prediction(method: str | Method, losses: int) -> str:
    """The loss that is the prediction; of three the initial condition, which picks a solution."""
    # M-ConFIG, which takes one loss after the other, begins with the residual.
    if isinstance(method, str) and (method == MOMENTUM_CONFIG or method.endswith(RESIDUAL_FIRST)):
        return "residual"
    return "data" if losses == 2 else "initial"


@functools.cache
def _program(equation: Equation, method: str | Method, scale: Scale, losses: int) -> Any:
    points, solution = (jnp.asarray(array, float) for array in equation.reference)
    both = objective(equation, method, scale, losses)
    plan = PLANS.get(method)
    beginning = method if plan is None else plan.first

    def error(params: Layers) -> jax.Array:
        learned = network(params, equation)(points, (0,) * points.shape[1])[0][0]
        return jnp.linalg.norm(learned - solution) / jnp.linalg.norm(solution)

    def trained(rate: jax.Array, params: Layers, keys: jax.Array) -> tuple[Any, Curves]:
        peak = optax.schedules.warmup_cosine_decay_schedule(
            0.0, 1.0, min(WARM_UP, keys.size // 2), keys.size
        )
        start, step = stepper(beginning, lambda count: rate * peak(count), both, losses)

        def advance(carry: Any, key: jax.Array) -> tuple[Any, jax.Array]:
            sample = equation.sample(key, scale.residual_points, scale.data_points)
            return step(carry, sample)

        def record(carry: Any, keys: jax.Array) -> tuple[Any, Curves]:
            carry, cosines = jax.lax.scan(advance, carry, keys)
            return carry, Curves(error(carry[0]), jnp.mean(cosines))

        return jax.lax.scan(record, (params, start(params)), keys)

    def finished(params: Layers, weights: jax.Array, key: jax.Array, records: int) -> Curves:
        sample = equation.sample(key, FIXED * scale.residual_points, FIXED * scale.data_points)
        flat, unravel = ravel_pytree(params)

        def loss(flat: jax.Array) -> jax.Array:
            return weights @ jnp.stack(jax.tree.leaves(both(unravel(flat), sample)))

        every = scale.steps // scale.records // FIXED
        errors = minimise(
            plan.solver, loss, flat, every, records, lambda flat: error(unravel(flat))
        )
        return Curves(errors, jnp.zeros_like(errors))

    def run(rate: jax.Array, params: Layers, keys: jax.Array) -> Curves:
        if beginning is None:
            return finished(params, jnp.ones(losses), keys[0, 0], scale.records)
        before = scale.records // 2
        (params, state), first = trained(rate, params, keys[:before])
        last = gdmam.diagnostics(state)
        # In the order of the losses' leaves; those of several alignment losses have their names.
        others = [last[key] for key in sorted(last) if key.startswith("alignment_weight")]
        weights = jnp.stack([last["prediction_weight"], *others])
        second = finished(params, weights, keys[-1, -1], scale.records - before)
        return jax.tree.map(lambda *parts: jnp.concatenate(parts), first, second)

    if plan is None:
        return jax.jit(jax.vmap(lambda *each: trained(*each)[1]))
    # One run after the other: their line searches are of different lengths.
    return jax.jit(lambda *starts: jax.lax.map(lambda each: run(*each), starts))


def stepper(
    method: str | Method, rate: Rate, objective: Callable[..., Any], losses: int
) -> tuple[Callable[[Layers], Any], Callable[..., Any]]:
    """How a method starts, and its step ``(carry, sample) -> (carry, cosine)``.

    Args:
      method: a name in `ALL_METHODS`, or one of your own.
      rate: the learning rate, a function of the step.
      objective: ``(params, sample) -> (prediction, alignment)``, see `objective`.
      losses: how many there are.

    Returns:
      ``(start, step)``; the carry is ``(params, start(params))`` at first.
    """
    if method == MOMENTUM_CONFIG:
        return _in_turn(rate, objective, losses)
    make = method if callable(method) else METHODS[method.removesuffix(RESIDUAL_FIRST)]
    parts = ["boundary", "initial", "residual"]
    parts.remove(_prediction(method, 3))
    optimizer = optax.with_extra_args_support(make(rate, None if losses == 2 else tuple(parts)))

    def step(carry: Any, sample: Any) -> tuple[Any, jax.Array]:
        params, state = carry
        values, pairs = gdmam.value_and_paired_grad(objective)(params, sample)
        updates, state = optimizer.update(pairs, state, params, value=values)
        return (optax.apply_updates(params, updates), state), _cosine(pairs)

    return optimizer.init, step


def _cosine(pairs: Any) -> jax.Array:
    """Of the prediction gradient and the sum of the others."""
    prediction, *others = gradients(pairs)
    alignment = [sum(each) for each in zip(*others, strict=True)]
    norms = optax.tree.norm(prediction) * optax.tree.norm(alignment)
    return optax.tree.vdot(prediction, alignment) / jnp.maximum(norms, 1e-30)


def _in_turn(rate: Rate, objective: Callable[..., Any], losses: int) -> tuple[Any, Any]:
    """M-ConFIG: each loss's gradient is evaluated in turn, with an update after each.

    A step here evaluates all once, so that every method has the same number of gradients.
    """
    optimizer = momentum_config(losses)

    def step(carry: Any, sample: Any) -> tuple[Any, jax.Array]:
        params, state = carry
        now = rate(state.seen[-1])
        for which in range(losses):
            one = lambda params, which=which: jax.tree.leaves(objective(params, sample))[which]  # noqa: E731
            gradient, unravel = ravel_pytree(jax.grad(one)(params))
            update, state = optimizer.update(gradient, state, which)
            params = optax.apply_updates(params, unravel(-now * update))
        return (params, state), jnp.zeros(())

    return lambda params: optimizer.init(ravel_pytree(params)[0]), step
