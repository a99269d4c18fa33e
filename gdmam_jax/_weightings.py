r"""Task weights: functions of the gradients' inner products and of their norms' running means.

A weighting is a function ``(gramian, norms) -> weights`` of arrays of shape ``(..., K, K)``,
``(..., K)`` and ``(..., K)`` for K losses, of which index 0 is the prediction; ``...`` are the
scopes. A weighting that has settings, called with settings alone, returns one with these settings:
``unit_weighting`` and ``unit_weighting(preference=0.5)`` are both weightings.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp

from gdmam_jax import _geometry
from gdmam_jax._checks import check_each, check_key, check_range
from gdmam_jax._numerics import divide, random_key, safe_sqrt
from gdmam_jax._programmes import ITERATIONS, cosines, minimise, quadratic, shares
from gdmam_jax._settings import Choice, refuse_names, with_settings

Weighting = Callable[[jax.Array, jax.Array], Any]
"""A function ``(gramian, norms) -> weights`` of the gradients' inner products and of the running
means of their norms."""


def norm_weighting(gramian: jax.Array, norms: jax.Array) -> jax.Array:
    r"""Each task weighs as much as its gradient: $w_k = n_k / \sum_j n_j$. As released.

    Args:
      gramian: inner products of the gradients, shape ``(..., K, K)``; $n_k^2$ on the diagonal.
      norms: unused.

    Returns:
      The weights, shape ``(..., K)``, adding up to 1; all 0 where no task has a gradient.

    Examples:
      >>> import jax.numpy as jnp
      >>> norm_weighting(jnp.diag(jnp.array([9.0, 1.0])), None).tolist()
      [0.75, 0.25]

    References:
      The weights of the released GDMAM code.
    """
    del norms
    lengths = _geometry.norms(gramian)
    return divide(lengths, jnp.sum(lengths, axis=-1, keepdims=True))


def balanced_weighting(gramian: jax.Array, norms: jax.Array) -> jax.Array:
    r"""All weighted gradients get one norm: $w_k = n_k^{-1} / \sum_j n_j^{-1}$.

    A task without a gradient has no norm to match, and leaves its weight to the others. The update
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


def _check_preference(preference: Any, present: Any = None) -> None:
    check_each("preference", preference)


def _check_direction(direction: Any) -> None:
    if direction not in ("center", "projection", "average"):
        raise ValueError(
            f"direction must be 'center', 'projection' or 'average', got {direction!r}"
        )


_preferring = functools.partial(with_settings, check=_check_preference)


@_preferring
def unit_weighting(gramian: jax.Array, norms: jax.Array, *, preference: Any = 1.0) -> jax.Array:
    r"""Every task counts the same, whatever its scale: $w_k = p_k / \overline{n_k}$.

    $\overline{n_k}$ is the running mean of the task's norm, or this step's norm where that is
    larger: a gradient shorter than usual stays shorter, and a spike counts no more than a gradient
    of the usual length. A task without a gradient does not change the others' weights.

    Args:
      gramian: inner products of the gradients, shape ``(..., K, K)``.
      norms: running means of the gradients' norms, shape ``(..., K)``.
      preference: $p_k$, how much an alignment task counts, relative to the prediction, which counts
        1; at least 0. A number, one for each alignment task, or a mapping by name. To schedule it,
        give `optax.inject_hyperparams` a function of it:
        ``lambda preference: gdmam(1e-3, weighting=unit_weighting(preference=preference))``.

    Returns:
      The weights, shape ``(..., K)``.

    Raises:
      ValueError: a preference is negative; while tracing, they are not as many as alignment losses.

    Examples:
      >>> import jax.numpy as jnp
      >>> gramian = jnp.diag(jnp.array([9.0, 1.0]))
      >>> unit_weighting(gramian, jnp.array([4.0, 0.5])).tolist()
      [0.25, 1.0]
      >>> unit_weighting(preference=0.5)(gramian, jnp.array([4.0, 0.5])).tolist()
      [0.25, 0.5]
    """
    scale = jnp.maximum(_geometry.norms(gramian), norms)
    return divide(jnp.broadcast_to(preferences(preference, scale), scale.shape), scale)


