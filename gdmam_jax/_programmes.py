"""Small convex programmes in K variables, solved inside a compiled step."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from gdmam_jax._numerics import divide

ITERATIONS = 40
"""Of the interior-point method: enough for rounding in float64, whatever the programme."""


def minimise(
    slopes: Callable[[jax.Array], tuple[jax.Array, jax.Array]], start: jax.Array, simplex: bool
) -> jax.Array:
    """The minimiser of a convex function over non-negative numbers.

    A primal-dual interior-point method with a fixed number of Newton steps, each of which solves
    one linear system: no branches, so that it is compiled, batched and differentiated as it is.

    Args:
      slopes: the function's gradient ``(K,)`` and Hessian ``(K, K)`` at a point.
      start: a positive point, ``(K,)``; adding up to 1 with ``simplex``.
      simplex: whether the numbers must add up to 1.
    """
    count, dtype = start.shape[0], start.dtype
    tiny = jnp.finfo(dtype).tiny

    def newton(state: Any, _: None) -> tuple[Any, None]:
        x, dual, price = state
        gradient, hessian = slopes(x)
        aim = 0.1 * jnp.mean(x * dual)
        system = hessian + jnp.diag(dual / x)
        residual = gradient + price - aim / x
        if simplex:
            side = jnp.ones((count, 1), dtype)
            corner = jnp.zeros((1, 1), dtype)
            system = jnp.block([[system, side], [side.T, corner]])
            residual = jnp.append(residual, jnp.sum(x) - 1)
        change = -jnp.linalg.solve(system, residual)
        dx = change[:count]
        dprice = change[count] if simplex else jnp.zeros((), dtype)
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
        finite = jnp.isfinite(step) & jnp.all(jnp.isfinite(change))
        return jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, state), None

    initial = (start, jnp.ones_like(start), jnp.zeros((), dtype))
    return jax.lax.scan(newton, initial, length=ITERATIONS)[0][0]


def quadratic(matrix: jax.Array, linear: jax.Array, simplex: bool = False) -> jax.Array:
    r"""The minimiser of $\frac12 x^T Q x + q^T x$ over $x \ge 0$, or over the simplex."""
    count = linear.shape[0]
    start = jnp.full(count, 1 / count, linear.dtype)
    return minimise(lambda x: (matrix @ x + linear, matrix), start, simplex)


def normalised(gramian: jax.Array) -> jax.Array:
    """The Gramian over its trace, with the least diagonal that makes it safely invertible."""
    count, dtype = gramian.shape[-1], gramian.dtype
    scaled = divide(gramian, jnp.trace(gramian))
    return scaled + 10 * float(jnp.finfo(dtype).eps) * jnp.eye(count, dtype=dtype)
