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
from benchmarks.physics.equations import REPEATING, Along, Equation, Network
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
"""Steps over which the learning rate climbs to its peak; then it falls along half a cosine."""


class Scale(NamedTuple):
    """How large networks, point sets and budgets are, and what helps beyond weights.

    Attributes:
      width: of the hidden layers.
      depth: how many hidden layers.
      residual_points: inside the domain, at each step.
      data_points: at each step; for equations with time, half are at the first moment.
      steps: of a training.
      records: how many errors of a training are kept.
      periodic: whether the network repeats in space by itself. Then no boundary loss is left.
      frequencies: of the waves, both learned, that the first layer has instead of the inputs.
      factorised: whether each column of a kernel has a learned factor.
      chunks: of time; a chunk's residuals count little while those of earlier chunks are large.
      exponential: whether the rate falls by a tenth in each hundredth of the training, without
        warm-up, instead of along half a cosine.
    """

    width: int = 32
    depth: int = 4
    residual_points: int = 200
    data_points: int = 100
    steps: int = 5000
    records: int = 25
    periodic: bool = False
    frequencies: int = 0
    factorised: bool = False
    chunks: int = 0
    exponential: bool = False


SMALL = Scale()
SCALES = {
    "small": SMALL,
    "config": Scale(
        width=50, depth=5, residual_points=1000, data_points=500, steps=100_000, records=100
    ),
    "jaxpi": Scale(
        width=256, residual_points=4096, data_points=1024, steps=200_000, records=100,
        periodic=True, frequencies=128, factorised=True, chunks=32, exponential=True,
    ),
}  # fmt: skip
"""This benchmark's own, the ConFIG paper's, and the default of jaxpi's examples."""

EXTRAS: dict[str, dict[str, Any]] = {
    "periodic": {"periodic": True},
    "fourier": {"frequencies": 16},
    "factorised": {"factorised": True},
    "causal": {"chunks": 20},
}
"""What can be added to `SMALL`, by name."""


class Curves(NamedTuple):
    """The course of trainings: relative errors and cosines, shape ``(runs, records)``."""

    errors: np.ndarray
    cosines: np.ndarray


Layers = list[dict[str, jax.Array]]
"""Kernels and biases, apart, for optimizers that treat matrices in their own way."""


def init(
    key: jax.Array, sizes: list[int], frequencies: int = 0, factorised: bool = False
) -> Layers:
    """Glorot-normal layers whose biases start at 0.

    With ``frequencies`` a layer of waves, which has no bias, comes before them. With
    ``factorised`` the products of kernels and factors start as the kernels do without.
    """
    waves = []
    if frequencies:
        normal = jax.random.normal(jax.random.fold_in(key, 0), (sizes[0], frequencies))
        waves, sizes = [{"kernel": normal}], [2 * frequencies, *sizes[1:]]
    deviations = [
        np.repeat([np.sqrt(2 / (rows + columns)), 0], [rows * columns, columns])
        for rows, columns in itertools.pairwise(sizes)
    ]
    flat = np.concatenate(deviations).astype(np.float32)
    flat = flat * jax.random.normal(key, flat.shape)
    shapes = [(rows + 1, columns) for rows, columns in itertools.pairwise(sizes)]
    parts = jnp.split(flat, np.cumsum([np.prod(shape) for shape in shapes])[:-1])
    layers = [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]
    params = [{"kernel": layer[:-1], "bias": layer[-1]} for layer in layers]
    for number, layer in enumerate(params if factorised else [], 1):
        drawn = jax.random.normal(jax.random.fold_in(key, number), layer["bias"].shape)
        layer["factor"] = jnp.exp(0.5 + 0.1 * drawn)
        layer["kernel"] /= layer["factor"]
    return waves + params


