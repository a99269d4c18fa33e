"""The time of a training step: each method's over that of the summed loss, side by side."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from benchmarks.physics.equations import Equation
from benchmarks.physics.training import Scale, init, layer_sizes, objective, stepper
from benchmarks.timing import Case, measure_in_turn, ratio

LOSS = "summed loss"
"""Adam on one gradient, of the summed loss."""

PAIR = "summed"
"""Adam on the sum of the gradients of one pair."""

RATE = 1e-3


def benchmark(
    equation: Equation, methods: Sequence[str], scale: Scale, losses: int, steps: int, rounds: int
) -> list[dict[str, Any]]:
    """Steps of one network, points drawn ahead, in `jax.lax.scan`.

    Args:
      equation: which.
      methods: names in `ALL_METHODS`.
      scale: sizes of the network and of the sets of points.
      losses: 2 or 3, see `training.train`.
      steps: in one measurement.
      rounds: how many times each case runs.

    Returns:
      One row for the summed loss, one for the pair's sum and one for each other method.
    """
    keys = jax.random.split(jax.random.key(1), steps)
    samples = jax.jit(
        jax.vmap(lambda key: equation.sample(key, scale.residual_points, scale.data_points))
    )(keys)
    params = init(
        jax.random.key(0), layer_sizes(equation, scale), scale.frequencies, scale.factorised
    )
    start, step = _of_the_summed_loss(objective(equation, PAIR, scale, losses))
    cases = {LOSS: _case(LOSS, params, samples, start, step)}
    for name in dict.fromkeys([PAIR, *methods]):
        both = objective(equation, name, scale, losses)
        cases[name] = _case(
            name, params, samples, *stepper(name, lambda _: RATE, both, losses, scale)
        )
    measure_in_turn(list(cases.values()), rounds)
    return [
        {
            "method": name,
            "milliseconds a step": case.milliseconds / steps,
            "over the summed loss": ratio(case, cases[LOSS]),
            "over the pair's sum": ratio(case, cases[PAIR]),
            "first call s": case.first,
        }
        for name, case in cases.items()
    ]


def _of_the_summed_loss(both: Callable[..., Any]) -> tuple[Any, Any]:
    optimizer = optax.adam(RATE)

    def step(carry: Any, sample: Any) -> tuple[Any, jax.Array]:
        params, state = carry
        gradient = jax.grad(lambda params: sum(jax.tree.leaves(both(params, sample))))(params)
        updates, state = optimizer.update(gradient, state, params)
        return (optax.apply_updates(params, updates), state), jnp.zeros(())

    return optimizer.init, step


def _case(name: str, params: Any, samples: Any, start: Any, step: Any) -> Case:
    def body(carry: Any, sample: Any) -> tuple[Any, None]:
        # The cosine is for the curves: a program that does not return it does not compute it.
        return step(carry, sample)[0], None

    several = jax.jit(lambda carry, samples: jax.lax.scan(body, carry, samples)[0])
    held = [(params, jax.jit(start)(params))]

    def run() -> None:
        held[0] = jax.block_until_ready(several(held[0], samples))

    return Case(name, run)
