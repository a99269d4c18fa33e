"""Small convex programmes in K variables, solved inside a compiled step."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from gdmam_jax._geometry import norms
from gdmam_jax._numerics import divide, where

ITERATIONS = 40
"""The most iterations of the interior-point method: always enough for rounding in float64."""


Slopes = Callable[[jax.Array], tuple[jax.Array, jax.Array]]
"""A function's gradient ``(K,)`` and Hessian ``(K, K)`` at a point."""


def minimise(slopes: Slopes, start: jax.Array, side: jax.Array | None = None) -> jax.Array:
    """The minimiser of a convex function over non-negative numbers.

    Mehrotra's primal-dual interior-point method: two Newton steps for each factorisation, until
    they change nothing but rounding. The derivative is that of the conditions that the solution
    fulfils. It is finite even where these are degenerate.

    Args:
      slopes: the function's gradient and Hessian at a point.
      start: a positive point, ``(K,)``; with ``side``, one that fulfils its condition.
      side: $b$ of the condition $b^T x = 1$, at least 0, ``(K,)``; None for no condition.

    References:
      Mehrotra, On the Implementation of a Primal-Dual Interior Point Method, SIAM Journal on
      Optimization 1992.
    """
    dtype = start.dtype
    tiny, eps = jnp.finfo(dtype).tiny, float(jnp.finfo(dtype).eps)

    def improved(state: Any) -> Any:
        x, dual, price, number, before, _ = state
        newton = _newton(slopes, side, x, dual, price)

        def towards(aim: jax.Array) -> tuple[jax.Array, ...]:
            dx, dprice = jax.lax.stop_gradient(newton(aim))
            ddual = aim / x - dual - dual * dx / x
            return dx, ddual, dprice, jnp.minimum(_longest(x, dx), _longest(dual, ddual))

        mean = jnp.mean(x * dual)
        dx, ddual, _, step = towards(jnp.zeros_like(x))
        step = jnp.minimum(1, step)
        ahead = jnp.mean((x + step * dx) * (dual + step * ddual))
        # What the first step misses and how far it may go decide where the second one aims.
        aim = jnp.maximum(mean * (ahead / mean) ** 3, eps**2) - step**2 * dx * ddual
        dx, ddual, dprice, step = towards(aim)
        # Far from the solution, keep some distance from 0, where a value might get stuck.
        step = jnp.minimum(1, (1 - jnp.clip(jnp.sqrt(mean), 1e-3, 0.2)) * step)
        new = (
            jnp.maximum(x + step * dx, tiny),
            jnp.maximum(dual + step * ddual, tiny),
            price + step * dprice,
        )
        # Where rounding dominates, stay: a step that is not finite is not taken.
        finite = jnp.isfinite(step) & jnp.all(jnp.isfinite(dx))
        new = where(finite, new, (x, dual, price))
        moved = jnp.max(jnp.abs(new[0] - x))
        # Near the solution steps become shorter and shorter, down to rounding.
        shorter = (moved < before / 2) & (moved > eps * jnp.maximum(1, jnp.max(x)))
        return *new, number + 1, moved, finite & ((mean > eps) | shorter)

    def goes_on(state: Any) -> jax.Array:
        return state[-1] & (state[3] < ITERATIONS)

    zero = jnp.zeros((), dtype)
    first = (jax.lax.stop_gradient(start), jnp.ones_like(start), zero)
    x, dual, price, *_ = jax.lax.while_loop(goes_on, improved, (*first, 0, zero, True))
    # At the solution another step changes nothing, but it carries the solution's derivative.
    change, _ = _newton(slopes, side, x, dual, price)(x * dual)
    change = jnp.where(jnp.isfinite(change), change, 0)
    return x + (change - jax.lax.stop_gradient(change))


def _newton(
    slopes: Slopes, side: jax.Array | None, x: jax.Array, dual: jax.Array, price: jax.Array
) -> Callable[[jax.Array], tuple[jax.Array, jax.Array]]:
    """A function from the wanted products ``x * dual`` to the changes of ``x`` and ``price``."""
    gradient, hessian = slopes(x)
    eps, scale = float(jnp.finfo(x.dtype).eps), jnp.max(jnp.diagonal(hessian))
    # The last term keeps the system definite and does not move the solution.
    system = hessian + jnp.diag(dual / x + (10 + x.size) * eps * scale)
    if side is None:
        solve = _solver(system)
        return lambda aim: (-solve(gradient - aim / x), jnp.zeros_like(price))
    # Nor does the term that holds the condition, which a function of degree 1 would leave open.
    hold = scale * side / (side @ side)
    missing, fixed = side @ x - 1, jax.lax.stop_gradient(side)
    solve = _solver(system + jnp.outer(hold, side))
    along = solve(fixed)

    def changes(aim: jax.Array) -> tuple[jax.Array, jax.Array]:
        change = solve(gradient - aim / x + price * side + missing * hold)
        dprice = (missing - fixed @ change) / (fixed @ along)
        return -change - along * dprice, dprice

    return changes


def _solver(system: jax.Array) -> Callable[[jax.Array], jax.Array]:
    """A function from the right side of a definite system, taken as constant, to its solution."""
    factor = jax.scipy.linalg.cho_factor(jax.lax.stop_gradient(system), lower=True)
    return functools.partial(jax.scipy.linalg.cho_solve, factor)


def _longest(values: jax.Array, changes: jax.Array) -> jax.Array:
    """How many times the changes can be made before a value reaches 0."""
    shrinking = changes < 0
    return jnp.min(jnp.where(shrinking, -values / jnp.where(shrinking, changes, -1), jnp.inf))


def quadratic(matrix: jax.Array, linear: jax.Array) -> jax.Array:
    r"""The minimiser of $\frac12 x^T Q x + q^T x$ over $x \ge 0$."""
    return minimise(lambda x: (matrix @ x + linear, matrix), jnp.ones_like(linear))


def cosines(gramian: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The gradients' norms, their inverses, and the cosines between them.

    In units of the gradients' norms a programme is well scaled, however much these differ. A
    gradient of 0 has the inverse 0, and counts as orthogonal to the others.
    """
    lengths = norms(gramian)
    inverses = divide(jnp.ones_like(lengths), lengths)
    between = inverses[..., :, None] * gramian * inverses[..., None, :]
    diagonal = jnp.eye(gramian.shape[-1], dtype=bool)
    return lengths, inverses, jnp.where(diagonal, 1, between)


def shares(lengths: jax.Array, inverses: jax.Array) -> jax.Array:
    """The least norm over each norm: the ``side`` on which weights add up to 1, in those units."""
    least = jnp.min(lengths)
    return jnp.where(lengths == least, 1, least * inverses)
