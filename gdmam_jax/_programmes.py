"""Small convex programmes in K variables, solved inside a compiled step."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from gdmam_jax._geometry import norms
from gdmam_jax._numerics import divide

ITERATIONS = 40
"""Of the interior-point method, at most: enough for rounding in float64, whatever the programme."""


def minimise(
    slopes: Callable[[jax.Array], tuple[jax.Array, jax.Array]],
    start: jax.Array,
    side: jax.Array | None = None,
) -> jax.Array:
    """The minimiser of a convex function over non-negative numbers.

    A primal-dual interior-point method of Newton steps, each of which solves one linear system,
    until they change nothing but rounding. Its derivative is that of the conditions that the
    solution fulfils, and finite where these are degenerate.

    Args:
      slopes: the function's gradient ``(K,)`` and Hessian ``(K, K)`` at a point.
      start: a positive point, ``(K,)``; with ``side`` one that fulfils it.
      side: $b$ of the condition $b^T x = 1$, at least 0, ``(K,)``; None for no condition.
    """
    dtype = start.dtype
    tiny, eps = jnp.finfo(dtype).tiny, float(jnp.finfo(dtype).eps)

    def towards(x: jax.Array, dual: jax.Array, price: Any, aim: Any) -> tuple[jax.Array, Any]:
        """The change of ``x``, and of ``price`` where there is one, that Newton's method makes."""
        gradient, hessian = slopes(x)
        residual, scale = gradient - aim / x, jnp.max(jnp.diagonal(hessian))
        # The last part keeps the system definite and moves no solution.
        system = hessian + jnp.diag(dual / x + (10 + x.size) * eps * scale)
        if side is None:
            return -_solved(system, residual), jnp.zeros((), dtype)
        # Nor does what holds the condition, which a function of degree 1 leaves open otherwise.
        hold = scale * side / (side @ side)
        missing = side @ x - 1
        both = jnp.stack([residual + price * side + missing * hold, side], axis=1)
        change, along = _solved(system + jnp.outer(hold, side), both).T
        fixed = jax.lax.stop_gradient(side)
        dprice = (missing - fixed @ change) / jax.lax.stop_gradient(fixed @ along)
        return -change - jax.lax.stop_gradient(along) * dprice, dprice

    def newton(state: Any) -> Any:
        x, dual, price, number, _ = state
        aim = jnp.maximum(0.1 * jnp.mean(x * dual), eps**2)
        dx, dprice = jax.lax.stop_gradient(towards(x, dual, price, aim))
        ddual = aim / x - dual - dual * dx / x

        def longest(values: jax.Array, changes: jax.Array) -> jax.Array:
            shrinking = changes < 0
            steps = jnp.where(shrinking, -values / jnp.where(shrinking, changes, -1), jnp.inf)
            return jnp.min(steps)

        step = jnp.minimum(1, 0.99 * jnp.minimum(longest(x, dx), longest(dual, ddual)))
        new = (
            jnp.maximum(x + step * dx, tiny),
            jnp.maximum(dual + step * ddual, tiny),
            price + step * dprice,
        )
        # Where rounding has the last word, stay: a step that is not finite is none.
        finite = jnp.isfinite(step) & jnp.all(jnp.isfinite(dx))
        new = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, (x, dual, price))
        moved = jnp.max(jnp.abs(new[0] - x)) > eps * jnp.max(x)
        return *new, number + 1, finite & (moved | (aim > eps**2))

    def goes_on(state: Any) -> jax.Array:
        return state[-1] & (state[-2] < ITERATIONS)

    first = (jax.lax.stop_gradient(start), jnp.ones_like(start), jnp.zeros((), dtype))
    x, dual, price, *_ = jax.lax.while_loop(goes_on, newton, (*first, 0, True))
    # At the solution another step changes nothing, but it carries the solution's derivative.
    change, _ = towards(x, dual, price, x * dual)
    change = jnp.where(jnp.isfinite(change), change, 0)
    return x + (change - jax.lax.stop_gradient(change))


def _solved(system: jax.Array, sides: jax.Array) -> jax.Array:
    """The solution of a definite system, which is taken as constant."""
    factor = jax.scipy.linalg.cho_factor(jax.lax.stop_gradient(system), lower=True)
    return jax.scipy.linalg.cho_solve(factor, sides)


def quadratic(matrix: jax.Array, linear: jax.Array) -> jax.Array:
    r"""The minimiser of $\frac12 x^T Q x + q^T x$ over $x \ge 0$."""
    return minimise(lambda x: (matrix @ x + linear, matrix), jnp.ones_like(linear))


def cosines(gramian: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The gradients' norms, their inverses, and the cosines between them.

    In units of the gradients' norms a programme is well scaled, however far apart these are. A
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
