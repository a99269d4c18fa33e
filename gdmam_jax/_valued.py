r"""Weightings by the losses' values: they need no gradients, and so one backward pass is enough.

In an optimizer of pairs they get the values that ``update`` is given as ``value=``. Without pairs,
compute the weights inside the loss, and use an ordinary optimizer:

>>> import jax, jax.numpy as jnp, optax
>>> import gdmam_jax as gdmam
>>> def losses(w):
...     return jnp.sum((w - 1) ** 2), 100 * jnp.sum(w**2)
>>> weighting, optimizer = gdmam.uncertainty_weighting(), optax.adam(0.1)
>>> def weighed_loss(w, memory):
...     values = jnp.stack(losses(w))
...     known = gdmam.Losses(values=jax.lax.stop_gradient(values))
...     weights, memory = weighting.update(None, None, memory, known)
...     return weights @ values, memory
>>> w, memory = jnp.zeros(2), weighting.init(jnp.zeros(2))
>>> state = optimizer.init(w)
>>> gradient, memory = jax.grad(weighed_loss, has_aux=True)(w, memory)
>>> updates, state = optimizer.update(gradient, state, w)
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from gdmam_jax._checks import check_each, check_key, check_range
from gdmam_jax._losses import Losses
from gdmam_jax._numerics import divide, random_key
from gdmam_jax._remembering import (
    RememberingWeighting,
    check_lowest,
    each_loss,
    kept,
    learned,
    made_by_call,
    presence,
    values_of,
)
from gdmam_jax._settings import in_order
from gdmam_jax._weightings import preferences


def _losses_alone(zeros: jax.Array) -> jax.Array:
    """Zeros of shape ``(K,)``: values have no scopes."""
    return jnp.zeros(zeros.shape[-1], zeros.dtype)


def _logarithms(values: jax.Array, lowest: Any, losses: Losses) -> jax.Array:
    """The logarithms of the values above their lowest, kept away from 0."""
    above, tiny = values - each_loss("lowest", lowest, losses, values), jnp.finfo(values.dtype).tiny
    # Not `jnp.maximum`, which multiplies derivatives by 0, and the infinite ones of a loss at 0.
    return jnp.log(jnp.where(above > tiny, above, tiny))


def _count(losses: Losses, like: jax.Array) -> jax.Array:
    return jnp.sum(presence(losses, like), dtype=like.dtype)


class _Learned(NamedTuple):
    """What is learned, a number for each loss, and the state of the optimizer that learns it."""

    values: jax.Array
    optimizer: Any


@made_by_call
def uncertainty_weighting(*, learning_rate: Any = 0.01) -> RememberingWeighting:
    r"""Uncertainty weighting: each loss is divided by a learned variance.

    $w_k = \frac12 e^{-s_k}$, where the log-variances minimise
    $\sum_k \frac12 (e^{-s_k} \ell_k + s_k)$, one step of Adam at a time, starting at 0. They tend
    to $\ell_k = e^{s_k}$, and each weighed loss to $\frac12$. The method promises nothing about
    directions.

    Args:
      learning_rate: of the log-variances.

    Returns:
      A weighting that needs the losses' values, ``update(..., value=)``.

    Raises:
      ValueError: ``learning_rate`` is out of range; while tracing, the values are not given.

    Examples:
      >>> import jax.numpy as jnp
      >>> import gdmam_jax as gdmam
      >>> weighting = gdmam.uncertainty_weighting(learning_rate=0.1)
      >>> known, memory = gdmam.Losses(values=jnp.array([4.0, 0.25])), weighting.init(jnp.zeros(2))
      >>> for _ in range(100):
      ...     weights, memory = weighting.update(None, None, memory, known)
      >>> [round(weight, 2) for weight in weights.tolist()]
      [0.12, 2.0]

    References:
      Kendall, Gal and Cipolla, Multi-Task Learning Using Uncertainty to Weigh Losses, CVPR 2018.
    """
    check_range("learning_rate", learning_rate)
    adam = optax.adam(learning_rate)

    def init(zeros: jax.Array) -> _Learned:
        start = _losses_alone(zeros)
        return _Learned(start, adam.init(start))

    def update(gramian: Any, norms: Any, memory: _Learned, losses: Losses) -> tuple[Any, Any]:
        del gramian, norms
        values = values_of("uncertainty_weighting", losses)
        precision = jnp.exp(-memory.values)
        slope = (1 - precision * values) / 2
        return precision / 2, _Learned(*learned(adam, slope, *memory, losses.present))

    return RememberingWeighting(init, update)


class _Famo(NamedTuple):
    """Logits, their optimizer's state, the last values' logarithms, and which losses have one."""

    logits: jax.Array
    optimizer: Any
    logarithms: jax.Array
    seen: jax.Array


@made_by_call
def famo_weighting(
    *, learning_rate: Any = 0.025, weight_decay: Any = 1e-3, lowest: Any = 0.0
) -> RememberingWeighting:
    r"""FAMO: the logarithms of all losses fall at the same speed.

    With $z = \operatorname{softmax}(\xi)$, $w_k = c z_k / (\ell_k - b_k)$, where $c$ makes the
    weights add up to 1: the gradient of $\sum_k z_k \log(\ell_k - b_k)$. The logits follow, by
    Adam, how much less than the others each logarithm fell from one step to the next. The
    published method takes both values on one batch, with another forward pass. Here the second is
    the next step's value, which is the same if every batch holds all data.

    Args:
      learning_rate: of the logits.
      weight_decay: of the logits.
      lowest: $b_k$, a bound below each loss: a number, one for each loss, or a mapping by name.

    Returns:
      A weighting that needs the losses' values, ``update(..., value=)``.

    Raises:
      ValueError: a number is out of range; while tracing, the values are not given, or ``lowest``
        does not fit the losses.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> import gdmam_jax as gdmam
      >>> optimizer = gdmam.weighed(optax.adam(0.1), gdmam.famo_weighting())
      >>> def losses(w):
      ...     return jnp.sum((w - 2) ** 2), jnp.sum((w - 1) ** 2)
      >>> w = jnp.zeros(1)
      >>> state = optimizer.init(w)
      >>> values, pairs = gdmam.value_and_paired_grad(losses)(w)
      >>> updates, state = optimizer.update(pairs, state, w, value=values)
      >>> [round(weight, 3) for weight in state[0].weights.tolist()]
      [0.2, 0.8]

    References:
      Liu et al., FAMO: Fast Adaptive Multitask Optimization, NeurIPS 2023.
    """
    check_range("learning_rate", learning_rate)
    check_range("weight_decay", weight_decay)
    check_lowest(lowest)
    # The root of a second moment of 0 has no derivative, and an absent loss leaves it at 0.
    smallest = float(jnp.finfo(jnp.float32).tiny)
    adam = optax.adam(learning_rate, eps_root=smallest)
    adam = optax.chain(optax.add_decayed_weights(weight_decay), adam)

    def init(zeros: jax.Array) -> _Famo:
        start = _losses_alone(zeros)
        return _Famo(start, adam.init(start), jnp.copy(start), jnp.zeros(start.shape, bool))

    def update(gramian: Any, norms: Any, memory: _Famo, losses: Losses) -> tuple[Any, Any]:
        del gramian, norms
        here = losses.present
        logarithms = _logarithms(values_of("famo_weighting", losses), lowest, losses)
        there = presence(losses, logarithms)
        both = memory.seen & there
        fallen = jnp.where(both, memory.logarithms - logarithms, 0)
        shares = jax.nn.softmax(memory.logits, where=both)
        slope = shares * (fallen - jnp.sum(shares * fallen))
        logits, state = learned(adam, slope, memory.logits, memory.optimizer, both)
        # Before there are two values of any loss there is nothing to learn from.
        state = kept(jnp.any(both), state, memory.optimizer)
        weights = jax.nn.softmax(logits - logarithms, where=here)
        last = kept(here, logarithms, memory.logarithms)
        return weights, _Famo(logits, state, last, memory.seen | there)

    return RememberingWeighting(init, update)


class _Epochs(NamedTuple):
    """This epoch's sums and counts of values, two epochs' means, and how many epochs and steps."""

    totals: jax.Array
    counts: jax.Array
    last: jax.Array
    before: jax.Array
    epochs: jax.Array
    steps: jax.Array


@made_by_call
def dwa_weighting(*, temperature: Any = 2.0, every: Any = 1) -> RememberingWeighting:
    r"""Dynamic weight average: a loss that falls more slowly than the others counts more.

    $w_k = K \operatorname{softmax}_k(L_k(t - 1) / (L_k(t - 2) T))$, with $L_k(t)$ the loss's mean
    over epoch $t$. The weights are 1 in the first two epochs.

    Args:
      temperature: $T$; the larger, the more equal the weights.
      every: steps in an epoch.

    Returns:
      A weighting that needs the losses' values, ``update(..., value=)``.

    Raises:
      ValueError: a number is out of range; while tracing, the values are not given.

    Examples:
      >>> import jax.numpy as jnp
      >>> import gdmam_jax as gdmam
      >>> weighting = gdmam.dwa_weighting()
      >>> memory = weighting.init(jnp.zeros(2))
      >>> for values in ([2.0, 2.0], [2.0, 1.0], [2.0, 0.5]):
      ...     known = gdmam.Losses(values=jnp.array(values))
      ...     weights, memory = weighting.update(None, None, memory, known)
      >>> [round(weight, 3) for weight in weights.tolist()]
      [1.124, 0.876]

    References:
      Liu, Johns and Davison, End-to-End Multi-Task Learning with Attention, CVPR 2019.
    """
    check_range("temperature", temperature, above_minimum=True)
    check_range("every", every, 1, whole=True)

    def init(zeros: jax.Array) -> _Epochs:
        start = _losses_alone(zeros)
        none = jnp.zeros(start.shape, jnp.int32)
        last, before, epochs = map(jnp.copy, (start, start, none))
        return _Epochs(start, none, last, before, epochs, jnp.zeros((), jnp.int32))

    def update(gramian: Any, norms: Any, memory: _Epochs, losses: Losses) -> tuple[Any, Any]:
        del gramian, norms
        values, here = values_of("dwa_weighting", losses), losses.present
        ratio = jnp.where(memory.epochs >= 2, divide(memory.last, memory.before), 1)
        weights = _count(losses, values) * jax.nn.softmax(ratio / temperature, where=here)
        totals = memory.totals + kept(here, values, 0)
        counts = memory.counts + presence(losses, values).astype(jnp.int32)
        steps = memory.steps + 1
        ends = steps % every == 0
        new = ends & (counts > 0)
        return weights, _Epochs(
            totals=jnp.where(ends, 0, totals),
            counts=jnp.where(ends, 0, counts),
            last=jnp.where(new, divide(totals, counts.astype(totals.dtype)), memory.last),
            before=jnp.where(new, memory.last, memory.before),
            epochs=jnp.minimum(memory.epochs + new.astype(jnp.int32), 2),
            steps=jnp.where(ends, 0, steps),
        )

    return RememberingWeighting(init, update)


class _Lookback(NamedTuple):
    """Weights, each loss's first and last value, which losses have any, and how many draws."""

    weights: jax.Array
    first: jax.Array
    last: jax.Array
    seen: jax.Array
    draws: jax.Array


