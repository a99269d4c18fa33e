"""Ways to train on the residual and the data loss, as optimizers of pairs."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import gdmam_jax as gdmam
from benchmarks.physics.quasi_newton import PLANS
from benchmarks.physics.soap import scale_by_soap

Rate = Callable[[Any], Any]
Losses = tuple[str, ...] | None
"""The names of several alignment losses, or None for one."""

Method = Callable[[Rate, Losses, int], optax.GradientTransformation]
"""``(rate, losses, steps of the training) -> optimizer of pairs``."""


def ours(**choices: Any) -> Method:
    return lambda rate, losses, _: gdmam.gdmam(rate, alignment_losses=losses, **choices)


def common_descent_gate(cosine: jax.Array, ratio: jax.Array) -> tuple[jax.Array, jax.Array]:
    r"""Passes everything, except where a step would raise one of the losses.

    With $k = -\cos(g_a, g_p) > 0$ and $r$ the ratio of the weighted gradients' norms, a step
    raises neither loss, to first order and before a second moment rescales the elements, if the
    factor of the parallel part lies in an interval, which is never empty:

    $$v_\parallel = clip\left(1, \frac{k / r + k^2 - 1}{k^2}, \frac{1}{r k}\right)$$

    Neither loss comes first. Where the gradients agree, or conflict without one outweighing the
    other ($k \le r \le 1 / k$), the step is that of `open_gate`. With several alignment losses, the
    parts kept against the prediction gradient are shortened together if they outweigh it and what
    agrees with it, see `priority_gate`.

    Args:
      cosine: of the angles between prediction and alignment gradients, shape ``(..., J)`` for J
        alignment losses; ``()`` for one.
      ratio: $r = w_a |g_a| / (w_p |g_p|)$, the same shape.

    Returns:
      ``(parallel, orthogonal)``, the factors of the alignment gradient's two parts.

    Examples:
      >>> import jax.numpy as jnp
      >>> ratios = jnp.array([0.5, 1.0, 2.0])
      >>> for ratio in ratios:
      ...     print(round(float(common_descent_gate(jnp.array(-0.8), ratio)[0]), 4))
      1.9375
      1.0
      0.625
    """
    opposed = (cosine < 0) & (ratio > 0)
    k, r = jnp.where(opposed, -cosine, 1), jnp.where(opposed, ratio, 1)
    kept = jnp.clip(1, (k / r + k**2 - 1) / k**2, 1 / (r * k))
    if cosine.ndim and cosine.shape[-1] > 1:
        # In units of the weighed prediction gradient.
        agreeing = 1 + jnp.sum(ratio * jnp.maximum(cosine, 0), axis=-1, keepdims=True)
        opposing = jnp.sum(jnp.where(opposed, r * k * kept, 0), axis=-1, keepdims=True)
        kept = kept * jnp.minimum(1, agreeing / jnp.where(opposing > 0, opposing, 1))
    return jnp.where(opposed, kept, 1), jnp.ones_like(cosine)


def gradients(pairs: Any) -> list[list[jax.Array]]:
    """The leaves of each loss's gradient, the prediction's first."""
    leaves = jax.tree.leaves(pairs, is_leaf=lambda leaf: isinstance(leaf, gdmam.GradientPair))
    return [list(each) for each in zip(*map(jax.tree.leaves, leaves), strict=True)]


OPTIMIZERS: dict[str, Callable[[Rate], optax.GradientTransformation]] = {
    "adamw": optax.adamw,
    # Each element moves by the rate at each step, so Lion gets a tenth of the others' rate.
    "lion": lambda rate: optax.lion(lambda count: 0.1 * rate(count)),
    "muon": optax.contrib.muon,
    "soap": lambda rate: optax.chain(scale_by_soap(), optax.scale_by_learning_rate(rate)),
}
"""Optimizers of one gradient, by name: functions of the rate."""


Front = Callable[[optax.GradientTransformation, Losses, int], optax.GradientTransformation]
"""``(optimizer of one gradient, losses, steps of the training) -> optimizer of pairs``."""


def _weighed(weighting: gdmam.Weighting | gdmam.RememberingWeighting) -> Front:
    return lambda optimizer, losses, _: gdmam.weighed(optimizer, weighting, alignment_losses=losses)


def _fixed(data_weight: float) -> Front:
    def front(optimizer: optax.GradientTransformation, losses: Losses, steps: int) -> Any:
        # The residual comes last.
        weights = [data_weight] * len(losses or (None,)) + [1.0]
        return _weighed(gdmam.constant_weighting(*weights))(optimizer, losses, steps)

    return front


def _gradient_norms(
    optimizer: optax.GradientTransformation, losses: Losses, steps: int
) -> optax.GradientTransformation:
    """Weights as jaxpi's, which are renewed every 1,000 of 200,000 steps: here the same share."""
    weighting = gdmam.gradient_norm_weighting(every=max(1, steps // 200))
    return _weighed(weighting)(optimizer, losses, steps)


def _allocated(gate: gdmam.Gate) -> Front:
    def front(optimizer: optax.GradientTransformation, losses: Losses, _: int) -> Any:
        link = gdmam.allocate(gdmam.unit_weighting, gate, alignment_losses=losses)
        return optax.chain(link, optimizer)

    return front


FRONTS: dict[str, Front] = {
    "summed": _fixed(1.0),
    "data x 10": _fixed(10.0),
    "data x 100": _fixed(100.0),
    "gradient norms": _gradient_norms,
    "allocated": _allocated(gdmam.priority_gate),
    "allocated open": _allocated(gdmam.open_gate),
}
"""What makes one gradient out of a pair, before an optimizer takes it."""


def behind(front: Front, optimizer: Callable[[Rate], optax.GradientTransformation]) -> Method:
    return lambda rate, losses, steps: front(optimizer(rate), losses, steps)


WEIGHED: dict[str, Front] = {
    "summed": _fixed(1.0),
    "data x 10": _fixed(10.0),
    "data x 100": _fixed(100.0),
    "pcgrad": _weighed(gdmam.pcgrad_weighting),
    "pcd": _weighed(gdmam.pcd_weighting),
    "pcd share 0.3": _weighed(gdmam.pcd_weighting(tau=0.3)),
    "imtl-g": _weighed(gdmam.imtl_g_weighting),
    "config": _weighed(gdmam.config_weighting),
}
"""Weightings in front of Adam."""

SLOWER = " b1 0.95"
"""The end of a method's name where Adam has the momentum of `gdmam_jax.gdmam`, not Optax's 0.9."""

OURS: dict[str, dict[str, Any]] = {
    "gdmam": {},
    "gdmam open": {"gate": gdmam.open_gate},
    "gdmam conflict": {"gate": gdmam.conflict_gate},
    "gdmam common descent": {"gate": common_descent_gate},
    "gdmam balanced": {"weighting": gdmam.balanced_weighting},
    "gdmam pcgrad": {"weighting": gdmam.pcgrad_weighting, "gate": gdmam.open_gate},
    "gdmam relative": {"momentum": gdmam.relative_momentum, "momenta": "separate"},
    "gdmam described": {
        "weighting": gdmam.norm_weighting,
        "gate": gdmam.cosine_gate,
        "momentum": gdmam.ratcheted_momentum,
        "momenta": "separate",
    },
}
"""What `gdmam_jax.gdmam` is given: nothing, or other choices."""

METHODS: dict[str, Method] = {
    **{name: behind(front, optax.adam) for name, front in WEIGHED.items()},
    **{
        name + SLOWER: behind(WEIGHED[name], functools.partial(optax.adam, b1=0.95))
        for name in ("summed", "pcgrad", "imtl-g", "config")
    },
    **{
        f"{name} {end}": behind(front, optimizer)
        for name, optimizer in OPTIMIZERS.items()
        for end, front in FRONTS.items()
    },
    **{name: ours(**choices) for name, choices in OURS.items()},
}
"""The methods that are optimizers of pairs, by name."""

RESIDUAL_FIRST = " residual first"
"""The end of a method's name where the losses' roles are exchanged: the residual is the
prediction."""

MOMENTUM_CONFIG = "m-config"
"""M-ConFIG, which evaluates one loss at a time: see `momentum_config`."""

ALL_METHODS = [
    *METHODS,
    *(name + RESIDUAL_FIRST for name in OURS),
    MOMENTUM_CONFIG,
    *PLANS,
]
CHOICES = [name for name in ALL_METHODS if name.startswith("gdmam ")]
"""The default with one choice changed."""


class MomentumState(NamedTuple):
    """What M-ConFIG remembers.

    Attributes:
      seen: how many gradients of each loss there were.
      count: how many updates, once each loss had been seen.
      momenta: running means of each loss's gradients, shape ``(losses, parameters)``.
      combined: the momentum that the last direction stands for.
      second: the running mean of the squared gradients that would have made it.
    """

    seen: jax.Array
    count: jax.Array
    momenta: jax.Array
    combined: jax.Array
    second: jax.Array


class Momentum(NamedTuple):
    """``init(params) -> state`` and ``update(gradient, state, which) -> (update, state)``."""

    init: Callable[[jax.Array], MomentumState]
    update: Callable[[jax.Array, MomentumState, int], tuple[jax.Array, MomentumState]]


def momentum_config(losses: int, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8) -> Momentum:
    r"""M-ConFIG: ConFIG of the momenta of gradients that come one loss at a time.

    With bias-corrected momenta $\hat m_k$ of the losses and $d = ConFIG(\hat m)$, the momentum
    $m = (1 - b_1^t) d$ is as if made by the gradient $g = (m - b_1 m_{before}) / (1 - b_1)$, whose
    squares the second moment follows; the update is $d / (\sqrt{\hat v} + eps)$. It is 0 until each
    loss has been seen, as in the authors' `PseudoMomentumOperator`, which this reproduces.

    Args:
      losses: how many.
      b1: decay of the momenta.
      b2: decay of the second moment.
      eps: added to its root.

    Returns:
      Functions of vectors of parameters and gradients.

    References:
      Liu, Chu and Thuerey, ConFIG: Towards Conflict-free Training of Physics Informed Neural
      Networks, ICLR 2025.
    """

    def init(params: jax.Array) -> MomentumState:
        zeros, count = jnp.zeros_like(params), jnp.zeros((), jnp.int32)
        momenta = jnp.zeros((losses, *params.shape), params.dtype)
        return MomentumState(jnp.zeros(losses, jnp.int32), count, momenta, zeros, zeros)

    def corrected(moment: jax.Array, decay: float, count: jax.Array) -> jax.Array:
        # 1 - decay^count to all digits, also in float32.
        return moment / -jnp.expm1(jnp.maximum(count, 1) * np.log(decay))

    def update(
        gradient: jax.Array, state: MomentumState, which: int
    ) -> tuple[jax.Array, MomentumState]:
        seen = state.seen.at[which].add(1)
        momenta = state.momenta.at[which].set(b1 * state.momenta[which] + (1 - b1) * gradient)
        ready = jnp.all(seen > 0)
        count = state.count + ready
        known = corrected(momenta, b1, seen[:, None])
        weights = gdmam.config_weighting(known @ known.T, None)
        direction = jnp.where(ready, weights @ known, 0)
        combined = direction * -jnp.expm1(count * np.log(b1))
        implied = (combined - b1 * state.combined) / (1 - b1)
        second = b2 * state.second + (1 - b2) * implied**2
        scaled = direction / (jnp.sqrt(corrected(second, b2, count)) + eps)
        return scaled, MomentumState(seen, count, momenta, combined, second)

    return Momentum(init, update)