def preferences(preference: Any, like: jax.Array) -> jax.Array:
    """How much each task counts, shape ``(K,)``: the prediction 1, the others as wanted."""
    refuse_names("preference", preference)
    others, wanted = like.shape[-1] - 1, jnp.asarray(preference, like.dtype)
    if wanted.shape not in ((), (others,)):
        raise ValueError(
            f"preference must be a number or {others} of them, one for each alignment loss, got "
            f"shape {wanted.shape}"
        )
    wanted = jnp.broadcast_to(wanted, (others,))
    return jnp.append(jnp.ones_like(wanted[:1]), wanted)


def _shares(preference: Any, gramian: jax.Array, present: Any = None) -> jax.Array:
    """The preferences of the losses that are present, adding up to 1."""
    wanted = preferences(preference, gramian)
    if present is not None:
        wanted = jnp.where(present, wanted, 0)
    return divide(wanted, jnp.sum(wanted))


def _absent_made_long(gramian: jax.Array, present: Any) -> jax.Array:
    """The Gramian with absent gradients so long that no shortest average gives them weight.

    Where any is absent, it is in units of its largest square, so that this length is finite.
    """
    if present is None:
        return gramian
    longest = 1 / float(jnp.finfo(gramian.dtype).eps) ** 2
    absent = jnp.diag(~jnp.asarray(present))
    return jnp.where(jnp.broadcast_to(absent, gramian.shape), longest, _over_largest(gramian))


def _over_largest(gramian: jax.Array) -> jax.Array:
    """The Gramian over its largest square, for weights that do not depend on its scale."""
    largest = jnp.max(jnp.diagonal(gramian, axis1=-2, axis2=-1), axis=-1)[..., None, None]
    return divide(gramian, jax.lax.stop_gradient(largest))


def constant_weighting(*weights: Any) -> Weighting:
    """Weights that do not depend on the gradients.

    Args:
      *weights: the prediction task's weight, then each alignment task's; or one mapping of all of
        them by name, in which the prediction's is called ``"prediction"``.

    Returns:
      A weighting.

    Raises:
      ValueError: a weight is not finite; while tracing, there are not as many as losses, or a name
        is unknown or missing.
      TypeError: a weight is not a number.

    Examples:
      >>> import jax.numpy as jnp
      >>> constant_weighting(1.0, 0.5)(jnp.eye(2), None).tolist()
      [1.0, 0.5]
      >>> by_name = constant_weighting({"prediction": 1.0, "ic": 100.0, "bc": 0.01})
    """
    if any(getattr(weight, "ndim", 0) for weight in weights):
        raise TypeError(
            "constant_weighting takes one number for each loss: give the optimizer what it "
            "returns, weighting=constant_weighting(1.0, 0.5)"
        )
    named = len(weights) == 1 and isinstance(weights[0], Mapping)
    given = weights[0] if named else weights
    check_each("each weight", given, -float("inf"), above_minimum=True)
    if named and "prediction" not in given:
        raise ValueError(
            f"constant_weighting needs the weight of 'prediction', too, got {', '.join(given)}"
        )
    return Choice(_constant, weights=given)


def _constant(gramian: jax.Array, norms: jax.Array, *, weights: Any) -> jax.Array:
    del norms
    refuse_names("constant_weighting", weights)
    if len(weights) != gramian.shape[-1]:
        raise ValueError(
            f"constant_weighting needs a weight for each of {gramian.shape[-1]} losses, got "
            f"{len(weights)}"
        )
    chosen = jnp.stack([jnp.asarray(weight, gramian.dtype) for weight in weights])
    return jnp.broadcast_to(chosen, (*gramian.shape[:-2], len(weights)))


_constant.__name__ = constant_weighting.__name__  # as messages should call it