@made_by_call
def relobralo_weighting(
    *, temperature: Any = 0.1, decay: Any = 0.999, lookback: Any = 0.999, key: Any = None
) -> RememberingWeighting:
    r"""ReLoBRaLo: a loss that has fallen less than the others counts more, by running means.

    With $\lambda_k(t, s) = K \operatorname{softmax}_k(\ell_k(t) / (\ell_k(s) T))$ the weights are
    $w(t) = \alpha u + (1 - \alpha) \lambda(t, t - 1)$ with
    $u = \rho w(t - 1) + (1 - \rho) \lambda(t, 0)$, where $\rho$ is 1 with a probability near
    1. Otherwise it is 0, and the weights forget all but the start. They are 1 at first.

    Args:
      temperature: $T$; the larger, the more equal the weights.
      decay: $\alpha$, of the running mean, in [0, 1].
      lookback: the probability that $\rho$ is 1.
      key: a random key, or a seed; None for seed 0.

    Returns:
      A weighting that needs the losses' values, ``update(..., value=)``.

    Raises:
      ValueError: a number is out of range; while tracing, the values are not given.
      TypeError: ``key`` is neither a key nor a seed.

    Examples:
      >>> import jax.numpy as jnp
      >>> import gdmam_jax as gdmam
      >>> weighting = gdmam.relobralo_weighting(temperature=1.0, decay=0.0)
      >>> memory = weighting.init(jnp.zeros(2))
      >>> for values in ([1.0, 1.0], [1.0, 0.5]):
      ...     known = gdmam.Losses(values=jnp.array(values))
      ...     weights, memory = weighting.update(None, None, memory, known)
      >>> [round(weight, 3) for weight in weights.tolist()]
      [1.245, 0.755]

    References:
      Bischof and Kraus, Multi-Objective Loss Balancing for Physics-Informed Deep Learning, 2021.
    """
    check_range("temperature", temperature, above_minimum=True)
    check_range("decay", decay, 0, 1)
    check_range("lookback", lookback, 0, 1)
    check_key(key)

    def init(zeros: jax.Array) -> _Lookback:
        start = _losses_alone(zeros)
        seen, draws = jnp.zeros(start.shape, bool), jnp.zeros((), jnp.int32)
        return _Lookback(start + 1, start, jnp.copy(start), seen, draws)

    def update(gramian: Any, norms: Any, memory: _Lookback, losses: Losses) -> tuple[Any, Any]:
        del gramian, norms
        values, here = values_of("relobralo_weighting", losses), losses.present
        first = jnp.where(memory.seen, memory.first, values)
        last = jnp.where(memory.seen, memory.last, values)

        def balanced(since: jax.Array) -> jax.Array:
            return _count(losses, values) * jax.nn.softmax(
                divide(values, since) / temperature, where=here
            )

        drawn = jax.random.fold_in(random_key(key), memory.draws)
        kept_on = jax.random.bernoulli(drawn, lookback)
        past = jnp.where(kept_on, memory.weights, balanced(first))
        mixed = decay * past + (1 - decay) * balanced(last)
        weights = kept(here, jnp.where(memory.seen, mixed, 1), memory.weights)
        seen = memory.seen | presence(losses, values)
        return weights, _Lookback(
            weights,
            kept(here, first, memory.first),
            kept(here, values, memory.last),
            seen,
            memory.draws + 1,
        )

    return RememberingWeighting(init, update)