def network(params: Layers, equation: Equation, periodic: bool = False) -> Network:
    r"""Hyperbolic tangents over inputs scaled to [-1, 1], with their derivatives.

    Derivatives by each input go through the layers along with the values. With $y = \tanh z$ and
    $s = 1 - y^2$, so that $y_1 = s z_1$, Leibniz' rule gives
    $y_n = \sum_k \binom{n - 1}{k} s_k z_{n - k}$ and $s_n = -\sum_k \binom{n}{k} y_k y_{n - k}$.

    Args:
      params: of `init`.
      equation: whose domain the points lie in.
      periodic: whether the first input is a point on a circle, and time runs from 0 to 1.

    Returns:
      A function ``(points, orders) -> along``.
    """
    lower, upper = np.array(equation.lower), np.array(equation.upper)

    def along(points: jax.Array, orders: tuple[int, ...]) -> Along:
        scale = 2 / (upper - lower)
        value = (scale * (points - lower) - 1).astype(points.dtype)
        slopes = [jnp.broadcast_to(row, value.shape) for row in np.diag(scale).astype(value.dtype)]
        z = [
            [value, *(slope * (k == 0) for k in range(order))]
            for slope, order in zip(slopes, orders, strict=True)
        ]
        if periodic:
            z = _around(z)
        for number, layer in enumerate(params):
            kernel = layer["kernel"] * layer.get("factor", 1)
            value = z[0][0] @ kernel + layer.get("bias", 0)
            z = [[value, *(each @ kernel for each in terms[1:])] for terms in z]
            if "bias" not in layer:
                z = _waves(z)
            elif number < len(params) - 1:
                z = _tanh(z)
        return z

    return along


def _tanh(z: Along) -> Along:
    """The hyperbolic tangent of a value and its derivatives."""
    value = jnp.tanh(z[0][0])
    slope, found = 1 - value**2, []
    for terms in z:
        y, s = [value], [slope]
        for n in range(1, len(terms)):
            y.append(_leibniz(s, terms, n))
            s.append(-sum(comb(n, k) * y[k] * y[n - k] for k in range(n + 1)))
        found.append(y)
    return found


def _waves(z: Along) -> Along:
    """Cosine and sine, side by side, of a value and their derivatives."""
    value, found = z[0][0], []
    for terms in z:
        cosine, sine = [jnp.cos(value)], [jnp.sin(value)]
        for n in range(1, len(terms)):
            cosine, sine = (
                [*cosine, -_leibniz(sine, terms, n)],
                [*sine, _leibniz(cosine, terms, n)],
            )
        pairs = zip(cosine, sine, strict=True)
        found.append([jnp.concatenate(pair, axis=-1) for pair in pairs])
    return found


def _leibniz(s: list[jax.Array], z: list[jax.Array], n: int) -> jax.Array:
    """The derivative of order n of what has the first derivative s times that of z."""
    return sum(comb(n - 1, k) * s[k] * z[n - k] for k in range(n))


def _around(z: Along) -> Along:
    """The first input on a circle, and time from 0 to 1."""
    circle = _waves([[np.pi * each[:, :1] for each in terms] for terms in z])
    times = [[0.5 * each[:, 1:] + 0.5 * (k == 0) for k, each in enumerate(terms)] for terms in z]
    return jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=-1), circle, times)


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
    # A quasi-Newton method needs differences that float32 cannot resolve.
    with jax.enable_x64(method in PLANS):
        seeds = jnp.asarray(seeds, jnp.uint32)
        starts = _start(tuple(layer_sizes(equation, scale)), scale, seeds)
        program = _program(equation, method, scale, losses)
        curves = program(jnp.asarray(rates, jnp.float32), *starts)
        return Curves(*(np.asarray(each, np.float64) for each in curves))


def layer_sizes(equation: Equation, scale: Scale) -> list[int]:
    """Inputs, hidden layers and outputs of the network."""
    return [len(equation.lower) + scale.periodic, *[scale.width] * scale.depth, equation.outputs]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _start(sizes: tuple[int, ...], scale: Scale, seeds: jax.Array) -> tuple[Layers, jax.Array]:
    """Parameters and the keys of all steps, for each seed.

    This is a program of its own: random bits take long to compile, and all methods share these.
    """
    shape = scale.records, scale.steps // scale.records

    def start(seed: jax.Array) -> tuple[Layers, jax.Array]:
        first, second = jax.random.split(jax.random.key(seed))
        params = init(first, list(sizes), scale.frequencies, scale.factorised)
        return params, jax.random.split(second, shape)

    return jax.vmap(start)(seeds)