def mean_weighting(gramian: jax.Array, norms: jax.Array, *, present: Any = None) -> jax.Array:
    """The mean of the gradients: every weight is 1 / K, with K losses present.

    Args:
      gramian: inner products of the gradients, shape ``(..., K, K)``; only its shape counts.
      norms: unused.
      present: which losses are present, booleans of shape ``(K,)``; None for all. An optimizer
        that is told which losses are absent passes it on.

    Returns:
      The weights, shape ``(..., K)``.

    Examples:
      >>> import jax.numpy as jnp
      >>> mean_weighting(jnp.eye(2), None).tolist()
      [0.5, 0.5]
    """
    del norms
    return jnp.broadcast_to(_shares(1.0, gramian, present), gramian.shape[:-1])


def sum_weighting(gramian: jax.Array, norms: jax.Array) -> jax.Array:
    """The sum of the gradients: every weight is 1.

    Args:
      gramian: inner products of the gradients, shape ``(..., K, K)``; only its shape counts.
      norms: unused.

    Returns:
      The weights, shape ``(..., K)``.

    Examples:
      >>> import jax.numpy as jnp
      >>> sum_weighting(jnp.eye(2), None).tolist()
      [1.0, 1.0]
    """
    del norms
    return jnp.ones(gramian.shape[:-1], gramian.dtype)


@functools.partial(with_settings, check=check_key)
def pcgrad_weighting(gramian: jax.Array, norms: jax.Array, *, key: Any = None) -> jax.Array:
    r"""PCGrad: the sum, after each gradient loses its part along those that it conflicts with.

    For two losses $w_k = 1 - \min(\langle g_0, g_1\rangle, 0) / |g_k|^2$. With more, each
    gradient meets the others one after the other, with what is then left of it.

    Args:
      gramian: inner products of the gradients, shape ``(..., K, K)``.
      norms: unused.
      key: a random key, or a seed, that draws the order of the others for each gradient. Every
        step has the same orders, since nothing is remembered; for new ones, as published, make the
        weighting inside the step, with the step's key. None: the losses' own order.

    Returns:
      The weights, shape ``(..., K)``.

    Raises:
      TypeError: ``key`` is neither a key nor a seed.

    Examples:
      >>> import jax.numpy as jnp
      >>> pcgrad_weighting(jnp.array([[1.0, -1.0], [-1.0, 2.0]]), None).tolist()
      [2.0, 1.5]

    References:
      Yu et al., Gradient Surgery for Multi-Task Learning, NeurIPS 2020.
    """
    del norms
    count = gramian.shape[-1]
    orders = jnp.broadcast_to(jnp.arange(count), (count, count))
    if key is not None:
        orders = jax.random.permutation(random_key(key), orders, axis=1, independent=True)
    own = jnp.eye(count, dtype=gramian.dtype)

    def weights(gramian: jax.Array) -> jax.Array:
        def project(left: jax.Array, others: jax.Array) -> tuple[jax.Array, None]:
            conflicts = jnp.minimum(jnp.sum(left * gramian[others], axis=1), 0)
            removed = divide(conflicts, jnp.diagonal(gramian)[others])
            removed = jnp.where(others == jnp.arange(count), 0, removed)
            return left - removed[:, None] * own[others], None

        # What is left of each gradient, as a combination of all: a row for each.
        left, _ = jax.lax.scan(project, own, orders.T, unroll=count < _geometry.MANY)
        return jnp.sum(left, axis=0)

    return over_scopes(weights, gramian)