class _Previous(NamedTuple):
    """Each loss's last value, and whether there was one."""

    values: jax.Array
    seen: jax.Array


@made_by_call
def softadapt_weighting(*, beta: Any = 0.1, scaled: bool = True) -> RememberingWeighting:
    r"""SoftAdapt: a loss that falls less than the others, or rises, counts more.

    $w_k = K \operatorname{softmax}_k(\beta s_k)$ with the change $s_k = \ell_k(t) - \ell_k(t - 1)$,
    or $s_k / \sum_j |s_j|$ if ``scaled``. The weights are 1 in the first step. They add up to $K$,
    like those of the plain sum; in the paper they add up to 1.

    Args:
      beta: $\beta$; the larger, the less equal the weights. Below 0, losses that fall count more.
      scaled: whether changes are divided by the sum of all losses' changes. The losses' units count
        either way.

    Returns:
      A weighting that needs the losses' values, ``update(..., value=)``.

    Raises:
      ValueError: ``beta`` is out of range; while tracing, the values are not given.

    Examples:
      >>> import jax.numpy as jnp
      >>> import gdmam_jax as gdmam
      >>> weighting = gdmam.softadapt_weighting(beta=1.0)
      >>> memory = weighting.init(jnp.zeros(2))
      >>> for values in ([2.0, 2.0], [2.0, 1.0]):
      ...     known = gdmam.Losses(values=jnp.array(values))
      ...     weights, memory = weighting.update(None, None, memory, known)
      >>> [round(weight, 3) for weight in weights.tolist()]
      [1.462, 0.538]

    References:
      Heydari, Thompson and Mehmood, SoftAdapt: Techniques for Adaptive Loss Weighting of Neural
      Networks with Multi-Part Loss Functions, 2019.
    """
    check_range("beta", beta, -jnp.inf, above_minimum=True)

    def init(zeros: jax.Array) -> _Previous:
        start = _losses_alone(zeros)
        return _Previous(start, jnp.zeros(start.shape, bool))

    def update(gramian: Any, norms: Any, memory: _Previous, losses: Losses) -> tuple[Any, Any]:
        del gramian, norms
        values, here = values_of("softadapt_weighting", losses), losses.present
        change = kept(here, jnp.where(memory.seen, values - memory.values, 0), 0)
        if scaled:
            change = divide(change, jnp.sum(jnp.abs(change)))
        weights = _count(losses, values) * jax.nn.softmax(beta * change, where=here)
        seen = memory.seen | presence(losses, values)
        return weights, _Previous(kept(here, values, memory.values), seen)

    return RememberingWeighting(init, update)


