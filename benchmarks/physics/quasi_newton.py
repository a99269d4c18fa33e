"""Quasi-Newton methods, which minimise a fixed function in float64."""

import os
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

Loss = Callable[[jax.Array], jax.Array]
"""A function of the vector of all parameters."""

Step = Callable[[jax.Array, Any], tuple[jax.Array, Any, jax.Array]]
"""``(params, state) -> (params, state, evaluations)`` of the loss and its gradient."""


def l_bfgs(loss: Loss, params: jax.Array) -> tuple[Any, Step]:
    """Optax's L-BFGS; a step takes as many evaluations as its line search needs."""
    optimizer, evaluate = optax.lbfgs(), optax.value_and_grad_from_state(loss)

    def step(params: jax.Array, state: Any) -> tuple[jax.Array, Any, jax.Array]:
        value, gradient = evaluate(params, state=state)
        updates, state = optimizer.update(
            gradient, state, params, value=value, grad=gradient, value_fn=loss
        )
        taken = optax.tree.get(state, "num_linesearch_steps")
        return optax.apply_updates(params, updates), state, taken

    return optimizer.init(params), step


def ssbroyden(loss: Loss, params: jax.Array) -> tuple[Any, Step]:
    """Self-scaled Broyden with a full matrix, from `ssbroyden-optimistix`; a step is one trial."""
    # Without this its import would make float64 the default everywhere.
    os.environ.setdefault("SSBROYDEN_ENABLE_X64", "0")
    import equinox
    from ssbroyden_optimistix import SSBroyden

    solver = SSBroyden(rtol=0.0, atol=0.0)

    def function(params: jax.Array, _: None) -> tuple[jax.Array, None]:
        return loss(params), None

    value = jax.ShapeDtypeStruct((), params.dtype)
    state = solver.init(function, params, None, {}, value, None, frozenset())
    arrays, rest = equinox.partition(state, equinox.is_array)

    def step(params: jax.Array, arrays: Any) -> tuple[jax.Array, Any, jax.Array]:
        state = equinox.combine(arrays, rest)
        params, state, _ = solver.step(function, params, None, {}, state, frozenset())
        return params, equinox.filter(state, equinox.is_array), jnp.ones((), jnp.int32)

    return arrays, step


SOLVERS: dict[str, Callable[[Loss, jax.Array], tuple[Any, Step]]] = {
    "l-bfgs": l_bfgs,
    "ssbroyden": ssbroyden,
}


class Plan(NamedTuple):
    """The parts of a training, one after the other.

    Attributes:
      first: the method of the first half of the training, on new points at each step; or None.
      solver: the quasi-Newton method, on fixed points, of the losses' sum by the first method's
        last weights, or by 1.
    """

    first: str | None
    solver: str


PLANS = {
    solver if first is None else f"{solver} after {first}": Plan(first, solver)
    for solver in SOLVERS
    for first in (None, "summed", "adamw gradient norms", "gdmam", "muon allocated")
}
"""The methods that have a quasi-Newton part, by name."""

FIXED = 5
"""Fixed points are this many times a step's points, and evaluations are this many times fewer."""


def minimise(
    solver: str, loss: Loss, params: jax.Array, every: int, records: int, seen: Any
) -> Any:
    """Minimises, and records ``seen(params)`` after every so many evaluations.

    A line search that goes on past a record's last evaluation has fewer left for the next.

    Args:
      solver: a name in `SOLVERS`.
      loss: what is minimised.
      params: from where, a vector.
      every: evaluations of loss and gradient between two records.
      records: how many records.
      seen: what is recorded, a function of the parameters.

    Returns:
      The records.
    """
    state, step = SOLVERS[solver](loss, params)

    def advance(carry: Any) -> Any:
        params, state, count = carry
        params, state, taken = step(params, state)
        # A line search that gives up at once must not run for ever.
        return params, state, count + jnp.maximum(taken, 1).astype(count.dtype)

    def record(carry: Any, until: jax.Array) -> tuple[Any, Any]:
        carry = jax.lax.while_loop(lambda carry: carry[2] < until, advance, carry)
        return carry, seen(carry[0])

    start = (params, state, jnp.zeros((), jnp.int32))
    return jax.lax.scan(record, start, every * jnp.arange(1, records + 1, dtype=jnp.int32))[1]