def imtl_g_weighting(gramian: jax.Array, norms: jax.Array) -> jax.Array:
    r"""IMTL-G: the sum has equal projections on all unit gradients; weights add up to 1.

    $w \propto G^{+} n$ with $n_k = |g_k|$. For two losses this is `balanced_weighting`.

    Args:
      gramian: inner products of the gradients, shape ``(..., K, K)``.
      norms: unused.

    Returns:
      The weights, shape ``(..., K)``; some may be negative where K > 2.

    Examples:
      >>> import jax.numpy as jnp
      >>> imtl_g_weighting(jnp.diag(jnp.array([9.0, 1.0])), None).tolist()
      [0.25, 0.75]

    References:
      Liu et al., Towards Impartial Multi-Task Learning, ICLR 2021.
    """
    if gramian.shape[-1] == 2:
        return balanced_weighting(gramian, norms)
    lengths, inverses, between = cosines(gramian)
    limit = 20 * gramian.shape[-1] * float(jnp.finfo(gramian.dtype).eps)
    independent = jnp.linalg.eigvalsh(between)[..., :1] > limit
    # The same where the gradients are independent, and safe where their norms are far apart.
    equal = inverses * jnp.sum(jnp.linalg.pinv(between, hermitian=True), axis=-1)
    least = jnp.linalg.pinv(_over_largest(gramian), hermitian=True) @ lengths[..., None]
    solved = jnp.where(independent, equal, least[..., 0])
    return divide(solved, jnp.sum(solved, axis=-1, keepdims=True))


def over_scopes(function: Callable[..., Any], gramian: jax.Array, *others: jax.Array) -> Any:
    """Applies a function of one Gramian, and of other arrays by scope, to those of all scopes."""
    for _ in range(gramian.ndim - 2):
        function = jax.vmap(function)
    return function(gramian, *others)


def mgda_weighting(gramian: jax.Array, norms: jax.Array, *, present: Any = None) -> jax.Array:
    r"""MGDA: the shortest vector among all averages of the gradients.

    $w = \operatorname{argmin}_{w \ge 0, \sum w = 1} w^T G w$. The result opposes no gradient,
    and is 0 where no direction improves all. It follows the smallest gradient.

    Args:
      gramian: inner products of the gradients, shape ``(..., K, K)``.
      norms: unused.
      present: which losses are present, booleans of shape ``(K,)``; None for all. An optimizer
        that is told which losses are absent passes it on.

    Returns:
      The weights, shape ``(..., K)``, at least 0 and adding up to 1.

    Examples:
      >>> import jax.numpy as jnp
      >>> mgda_weighting(jnp.diag(jnp.array([3.0, 1.0])), None).tolist()
      [0.25, 0.75]

    References:
      Desideri, Multiple-gradient descent algorithm, Comptes Rendus Mathematique 2012; Sener and
      Koltun, Multi-Task Learning as Multi-Objective Optimization, NeurIPS 2018.
    """
    del norms
    gramian = _absent_made_long(gramian, present)
    if gramian.shape[-1] == 2:
        first, second, product = gramian[..., 0, 0], gramian[..., 1, 1], gramian[..., 0, 1]
        apart = first + second - 2 * product
        ends = jnp.stack([second - product, first - product], axis=-1)
        share = jnp.where(apart[..., None] > 0, divide(ends, apart[..., None]), 0.5)
        return jnp.clip(share, 0, 1)

    def weights(gramian: jax.Array) -> jax.Array:
        lengths, inverses, between = cosines(gramian)
        side = shares(lengths, inverses)
        start = jnp.full_like(side, 1 / jnp.sum(side))
        return side * minimise(lambda x: (between @ x, between), start, side)

    return over_scopes(weights, gramian)


