"""Gates: how much of each part of the alignment gradient passes into a step."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from gdmam_jax._numerics import divide

Gate = Callable[[jax.Array, jax.Array], tuple[Any, Any]]
"""A function ``(cosine, ratio) -> (parallel, orthogonal)``: factors of the alignment gradient's
parts along and across the prediction gradient."""


def cosine_gate(cosine: jax.Array, ratio: jax.Array) -> tuple[jax.Array, jax.Array]:
    r"""The better the tasks agree, the more of the parallel part passes: (gate, 1 - gate).

    $$\operatorname{gate} = \operatorname{clip}(\cos(g_a, g_p), 0, 1)$$

    Args:
      cosine: of the angle between the two gradients, shape ``(...)``.
      ratio: unused.

    Returns:
      ``(parallel, orthogonal)``, the factors of the alignment gradient's two parts.

    Examples:
      >>> import jax.numpy as jnp
      >>> [float(factor) for factor in cosine_gate(jnp.array(0.25), jnp.array(1.0))]
      [0.25, 0.75]

    References:
      The gate of the released GDMAM code.
    """
    gate = jnp.clip(cosine, 0, 1)
    return gate, 1 - gate


def conflict_gate(cosine: jax.Array, ratio: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Drops the parallel part where it opposes the prediction gradient, and nothing else.

    With two losses and no momentum this projects the alignment gradient as PCGrad does. The step
    never raises the prediction loss, but may raise the alignment loss: see `priority_gate`.

    Args:
      cosine: of the angle between the two gradients, shape ``(...)``.
      ratio: unused.

    Returns:
      ``(1 if cosine > 0 else 0, 1)``.

    Examples:
      >>> import jax.numpy as jnp
      >>> [float(factor) for factor in conflict_gate(jnp.array(-0.25), jnp.array(1.0))]
      [0.0, 1.0]

    References:
      Yu et al., Gradient Surgery for Multi-Task Learning, NeurIPS 2020.
    """
    return (cosine > 0).astype(cosine.dtype), jnp.ones_like(cosine)


def priority_gate(cosine: jax.Array, ratio: jax.Array) -> tuple[jax.Array, jax.Array]:
    r"""Drops as much of what opposes the prediction as it can without raising the alignment loss.

    With $k = -\cos(g_a, g_p) > 0$ and $r$ the ratio of the weighted gradients' norms, the parallel
    part keeps the least factor at which a step along the result does not raise the alignment loss,

    $$v_\parallel = \operatorname{clip}\left(\frac{k / r + k^2 - 1}{k^2}, 0, 1\right),$$

    and passes whole where the gradients agree. To first order, and before a second moment rescales
    the elements, such a step raises neither loss as long as $k \le r$. A weaker alignment gradient
    passes unchanged, since the prediction gradient outweighs it. With several alignment losses, the
    parts kept against the prediction gradient are all shortened by one factor if together they
    outweigh it and what agrees with it. If no weight is negative, a step never raises the
    prediction loss, but may raise alignment losses.

    Args:
      cosine: of the angles between prediction and alignment gradients, shape ``(..., J)`` for J
        alignment losses; ``()`` for one.
      ratio: $r = w_a |g_a| / (w_p |g_p|)$, the same shape.

    Returns:
      ``(parallel, orthogonal)``, the factors of the alignment gradient's two parts.

    Examples:
      >>> import jax.numpy as jnp
      >>> round(float(priority_gate(jnp.array(-0.8), jnp.array(1.0))[0]), 4)
      0.6875
      >>> parallel, _ = priority_gate(jnp.array([-0.8, -0.9, -0.5]), jnp.ones(3))
      >>> [round(float(factor), 4) for factor in parallel]
      [0.5135, 0.6547, 0.0]
    """
    conflict = jnp.maximum(-cosine, 0)
    # Below that the share is cut in any case, but its derivative would not be a number.
    square = jnp.maximum(conflict**2, 1e-18)
    kept = jnp.clip((divide(conflict, ratio) + conflict**2 - 1) / square, 0, 1)
    if conflict.ndim and conflict.shape[-1] > 1:
        # In units of the weighed prediction gradient.
        agreeing = 1 + jnp.sum(ratio * jnp.maximum(cosine, 0), axis=-1, keepdims=True)
        opposing = jnp.sum(ratio * conflict * kept, axis=-1, keepdims=True)
        kept = kept * jnp.where(opposing > agreeing, divide(agreeing, opposing), 1)
    return jnp.where((conflict > 0) & (ratio > 0), kept, 1), jnp.ones_like(cosine)


def open_gate(cosine: jax.Array, ratio: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Passes both parts whole: ``(1, 1)``.

    Args:
      cosine: of the angle between the two gradients, shape ``(...)``.
      ratio: unused.

    Returns:
      Two arrays of ones of the cosine's shape.

    Examples:
      >>> import jax.numpy as jnp
      >>> [float(factor) for factor in open_gate(jnp.array(-0.25), jnp.array(1.0))]
      [1.0, 1.0]
    """
    return jnp.ones_like(cosine), jnp.ones_like(cosine)