def objective(
    equation: Equation, method: str | Method, scale: Scale, losses: int
) -> Callable[[Layers, Any], tuple[jax.Array, Any]]:
    """The losses as a method takes them: ``(params, sample) -> (prediction, alignment)``."""
    if losses not in (2, 3) or (losses == 3 and not equation.timed):
        raise ValueError(
            f"{equation.name} does not have {losses} losses; expected 2, or 3 if the equation has "
            "time"
        )
    if scale.periodic and (losses == 3 or equation.name not in REPEATING):
        raise ValueError(
            f"a periodic network has 2 losses and solves one of {', '.join(REPEATING)}; got "
            f"{losses} losses of {equation.name}"
        )
    if scale.chunks and not (equation.timed and scale.residual_points % scale.chunks == 0):
        raise ValueError(
            f"causal weights need an equation with time, and points in {scale.chunks} equal parts; "
            f"got {equation.name} with {scale.residual_points} points"
        )
    first = _prediction(method, losses)

    def both(params: Layers, sample: Any) -> tuple[jax.Array, Any]:
        learned = network(params, equation, scale.periodic)
        found = equation.losses(learned, sample, scale.chunks)
        if scale.periodic:
            del found["boundary"]
        if losses == 2:
            found = {"residual": found.pop("residual"), "data": sum(found.values())}
        prediction = found.pop(first)
        return prediction, found if losses == 3 else sum(found.values())

    return both


def _prediction(method: str | Method, losses: int) -> str:
    """The loss that is the prediction; of three, the initial condition, which picks a solution."""
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
        learned = network(params, equation, scale.periodic)(points, (0,) * points.shape[1])[0][0]
        return jnp.linalg.norm(learned - solution) / jnp.linalg.norm(solution)

    def trained(rate: jax.Array, params: Layers, keys: jax.Array) -> tuple[Any, Curves]:
        start, step = stepper(beginning, _schedule(rate, keys.size, scale), both, losses, scale)

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
        # In the order of the losses' leaves; keys of several alignment losses end with their names.
        others = [last[key] for key in sorted(last) if key.startswith("alignment_weight")]
        weights = jnp.stack([last["prediction_weight"], *others])
        second = finished(params, weights, keys[-1, -1], scale.records - before)
        return jax.tree.map(lambda *parts: jnp.concatenate(parts), first, second)

    if plan is None:
        return jax.jit(jax.vmap(lambda *each: trained(*each)[1]))
    # One run after the other, since their line searches differ in length.
    return jax.jit(lambda *starts: jax.lax.map(lambda each: run(*each), starts))


def _schedule(rate: jax.Array, steps: int, scale: Scale) -> Rate:
    if scale.exponential:
        falling = optax.schedules.exponential_decay(1.0, steps / 100, 0.9)
    else:
        falling = optax.schedules.warmup_cosine_decay_schedule(
            0.0, 1.0, min(WARM_UP, steps // 2), steps
        )
    return lambda count: rate * falling(count)


def stepper(
    method: str | Method, rate: Rate, objective: Callable[..., Any], losses: int, scale: Scale
) -> tuple[Callable[[Layers], Any], Callable[..., Any]]:
    """How a method starts, and its step ``(carry, sample) -> (carry, cosine)``.

    Args:
      method: a name in `ALL_METHODS`, or one of your own.
      rate: the learning rate, a function of the step.
      objective: ``(params, sample) -> (prediction, alignment)``, see `objective`.
      losses: how many there are.
      scale: sizes.

    Returns:
      ``(start, step)``; the carry is ``(params, start(params))`` at first.
    """
    if method == MOMENTUM_CONFIG:
        return _in_turn(rate, objective, losses)
    make = method if callable(method) else METHODS[method.removesuffix(RESIDUAL_FIRST)]
    parts = ["boundary", "initial", "residual"]
    parts.remove(_prediction(method, 3))
    names = None if losses == 2 else tuple(parts)
    optimizer = optax.with_extra_args_support(make(rate, names, scale.steps))

    def step(carry: Any, sample: Any) -> tuple[Any, jax.Array]:
        params, state = carry
        values, pairs = gdmam.value_and_paired_grad(objective)(params, sample)
        updates, state = optimizer.update(pairs, state, params, value=values)
        return (optax.apply_updates(params, updates), state), _cosine(pairs)

    return optimizer.init, step


def _cosine(pairs: Any) -> jax.Array:
    """The cosine of the prediction gradient and the sum of the others."""
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