@functools.partial(with_settings, check=lambda c, present: check_range("c", c))
def cagrad_weighting(
    gramian: jax.Array, norms: jax.Array, *, c: Any = 0.5, present: Any = None
) -> jax.Array:
    r"""CAGrad: near the mean gradient, the direction that improves the worst loss most.

    $\max_d \min_k \langle g_k, d\rangle$ subject to $|d - g_0| \le c |g_0|$, with $g_0$ the mean:
    $d = g_0 + c |g_0| g_w / |g_w|$, where $w$ minimises
    $\langle g_w, g_0\rangle + c |g_0| |g_w|$ over the simplex.

    Args:
      gramian: inner products of the gradients, shape ``(..., K, K)``.
      norms: unused.
      c: how far from the mean gradient, at least 0; 0 gives the mean.
      present: which losses are present, booleans of shape ``(K,)``; None for all. An optimizer
        that is told which losses are absent passes it on.

    Returns:
      The weights, shape ``(..., K)``.

    Raises:
      ValueError: ``c`` is negative.

    Examples:
      >>> import jax.numpy as jnp
      >>> [round(w, 3) for w in cagrad_weighting(jnp.eye(2), None, c=0.5).tolist()]
      [0.75, 0.75]

    References:
      Liu et al., Conflict-Averse Gradient Descent for Multi-task Learning, NeurIPS 2021.
    """
    del norms
    c = jnp.asarray(c, gramian.dtype)
    equal = _shares(1.0, gramian, present)
    gramian = _absent_made_long(gramian, present)

    def weights(gramian: jax.Array) -> jax.Array:
        lengths, inverses, between = cosines(gramian)
        side = shares(lengths, inverses)
        mean = equal * lengths
        radius = safe_sqrt(mean @ between @ mean)
        pull = between @ divide(mean, radius)

        def slopes(point: jax.Array) -> tuple[jax.Array, jax.Array]:
            # |g| is the least (|g|^2 / t + t) / 2, which stays convex and curved in x and t. With
            # |g| itself, which has a kink, Newton's steps may go in circles.
            x, length = point[:-1], point[-1]
            along = between @ x / length
            square = x @ along / length
            slope = jnp.append(pull + c * along, c * (1 - square) / 2)
            curvature = jnp.block([[between, -along[:, None]], [-along, square]])
            return slope, c / length * curvature

        start = jnp.append(jnp.full_like(side, 1 / jnp.sum(side)), 1)
        x = minimise(slopes, start, jnp.append(side, 0))[:-1]
        return equal + c * divide(radius, safe_sqrt(x @ between @ x)) * x * inverses

    return over_scopes(weights, gramian)


def nash_mtl_weighting(gramian: jax.Array, norms: jax.Array) -> jax.Array:
    r"""Nash-MTL: the bargaining solution, $G w = 1 / w$: each loss gains in proportion.

    The minimiser of $\frac12 w^T G w - \sum_k \log w_k$. Rescaling a loss only rescales its
    weight.

    Args:
      gramian: inner products of the gradients, shape ``(..., K, K)``.
      norms: unused.

    Returns:
      The weights, shape ``(..., K)``, above 0; 0 for a task without a gradient. Where gradients
      oppose each other exactly there is no solution, and the weights are large.

    Examples:
      >>> import jax.numpy as jnp
      >>> [round(w, 4) for w in nash_mtl_weighting(jnp.diag(jnp.array([4.0, 1.0])), None).tolist()]
      [0.5, 1.0]

    References:
      Navon et al., Multi-Task Learning as a Bargaining Game, ICML 2022.
    """
    return fairgrad_weighting(gramian, norms, alpha=1.0)


