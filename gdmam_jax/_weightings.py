r"""Task weights: functions of the gradients' inner products and of their norms' running means.

A weighting is a function ``(gramian, norms) -> weights`` of arrays of shape ``(..., K, K)``,
``(..., K)`` and ``(..., K)`` for K losses, of which index 0 is the prediction; ``...`` are the
scopes. One with settings, called with the settings alone, is the weighting with these settings:
``unit_weighting`` and ``unit_weighting(preference=0.5)`` are both weightings.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from gdmam_jax import _geometry
from gdmam_jax._checks import check_range
from gdmam_jax._numerics import EPS, divide

Weighting = Callable[[jax.Array, jax.Array], Any]


def _with_settings(weighting: Callable[..., jax.Array]) -> Callable[..., Any]:
    """Lets a weighting be called with its settings alone, which gives a weighting."""

    @functools.wraps(weighting)
    def wrapped(*arrays: Any, **settings: Any) -> Any:
        if arrays:
            return weighting(*arrays, **settings)
        return functools.partial(weighting, **settings)

    return wrapped


def norm_weighting(gramian: jax.Array, norms: jax.Array) -> jax.Array:
    r"""Each task weighs as much as its gradient: $w_k = n_k / \sum_j n_j$. As released.

    Args:
      gramian: inner products of the gradients, shape ``(..., K, K)``; $n_k^2$ on the diagonal.
      norms: unused.

    Returns:
      The weights, shape ``(..., K)``, adding up to 1.

    Examples:
      >>> import jax.numpy as jnp
      >>> norm_weighting(jnp.diag(jnp.array([9.0, 1.0])), None).tolist()
      [0.75, 0.25]

    References:
      The weights of the released GDMAM code.
    """
    del norms
    lengths = _geometry.norms(gramian) + EPS
    return lengths / jnp.sum(lengths, axis=-1, keepdims=True)


def balanced_weighting(gramian: jax.Array, norms: jax.Array) -> jax.Array:
    r"""All weighted gradients get one norm: $w_k = n_k^{-1} / \sum_j n_j^{-1}$.

    A task without a gradient has no norm to match, and leaves the others its weight. The update
    shrinks as the gradients do.

    Args:
      gramian: inner products of the gradients, shape ``(..., K, K)``; $n_k^2$ on the diagonal.
      norms: unused.

    Returns:
      The weights, shape ``(..., K)``, adding up to 1; all 0 where no task has a gradient.

    Examples:
      >>> import jax.numpy as jnp
      >>> balanced_weighting(jnp.diag(jnp.array([9.0, 1.0])), None).tolist()
      [0.25, 0.75]
    """
    del norms
    lengths = _geometry.norms(gramian)
    smallest = jnp.min(jnp.where(lengths > 0, lengths, jnp.inf), axis=-1, keepdims=True)
    inverse = divide(jnp.where(jnp.isfinite(smallest), smallest, 0), lengths)
    return divide(inverse, jnp.sum(inverse, axis=-1, keepdims=True))


@_with_settings
def unit_weighting(gramian: jax.Array, norms: jax.Array, *, preference: Any = 1.0) -> jax.Array:
    r"""Every task counts the same, whatever its scale: $w_k = preference_k / \overline{n_k}$.

    $\overline{n_k}$ is the running mean of the task's norm, or this step's norm where that is
    larger: a step's norm below its recent mean still shows, and a spike counts no more than the
    rest. A task without a gradient leaves the others their weight.

    Args:
      gramian: inner products of the gradients, shape ``(..., K, K)``.
      norms: running means of the gradients' norms, shape ``(..., K)``.
      preference: how much an alignment task counts against the prediction, which counts 1; at
        least 0. A number, or one for each alignment task. To schedule it, give
        `optax.inject_hyperparams` a function of it:
        ``lambda preference: gdmam(1e-3, weighting=unit_weighting(preference=preference))``.

    Returns:
      The weights, shape ``(..., K)``.

    Raises:
      ValueError: a preference is negative.

    Examples:
      >>> import jax.numpy as jnp
      >>> gramian = jnp.diag(jnp.array([9.0, 1.0]))
      >>> unit_weighting(gramian, jnp.array([4.0, 0.5])).tolist()
      [0.25, 1.0]
      >>> unit_weighting(preference=0.5)(gramian, jnp.array([4.0, 0.5])).tolist()
      [0.25, 0.5]
    """
    for each in preference if isinstance(preference, Sequence) else [preference]:
        check_range("preference", each)
    scale = jnp.maximum(_geometry.norms(gramian), norms)
    wanted = jnp.asarray(preference, scale.dtype)
    if wanted.shape not in ((), (scale.shape[-1] - 1,)):
        raise ValueError(
            f"preference must be a number or {scale.shape[-1] - 1} of them, one for each alignment "
            f"loss, got shape {wanted.shape}"
        )
    wanted = jnp.broadcast_to(wanted, (scale.shape[-1] - 1,))
    wanted = jnp.append(jnp.ones_like(wanted[:1]), wanted)
    return divide(jnp.broadcast_to(wanted, scale.shape), scale)


def constant_weighting(*weights: Any) -> Weighting:
    """Weights that do not depend on the gradients.

    Args:
      *weights: the prediction task's weight, then each alignment task's.

    Returns:
      A weighting.

    Examples:
      >>> import jax.numpy as jnp
      >>> constant_weighting(1.0, 0.5)(jnp.eye(2), None).tolist()
      [1.0, 0.5]
    """

    def weighting(gramian: jax.Array, norms: jax.Array) -> jax.Array:
        del norms
        chosen = jnp.stack([jnp.asarray(weight, gramian.dtype) for weight in weights])
        return jnp.broadcast_to(chosen, (*gramian.shape[:-2], len(weights)))

    return weighting


def pcgrad_weighting(gramian: jax.Array, norms: jax.Array) -> jax.Array:
    r"""PCGrad for two losses: each gradient loses its part along the other where they conflict.

    $w_k = 1 - \min(\langle g_0, g_1\rangle, 0) / |g_k|^2$, so that
    $w_0 g_0 + w_1 g_1$ is the sum of both projections.

    Args:
      gramian: inner products of the gradients, shape ``(..., 2, 2)``.
      norms: unused.

    Returns:
      The weights, shape ``(..., 2)``.

    Examples:
      >>> import jax.numpy as jnp
      >>> pcgrad_weighting(jnp.array([[1.0, -1.0], [-1.0, 2.0]]), None).tolist()
      [2.0, 1.5]

    References:
      Yu et al., Gradient Surgery for Multi-Task Learning, NeurIPS 2020.
    """
    del norms
    squares = jnp.diagonal(gramian, axis1=-2, axis2=-1)
    return 1 - divide(jnp.minimum(gramian[..., 0, 1:], 0), squares)


@_with_settings
def config_weighting(gramian: jax.Array, norms: jax.Array, *, preference: Any = None) -> jax.Array:
    r"""ConFIG: equal projections on all unit gradients, as long as the sum of the gradients' own.

    With unit gradients $u_k = g_k / n_k$ and their inner products $C$, the direction is
    $d = \sum_k a_k u_k$ with $a = C^{+} preference$, and the length
    $\sum_k \langle g_k, d\rangle / |d|$. For two losses the weights are
    $w_k = (n_0 + n_1) / (2 n_k)$: along the bisector. It is against no loss, and its length
    shrinks as the gradients do. A task without a gradient is left out.

    Args:
      gramian: inner products of the gradients, shape ``(..., K, K)``.
      norms: unused.
      preference: the wanted projections on the unit gradients, shape ``(K,)``. None: equal ones.

    Returns:
      The weights, shape ``(..., K)``.

    Examples:
      >>> import jax.numpy as jnp
      >>> config_weighting(jnp.array([[9.0, -1.0], [-1.0, 1.0]]), None).tolist()
      [0.6666666865348816, 2.0]

    References:
      Liu, Chu and Thuerey, ConFIG: Towards Conflict-free Training of Physics Informed Neural
      Networks, ICLR 2025.
    """
    del norms
    lengths = _geometry.norms(gramian)
    active = (lengths > 0).astype(lengths.dtype)
    if gramian.shape[-1] == 2 and preference is None:
        total = jnp.sum(lengths, axis=-1, keepdims=True)
        return divide(divide(total, jnp.sum(active, axis=-1, keepdims=True)), lengths)
    inverse = divide(active, lengths)
    cosines = inverse[..., :, None] * gramian * inverse[..., None, :]
    wanted = active if preference is None else active * jnp.asarray(preference, active.dtype)
    combined = jnp.einsum("...ij,...j->...i", jnp.linalg.pinv(cosines, hermitian=True), wanted)
    projections = jnp.einsum("...ij,...j->...i", cosines, combined)
    square = jnp.sum(combined * projections, axis=-1, keepdims=True)
    length = jnp.sum(lengths * projections, axis=-1, keepdims=True)
    return divide(length, square) * combined * inverse