@made_by_call
def stch_weighting(
    *, mu: Any = 0.1, preference: Any = 1.0, lowest: Any = 0.0
) -> RememberingWeighting:
    r"""Smooth Tchebycheff: the largest loss counts, softly.

    $w_k = \lambda_k \operatorname{softmax}_k(\lambda_k (\ell_k - z_k) / \mu)$: the gradient of
    $\mu \log \sum_k e^{\lambda_k (\ell_k - z_k) / \mu}$, which tends to the largest
    $\lambda_k (\ell_k - z_k)$ as $\mu$ falls. With positive $\lambda$ its minima are
    Pareto-optimal; every Pareto-optimal point is a minimum for some $\lambda$ if $\mu$ is small
    enough.

    Args:
      mu: $\mu$, above 0.
      preference: $\lambda_k$ of an alignment loss, relative to the prediction's: see
        `unit_weighting`. They are divided by their sum.
      lowest: $z_k$, the best value of each loss: a number, one for each loss, or a mapping by name.

    Returns:
      A weighting that needs the losses' values, ``update(..., value=)``. It has no memory.

    Raises:
      ValueError: a number is out of range; while tracing, the values are not given, or
        ``preference`` or ``lowest`` does not fit the losses.

    Examples:
      >>> import jax.numpy as jnp
      >>> import gdmam_jax as gdmam
      >>> weighting = gdmam.stch_weighting(mu=1.0)
      >>> known = gdmam.Losses(values=jnp.array([3.0, 1.0]))
      >>> weights, _ = weighting.update(None, None, weighting.init(jnp.zeros(2)), known)
      >>> [round(weight, 3) for weight in weights.tolist()]
      [0.366, 0.134]

    References:
      Lin et al., Smooth Tchebycheff Scalarization for Multi-Objective Optimization, ICML 2024.
    """
    check_range("mu", mu, above_minimum=True)
    check_each("preference", preference)
    check_lowest(lowest)

    def update(gramian: Any, norms: Any, memory: Any, losses: Losses) -> tuple[Any, Any]:
        del gramian, norms
        values, here = values_of("stch_weighting", losses), losses.present
        wanted = preferences(in_order("preference", preference, losses.names), values)
        wanted = kept(here, wanted, 0)
        wanted = divide(wanted, jnp.sum(wanted))
        above = values - each_loss("lowest", lowest, losses, values)
        return wanted * jax.nn.softmax(wanted * above / mu, where=here), memory

    return RememberingWeighting(lambda zeros: (), update)