@functools.partial(
    with_settings, check=lambda alpha: check_range("alpha", alpha, above_minimum=True)
)
def fairgrad_weighting(gramian: jax.Array, norms: jax.Array, *, alpha: Any = 2.0) -> jax.Array:
    r"""FairGrad: gains shared by alpha-fairness, $G w = w^{-1/\alpha}$.

    The minimiser of $\frac12 w^T G w - \sum_k w_k^{1 - 1/\alpha} / (1 - 1/\alpha)$. Each loss
    gains $w_k^{-1/\alpha}$: with $\alpha = 1$ in proportion, as in `nash_mtl_weighting`; the
    larger $\alpha$, the more equally.

    Args:
      gramian: inner products of the gradients, shape ``(..., K, K)``.
      norms: unused.
      alpha: above 0.

    Returns:
      The weights, shape ``(..., K)``, above 0; 0 for a task without a gradient. Where gradients
      oppose each other exactly there is no solution, and the weights are large.

    Raises:
      ValueError: ``alpha`` is not above 0.

    Examples:
      >>> import jax.numpy as jnp
      >>> gramian = jnp.diag(jnp.array([8.0, 1.0]))
      >>> [round(w, 4) for w in fairgrad_weighting(gramian, None, alpha=2.0).tolist()]
      [0.25, 1.0]

    References:
      Ban and Ji, Fair Resource Allocation in Multi-Task Learning, ICML 2024.
    """
    del norms
    power = 1 / jnp.asarray(alpha, gramian.dtype)

    def weights(gramian: jax.Array) -> jax.Array:
        lengths, _, between = cosines(gramian)
        eps = float(jnp.finfo(between.dtype).eps)
        between = between + 10 * eps * jnp.eye(lengths.size, dtype=between.dtype)
        # In units of the solution for orthogonal gradients: w = y n^(-2 / (1 + 1 / alpha)).
        active = lengths > 0
        size = jnp.where(active, lengths, 1) ** ((power - 1) / (power + 1))
        size = size / jnp.max(size)
        matrix = size[:, None] * between * size[None]

        def newton(y: jax.Array, _: None) -> tuple[jax.Array, None]:
            pull = size**2 * y ** (-power)
            change = jnp.linalg.solve(matrix + jnp.diag(power * pull / y), matrix @ y - pull)
            # No step takes a weight to 0, or far beyond its double.
            return y - change / (1 + jnp.max(jnp.abs(change / y))), None

        y, _ = jax.lax.scan(newton, jnp.ones_like(lengths), length=ITERATIONS)
        unit = jnp.where(active, lengths, 1) ** (-2 / (1 + power))
        return jnp.where(active, y * unit, 0)

    return over_scopes(weights, gramian)


@_preferring
def aligned_mtl_weighting(
    gramian: jax.Array, norms: jax.Array, *, preference: Any = 1.0, present: Any = None
) -> jax.Array:
    r"""Aligned-MTL: the gradients made orthogonal, all as long as the least principal one.

    $w = \sqrt{\lambda_{min}} V \Lambda^{-1/2} V^T p$ with $G = V \Lambda V^T$ and
    $\lambda_{min}$ the least eigenvalue that is not 0.

    Args:
      gramian: inner products of the gradients, shape ``(..., K, K)``.
      norms: unused.
      preference: how much an alignment task counts, relative to the prediction, as in
        `unit_weighting`; $p$ are these numbers, divided by their sum.
      present: which losses are present, booleans of shape ``(K,)``; None for all. An optimizer
        that is told which losses are absent passes it on.

    Returns:
      The weights, shape ``(..., K)``.

    Raises:
      ValueError: a preference is negative; while tracing, they are not as many as alignment losses.

    Examples:
      >>> import jax.numpy as jnp
      >>> gramian = jnp.diag(jnp.array([4.0, 1.0]))
      >>> [round(w, 4) for w in aligned_mtl_weighting(gramian, None).tolist()]
      [0.25, 0.5]

    References:
      Senushkin et al., Independent Component Alignment for Multi-Task Learning, CVPR 2023.
    """
    del norms
    wanted = _shares(preference, gramian, present)

    def weights(gramian: jax.Array) -> jax.Array:
        fixed = jax.lax.stop_gradient(gramian)
        values, vectors = jnp.linalg.eigh(fixed)
        kept = values > values[-1] * values.size * float(jnp.finfo(values.dtype).eps)
        inverse = jnp.where(kept, safe_sqrt(divide(jnp.ones_like(values), values)), 0)
        # This is 0, but has a derivative. An eigenvector's derivative is not finite where
        # eigenvalues are equal, but that of the root is.
        turned = vectors.T @ (gramian - fixed) @ vectors
        column, row = inverse[:, None], inverse[None]
        root = jnp.diag(inverse) - divide((column * row) ** 2, column + row) * turned
        least = jnp.argmax(kept)
        scale = safe_sqrt(jnp.where(kept[least], values[least], 0) + turned[least, least])
        return scale * (vectors @ (root @ (vectors.T @ wanted)))

    return over_scopes(weights, _over_largest(gramian))  # no power of an eigenvalue overflows


