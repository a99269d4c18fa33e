"""Weightings that remember gradients: their norms, their cosines, the weights they were given."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from gdmam_jax import _geometry
from gdmam_jax._checks import check_each, check_key, check_range
from gdmam_jax._losses import Losses
from gdmam_jax._momenta import newest_share
from gdmam_jax._numerics import divide, random_key, safe_sqrt
from gdmam_jax._programmes import cosines, quadratic
from gdmam_jax._remembering import (
    RememberingWeighting,
    kept,
    learned,
    made_by_call,
    presence,
    values_of,
)
from gdmam_jax._settings import in_order
from gdmam_jax._weightings import over_scopes


class _Renewed(NamedTuple):
    """The weights in use, and how many steps there were."""

    weights: jax.Array
    steps: jax.Array


@made_by_call
def gradient_norm_weighting(*, decay: Any = 0.9, every: Any = 1000) -> RememberingWeighting:
    r"""Running weights that make the gradients equally long, renewed every so many steps.

    $w_k \leftarrow \beta w_k + (1 - \beta) / (n_k / \bar n + 10^{-5})$, with $\bar n$ the norms'
    mean, at the first step and then every so many steps. The weights start at 1. jaxpi trains
    physics-informed networks like this. A loss without a gradient keeps its weight.

    Args:
      decay: $\beta$, in [0, 1).
      every: for how many steps weights are kept.

    Returns:
      A weighting with a memory.

    Raises:
      ValueError: a number is out of range.

    Examples:
      >>> import jax.numpy as jnp
      >>> import gdmam_jax as gdmam
      >>> weighting = gdmam.gradient_norm_weighting(decay=0.5)
      >>> gramian, memory = jnp.diag(jnp.array([9.0, 1.0])), weighting.init(jnp.zeros(2))
      >>> weights, _ = weighting.update(gramian, None, memory, gdmam.Losses())
      >>> [round(weight, 3) for weight in weights.tolist()]
      [0.833, 1.5]

    References:
      Wang, Teng and Perdikaris, Understanding and Mitigating Gradient Flow Pathologies in
      Physics-Informed Neural Networks, 2021; Wang et al., An Expert's Guide to Training
      Physics-Informed Neural Networks, 2023.
    """
    check_range("decay", decay, 0, 1, below_maximum=True)
    check_range("every", every, 1, whole=True)

    def init(zeros: jax.Array) -> _Renewed:
        return _Renewed(zeros + 1, jnp.zeros((), jnp.int32))

    def update(gramian: Any, norms: Any, memory: _Renewed, losses: Losses) -> tuple[Any, Any]:
        del norms, losses
        lengths = _geometry.norms(gramian)
        there = lengths > 0
        count = jnp.sum(there, axis=-1, keepdims=True).astype(lengths.dtype)
        mean = divide(jnp.sum(lengths, axis=-1, keepdims=True), count)
        new = 1 / (divide(lengths, mean) + 1e-5)
        renewed = decay * memory.weights + (1 - decay) * new
        weights = jnp.where((memory.steps % every == 0) & there, renewed, memory.weights)
        steps = ((memory.steps + 1) % every).astype(memory.steps.dtype)
        return weights, _Renewed(weights, steps)

    return RememberingWeighting(init, update)


class _GradNorm(NamedTuple):
    """Weights, their optimizer's state, the losses' first values, and which losses have one."""

    weights: jax.Array
    optimizer: Any
    first: jax.Array
    seen: jax.Array


@made_by_call
def gradnorm_weighting(*, alpha: Any = 1.5, learning_rate: Any = 0.025) -> RememberingWeighting:
    r"""GradNorm: learned weights, with longer gradients for losses that lag behind.

    One step of Adam down $\sum_k |w_k n_k - \bar G r_k^\alpha|$, in which only $w_k$ is
    varied: $\bar G$ is the mean of $w_j n_j$, and $r_k$ is the loss over its first value, divided
    by the mean of these ratios. Then the weights are scaled to add up to K. They start at 1 and
    are never negative.

    Args:
      alpha: $\alpha$, how strongly the speeds of the losses are made equal; 0: equal norms.
      learning_rate: of the weights.

    Returns:
      A weighting with a memory that needs the losses' values, ``update(..., value=)``.

    Raises:
      ValueError: a number is out of range; while tracing, the values are not given.

    Examples:
      >>> import jax.numpy as jnp
      >>> import gdmam_jax as gdmam
      >>> weighting = gdmam.gradnorm_weighting(learning_rate=0.1)
      >>> gramian, memory = jnp.diag(jnp.array([9.0, 1.0])), weighting.init(jnp.zeros(2))
      >>> known = gdmam.Losses(values=jnp.ones(2))
      >>> for _ in range(30):
      ...     weights, memory = weighting.update(gramian, None, memory, known)
      >>> bool(weights[0] < 0.7), bool(weights[1] > 1.3), round(float(weights.sum()), 3)
      (True, True, 2.0)

    References:
      Chen et al., GradNorm: Gradient Normalization for Adaptive Loss Balancing in Deep Multitask
      Networks, ICML 2018.
    """
    check_range("alpha", alpha)
    check_range("learning_rate", learning_rate)
    adam = optax.adam(learning_rate)

    def init(zeros: jax.Array) -> _GradNorm:
        ones = zeros + 1
        few = jnp.zeros(zeros.shape[-1], zeros.dtype)
        return _GradNorm(ones, adam.init(ones), few, few != 0)

    def update(gramian: Any, norms: Any, memory: _GradNorm, losses: Losses) -> tuple[Any, Any]:
        del norms
        values, here = values_of("gradnorm_weighting", losses), losses.present
        there = presence(losses, values)
        first = jnp.where(memory.seen, memory.first, values)

        def mean(each: jax.Array) -> jax.Array:
            total = jnp.sum(jnp.where(there, each, 0), axis=-1, keepdims=True)
            return divide(total, jnp.sum(there).astype(values.dtype))

        weights, lengths = memory.weights, _geometry.norms(gramian)
        ratios = divide(values, first)
        speeds = divide(ratios, mean(ratios))
        wanted = mean(weights * lengths) * jnp.maximum(speeds, 0) ** alpha
        slope = lengths * jnp.sign(weights * lengths - wanted)
        new, state = learned(adam, slope, weights, memory.optimizer, here)
        new = jnp.maximum(new, 0)
        new = kept(here, divide(new * mean(weights), mean(new)), weights)
        seen = memory.seen | there
        return weights, _GradNorm(new, state, kept(here, first, memory.first), seen)

    return RememberingWeighting(init, update)


class _Cosines(NamedTuple):
    """Running means of the cosines, shape ``(..., K, K)``, and how many steps there were."""

    cosines: jax.Array
    steps: jax.Array


@made_by_call
def gradvac_weighting(*, decay: Any = 0.99, key: Any = None) -> RememberingWeighting:
    r"""GradVac: the sum, after turning gradients towards each other until their cosines are what
    they usually are.

    Where the cosine $\phi$ between a gradient and another, $g_j$, lies below its running mean
    $\hat\phi$, the gradient gets $|g_i| (\hat\phi s - \phi \hat s) / (|g_j| \hat s)$ times $g_j$,
    with the sines $s = \sqrt{1 - \phi^2}$ and $\hat s = \sqrt{1 - \hat\phi^2}$; then the cosine is
    $\hat\phi$. Each gradient meets the others one after the other, as changed by those before. With
    $\hat\phi = 0$ this is PCGrad.

    Args:
      decay: of the running means, in [0, 1]; they start at 0.
      key: a random key, or a seed, by which each step draws the order of the others; None: their
        own order.

    Returns:
      A weighting with a memory.

    Raises:
      ValueError: ``decay`` is out of range.
      TypeError: ``decay`` is not a number, or ``key`` neither a key nor a seed.

    Examples:
      >>> import jax.numpy as jnp
      >>> import gdmam_jax as gdmam
      >>> weighting = gdmam.gradvac_weighting()
      >>> gramian = jnp.array([[1.0, -1.0], [-1.0, 2.0]])
      >>> memory = weighting.init(jnp.zeros(2))
      >>> weights, memory = weighting.update(gramian, None, memory, gdmam.Losses())
      >>> [round(weight, 3) for weight in weights.tolist()]
      [2.0, 1.5]

    References:
      Wang et al., Gradient Vaccine, ICLR 2021.
    """
    check_range("decay", decay, 0, 1)
    check_key(key)

    def init(zeros: jax.Array) -> _Cosines:
        square = jnp.zeros((*zeros.shape, zeros.shape[-1]), zeros.dtype)
        return _Cosines(square, jnp.zeros((), jnp.int32))

    def update(gramian: Any, norms: Any, memory: _Cosines, losses: Losses) -> tuple[Any, Any]:
        del norms
        count = gramian.shape[-1]
        orders = jnp.broadcast_to(jnp.arange(count), (count, count))
        if key is not None:
            drawn = jax.random.fold_in(random_key(key), memory.steps)
            orders = jax.random.permutation(drawn, orders, axis=1, independent=True)

        vaccinated = functools.partial(_vaccinated, orders=orders, decay=decay)
        weights, means = over_scopes(vaccinated, gramian, memory.cosines)
        return weights, _Cosines(means, memory.steps + 1)

    return RememberingWeighting(init, update)


def _vaccinated(
    gramian: jax.Array, means: jax.Array, orders: jax.Array, decay: Any
) -> tuple[jax.Array, jax.Array]:
    """GradVac's weights of one Gramian, and the running means of the cosines."""
    own = jnp.eye(gramian.shape[-1], dtype=gramian.dtype)
    rows, lengths = jnp.arange(gramian.shape[-1]), _geometry.norms(gramian)
    decay = jnp.asarray(decay, gramian.dtype)

    def meet(carry: tuple[jax.Array, jax.Array], others: jax.Array) -> tuple[Any, None]:
        turned, means = carry
        length = safe_sqrt(jnp.sum(turned * (turned @ gramian), axis=1))
        product, other = jnp.sum(turned * gramian[others], axis=1), lengths[others]
        counts = (others != rows) & (length > 0) & (other > 0)
        cosine = jnp.clip(divide(divide(product, length), other), -1, 1)
        aim = means[rows, others]
        sine, wanted = safe_sqrt(1 - cosine**2), safe_sqrt(1 - aim**2)
        change = divide(length * (aim * sine - cosine * wanted), other * wanted)
        change = jnp.where(counts & (cosine < aim), change, 0)
        moved = jnp.where(counts, decay * aim + (1 - decay) * cosine, aim)
        return (turned + change[:, None] * own[others], means.at[rows, others].set(moved)), None

    # What has become of each gradient, as a combination of all: a row for each.
    unroll = len(rows) < _geometry.MANY
    (turned, means), _ = jax.lax.scan(meet, (own, means), orders.T, unroll=unroll)
    return jnp.sum(turned, axis=0), means