@made_by_call
def geometric_mean_weighting(*, lowest: Any = 0.0) -> RememberingWeighting:
    r"""The gradient of the losses' geometric mean: each loss counts by its logarithm.

    $w_k = \frac{1}{K \ell_k} \prod_j \ell_j^{1/K}$, of the losses' values above their lowest. The
    direction does not change when a loss is rescaled.

    Args:
      lowest: a bound below each loss: a number, one for each loss, or a mapping by name.

    Returns:
      A weighting that needs the losses' values, ``update(..., value=)``. It has no memory.

    Raises:
      ValueError: ``lowest`` is not finite; while tracing, the values are not given, or ``lowest``
        does not fit the losses.

    Examples:
      >>> import jax.numpy as jnp
      >>> import gdmam_jax as gdmam
      >>> weighting = gdmam.geometric_mean_weighting()
      >>> known = gdmam.Losses(values=jnp.array([4.0, 1.0]))
      >>> weights, _ = weighting.update(None, None, weighting.init(jnp.zeros(2)), known)
      >>> [round(weight, 3) for weight in weights.tolist()]
      [0.25, 1.0]

    References:
      Chennupati et al., MultiNet++: Multi-Stream Feature Aggregation and Geometric Loss Strategy
      for Multi-Task Learning, CVPR workshops 2019.
    """
    check_lowest(lowest)

    def update(gramian: Any, norms: Any, memory: Any, losses: Losses) -> tuple[Any, Any]:
        del gramian, norms
        values, here = values_of("geometric_mean_weighting", losses), losses.present
        logarithms = _logarithms(values, lowest, losses)
        shares = jax.nn.softmax(jnp.zeros_like(values), where=here)
        return shares * jnp.exp(jnp.sum(shares * logarithms) - logarithms), memory

    return RememberingWeighting(lambda zeros: (), update)