def _projected(wanted: jax.Array, gramian: jax.Array) -> jax.Array:
    """The weights, at least ``wanted``, of the combination closest to the wanted one that opposes
    no gradient: its projection on the dual cone.
    """
    if wanted.size == 2:  # it opposes one of them at most
        against = jnp.minimum(jnp.sum(gramian * wanted[None], axis=-1), 0)
        return wanted - divide(against, jnp.diagonal(gramian))
    lengths, inverses, between = cosines(gramian)
    linear = between @ (lengths * wanted)
    scale = jnp.max(jnp.abs(linear))
    return wanted + scale * inverses * quadratic(between, divide(linear, scale))


@_preferring
def dual_proj_weighting(
    gramian: jax.Array, norms: jax.Array, *, preference: Any = 1.0, present: Any = None
) -> jax.Array:
    r"""DualProj: the closest direction to the mean gradient that conflicts with no gradient.

    $w = \operatorname{argmin}_{w \ge p} w^T G w$: the projection of $\sum_k p_k g_k$ onto
    the cone of directions that oppose no gradient.

    Args:
      gramian: inner products of the gradients, shape ``(..., K, K)``.
      norms: unused.
      preference: how much an alignment task counts, relative to the prediction, as in
        `unit_weighting`; $p$ are these numbers, divided by their sum.
      present: which losses are present, booleans of shape ``(K,)``; None for all. An optimizer
        that is told which losses are absent passes it on.

    Returns:
      The weights, shape ``(..., K)``.

    Raises:
      ValueError: a preference is negative; while tracing, they are not as many as alignment losses.

    Examples:
      >>> import jax.numpy as jnp
      >>> gramian = jnp.array([[1.0, -2.0], [-2.0, 8.0]])
      >>> [round(w, 3) for w in dual_proj_weighting(gramian, None).tolist()]
      [1.0, 0.5]

    References:
      Lopez-Paz and Ranzato, Gradient Episodic Memory for Continual Learning, NeurIPS 2017; named
      as in Quinton and Rey, Jacobian Descent for Multi-Objective Optimization, 2024.
    """
    del norms
    wanted = _shares(preference, gramian, present)
    return over_scopes(functools.partial(_projected, wanted), gramian)


@_preferring
def upgrad_weighting(
    gramian: jax.Array, norms: jax.Array, *, preference: Any = 1.0, present: Any = None
) -> jax.Array:
    r"""UPGrad: the mean, after each gradient is projected to conflict with none.

    $w = \sum_k p_k \operatorname{argmin}_{v \ge e_k} v^T G v$. The result opposes no
    gradient, and grows in proportion when a gradient does.

    Args:
      gramian: inner products of the gradients, shape ``(..., K, K)``.
      norms: unused.
      preference: how much an alignment task counts, relative to the prediction, as in
        `unit_weighting`; $p$ are these numbers, divided by their sum.
      present: which losses are present, booleans of shape ``(K,)``; None for all. An optimizer
        that is told which losses are absent passes it on.

    Returns:
      The weights, shape ``(..., K)``.

    Raises:
      ValueError: a preference is negative; while tracing, they are not as many as alignment losses.

    Examples:
      >>> import jax.numpy as jnp
      >>> gramian = jnp.array([[1.0, -1.0], [-1.0, 2.0]])
      >>> [round(w, 3) for w in upgrad_weighting(gramian, None).tolist()]
      [1.0, 0.75]

    References:
      Quinton and Rey, Jacobian Descent for Multi-Objective Optimization, 2024.
    """
    del norms
    wanted = _shares(preference, gramian, present)

    def weights(gramian: jax.Array) -> jax.Array:
        unit = jnp.eye(wanted.size, dtype=gramian.dtype)
        each = jax.vmap(_projected, (0, None))(unit, gramian)
        return jnp.sum(wanted[:, None] * each, axis=0)

    return over_scopes(weights, gramian)