class _Squares(NamedTuple):
    """Running means of the squared norms, and what remains of their start, by loss."""

    squares: jax.Array
    remainder: jax.Array


@made_by_call
def pcd_weighting(*, tau: Any = 0.02, decay: Any = 0.999) -> RememberingWeighting:
    r"""PCD, priority-constrained descent: near the prediction gradient, a share for the others.

    With $\tilde g_k = g_k / \sqrt{v_k}$, where $v_k$ is the bias-corrected running mean of
    $|g_k|^2$, the direction is the closest to $\tilde g_0$ of those in which each alignment loss
    falls at least $\tau$ times as fast as along its own gradient,

    $$
    \min_d |d - \tilde g_0|^2
    \quad \text{with} \quad \langle \tilde g_j, d\rangle \ge \tau |\tilde g_j|^2,
    $$

    scaled to the length of $g_0$. If no direction fulfils all conditions, it is $g_0$. If the
    prediction has no gradient, it is 0. Rescaling an alignment loss changes nothing.

    Args:
      tau: $\tau$, in [0, 1]: a number, one for each alignment loss, or a mapping by name.
      decay: of the running means, in [0, 1).

    Returns:
      A weighting with a memory. `open_gate` leaves its direction as it is.

    Raises:
      ValueError: a number is out of range; while tracing, ``tau`` does not fit the losses.

    Examples:
      >>> import jax.numpy as jnp
      >>> import gdmam_jax as gdmam
      >>> weighting = gdmam.pcd_weighting(tau=0.5)
      >>> gramian = jnp.array([[1.0, 0.0], [0.0, 4.0]])
      >>> weights, _ = weighting.update(gramian, None, weighting.init(jnp.zeros(2)), gdmam.Losses())
      >>> [round(weight, 3) for weight in weights.tolist()]
      [0.894, 0.224]

    References:
      Not All Objectives Are Born Equal: Priority-Constrained Descent for Hierarchical
      Multi-Objective Optimization, TMLR 2026, arXiv 2606.29521.
    """
    check_each("tau", tau, 0, 1)
    check_range("decay", decay, 0, 1, below_maximum=True)

    def init(zeros: jax.Array) -> _Squares:
        return _Squares(zeros, jnp.ones(zeros.shape[-1], zeros.dtype))

    def update(gramian: Any, norms: Any, memory: _Squares, losses: Losses) -> tuple[Any, Any]:
        del norms
        share, remainder = newest_share(memory.remainder, decay, losses.present)
        now = jnp.diagonal(gramian, axis1=-2, axis2=-1)
        squares = memory.squares + jnp.broadcast_to(share, now.shape) * (now - memory.squares)
        shares = jnp.asarray(in_order("tau", tau, losses.names), now.dtype)
        if shares.shape not in ((), (now.shape[-1] - 1,)):
            raise ValueError(
                f"tau must be a number or {now.shape[-1] - 1} of them, one for each alignment "
                f"loss, got shape {shares.shape}"
            )
        weights = over_scopes(functools.partial(_constrained, tau=shares), gramian, squares)
        return weights, _Squares(squares, remainder)

    return RememberingWeighting(init, update)


def _constrained(gramian: jax.Array, squares: jax.Array, tau: jax.Array) -> jax.Array:
    """PCD's weights of one Gramian."""
    lengths, inverses, between = cosines(gramian)
    scaled = lengths * divide(jnp.ones_like(squares), safe_sqrt(squares))
    # Multiples x of the alignment losses' unit gradients let these losses gain pairs @ x - missing.
    pairs = between[1:, 1:]
    missing = jnp.where(lengths[1:] > 0, tau * scaled[1:] - scaled[0] * between[1:, 0], 0)
    scale = jnp.max(jnp.abs(missing))
    if missing.size == 1:
        added = jnp.maximum(missing, 0)
    else:
        added = scale * quadratic(pairs, divide(-missing, scale))
        rounding = 1e-3 if gramian.dtype == jnp.float32 else 1e-6
        added = jnp.where(jnp.all(pairs @ added - missing > -rounding * scale), added, 0)
    units = jnp.concatenate([scaled[:1], added])
    length = safe_sqrt(units @ between @ units)
    # A length that rounding may have made counts as 0.
    known = length > 10 * float(jnp.finfo(gramian.dtype).eps) ** 0.5 * jnp.max(units)
    return jnp.where(known, lengths[0] * divide(units, length), 0) * inverses