@made_by_call
def random_weighting(*, key: Any = None) -> RememberingWeighting:
    r"""Random weights, new at every step.

    $w = \operatorname{softmax}(\epsilon)$, with normal $\epsilon$. It is a baseline that any
    method should beat.

    Args:
      key: a random key, or a seed; None for seed 0.

    Returns:
      A weighting whose memory counts the draws. It needs neither gradients nor values.

    Raises:
      TypeError: ``key`` is neither a key nor a seed.

    Examples:
      >>> import jax.numpy as jnp
      >>> import gdmam_jax as gdmam
      >>> weighting = gdmam.random_weighting()
      >>> memory = weighting.init(jnp.zeros(2))
      >>> first, memory = weighting.update(None, None, memory, gdmam.Losses())
      >>> second, _ = weighting.update(None, None, memory, gdmam.Losses())
      >>> bool(first[0] != second[0]), round(float(first.sum()), 3)
      (True, 1.0)

    References:
      Lin et al., Reasonable Effectiveness of Random Weighting, TMLR 2022.
    """
    check_key(key)

    def init(zeros: jax.Array) -> dict[str, jax.Array]:
        return {"draws": jnp.zeros((), jnp.int32), "like": _losses_alone(zeros)}

    def update(gramian: Any, norms: Any, memory: Any, losses: Losses) -> tuple[Any, Any]:
        del gramian, norms
        drawn = jax.random.fold_in(random_key(key), memory["draws"])
        logits = jax.random.normal(drawn, memory["like"].shape, memory["like"].dtype)
        return jax.nn.softmax(logits, where=losses.present), memory | {"draws": memory["draws"] + 1}

    return RememberingWeighting(init, update)