@_preferring
def config_weighting(gramian: jax.Array, norms: jax.Array, *, preference: Any = 1.0) -> jax.Array:
    r"""ConFIG: a direction with equal projections on all unit gradients, as long as the sum of the
    gradients' projections on it.

    With unit gradients $u_k = g_k / n_k$ and their inner products $C$, the direction is
    $d = \sum_k a_k u_k$ with $a = C^{+} \, \operatorname{preference}$, and the length
    $\sum_k \langle g_k, d\rangle / |d|$. For two losses the weights are
    $w_k = (n_0 + n_1) / (2 n_k)$: along the bisector. While the gradients are linearly
    independent it opposes no loss; its length shrinks as the gradients do. A task without a
    gradient is left out.

    Args:
      gramian: inner products of the gradients, shape ``(..., K, K)``.
      norms: unused.
      preference: how much an alignment task counts, relative to the prediction, as in
        `unit_weighting`: the ratios of the projections on the unit gradients.

    Returns:
      The weights, shape ``(..., K)``.

    Raises:
      ValueError: a preference is negative; while tracing, they are not as many as alignment losses.

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
    if lengths.shape[-1] == 2 and isinstance(preference, int | float) and preference == 1:
        total = jnp.sum(lengths, axis=-1, keepdims=True)
        return divide(divide(total, jnp.sum(active, axis=-1, keepdims=True)), lengths)
    _, inverses, between = cosines(gramian)
    wanted = active * jnp.broadcast_to(preferences(preference, gramian), active.shape)
    combined = jnp.einsum("...ij,...j->...i", jnp.linalg.pinv(between, hermitian=True), wanted)
    projections = jnp.einsum("...ij,...j->...i", between, combined)
    square = jnp.sum(combined * projections, axis=-1, keepdims=True)
    length = jnp.sum(lengths * projections, axis=-1, keepdims=True)
    return divide(length, square) * combined * inverses


@functools.partial(with_settings, check=_check_direction)
def dcgd_weighting(
    gramian: jax.Array,
    norms: jax.Array,
    *,
    direction: Literal["center", "projection", "average"] = "center",
) -> jax.Array:
    r"""DCGD, dual cone gradient descent: a direction in which both losses fall.

    ``"center"`` is the sum's projection on the bisector of the two gradients. ``"projection"`` is
    the sum or, if that opposes a loss, its projection on the directions that do not. ``"average"``
    is the sum or, if that opposes a loss, half of PCGrad's. All are for two losses; with more, the
    published method first adds up all boundary losses. The first is `config_weighting` with two
    losses, the second twice `dual_proj_weighting`; both also work with more.

    Args:
      gramian: inner products of the gradients, shape ``(..., 2, 2)``.
      norms: unused.
      direction: which of the three.

    Returns:
      The weights, shape ``(..., 2)``.

    Raises:
      ValueError: the direction is unknown; while tracing, there are more than two losses.

    Examples:
      >>> import jax.numpy as jnp
      >>> gramian = jnp.array([[1.0, -2.0], [-2.0, 8.0]])
      >>> for direction in ("projection", "average"):
      ...     weights = dcgd_weighting(direction=direction)(gramian, None)
      ...     print([round(w, 3) for w in weights.tolist()])
      [2.0, 1.0]
      [1.5, 0.625]

    References:
      Hwang and Lim, Dual Cone Gradient Descent for Training Physics-Informed Neural Networks,
      NeurIPS 2024.
    """
    if gramian.shape[-1] != 2:
        raise ValueError(
            f"dcgd_weighting is for two losses, got {gramian.shape[-1]}; with more use "
            "config_weighting for 'center', dual_proj_weighting for 'projection'"
        )
    if direction == "center":
        return config_weighting(gramian, norms)
    if direction == "projection":
        return 2 * dual_proj_weighting(gramian, norms)
    against = jnp.min(jnp.sum(gramian, axis=-1), axis=-1, keepdims=True) < 0
    return jnp.where(against, pcgrad_weighting(gramian, norms) / 2, 1)
