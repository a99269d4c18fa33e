"""The methods an experiment compares, and how to add one.

A method says which optimizer takes the pairs of gradients, on which losses. All run through the
one loop of `program`. This adds one of your own:

```python
import optax
from gdmam_jax import summed
from gdmam_jax.ldl.laboratory import methods

methods.register(
    methods.Method(
        name="mine",
        label="Mine",
        optimizer=lambda learning_rate: summed(optax.adam(learning_rate), 1.0, 0.3),
    )
)
```
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

import gdmam_jax as gdmam
from gdmam_jax.ldl import losses

Scalar = jax.typing.ArrayLike


def keep(prediction: jax.Array, alignment: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Leave both losses as they are."""
    return prediction, alignment


def over_total(prediction: jax.Array, alignment: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Divide both losses by the value of their sum, as RDA does; no gradient through the divisor.

    Examples:
      >>> import jax.numpy as jnp
      >>> [float(loss) for loss in over_total(jnp.array(1.0), jnp.array(3.0))]
      [0.25, 0.75]
    """
    total = jax.lax.stop_gradient(prediction + alignment)
    return prediction / total, alignment / total


@dataclass(frozen=True)
class Method:
    """One way to train RDA's model.

    Attributes:
      name: on the command line.
      label: in tables and pictures.
      optimizer: makes the transformation that takes a tree of `GradientPair`s; its argument is
        the learning rate, possibly traced. With `settings`, a second one is the setting.
      prediction_loss: of `(logits, target, frequency, num_samples, weights)`.
      alignment: False leaves the alignment loss out: it is 0, and so are its gradients.
      alignment_weights: factors of the configuration's alignment weight for the recovery, target
        and similarity terms of the alignment loss.
      similarity: how the alignment loss reduces RDA's similarity term.
      rescale: of `(prediction_loss, alignment_loss)`, before gradients are taken.
      flat: whether the optimizer treats all parameters alike. It then gets them as one vector,
        which compiles twice as fast; otherwise it gets the model's tree.
      settings: numbers by name, to be tuned along with the learning rate. Methods that differ
        only in settings are compiled once.
    """

    name: str
    label: str
    optimizer: Callable[..., optax.GradientTransformation]
    prediction_loss: Callable[..., jax.Array] = losses.distribution_balanced
    alignment: bool = True
    alignment_weights: tuple[float, float, float] = (1.0, 1.0, 1.0)
    similarity: Literal["mean", "sum"] = "mean"
    rescale: Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array]] = keep
    flat: bool = False
    settings: Mapping[str, float] = field(default_factory=dict)

    def program(self) -> tuple[Any, ...]:
        """What is compiled: all but names and settings."""
        named = "name", "label", "settings"
        return tuple(getattr(self, f.name) for f in fields(self) if f.name not in named)


class ReleasedAmsgradState(NamedTuple):
    """State of `scale_by_released_amsgrad`.

    Attributes:
      steps: taken so far, int32.
      first: first moments, like the parameters.
      second: second moments.
      largest: largest second moment so far, before bias correction.
    """

    steps: jax.Array
    first: optax.Updates
    second: optax.Updates
    largest: optax.Updates


def scale_by_released_amsgrad(
    b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8
) -> optax.GradientTransformation:
    r"""AMSGrad as PyTorch has it, with which the released code of RDA and GDMAM ran.

    The maximum is taken over the second moment before bias correction. Optax takes it after, so
    with gradients that shrink, its steps stay smaller for the first thousand steps.

    $$m \leftarrow b_1 m + (1 - b_1) g, \quad v \leftarrow b_2 v + (1 - b_2) g^2, \quad
      \hat v \leftarrow \max(\hat v, v), \quad
      u = \frac{m / (1 - b_1^t)}{\sqrt{\hat v / (1 - b_2^t)} + \epsilon}$$

    Args:
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: added to the root.

    Returns:
      A transformation of plain updates.

    Examples:
      >>> import jax.numpy as jnp
      >>> transformation = scale_by_released_amsgrad()
      >>> state = transformation.init(jnp.zeros(1))
      >>> update, state = transformation.update(jnp.array([3.0]), state)
      >>> round(float(update[0]), 4)
      1.0

    References:
      Reddi, Kale, Kumar, On the Convergence of Adam and Beyond, ICLR 2018.
    """

    def init(params: optax.Params) -> ReleasedAmsgradState:
        zeros = jax.tree.map(jnp.zeros_like, params)
        return ReleasedAmsgradState(jnp.zeros((), jnp.int32), zeros, zeros, zeros)

    def update(
        updates: optax.Updates, state: ReleasedAmsgradState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, ReleasedAmsgradState]:
        del params
        steps = optax.safe_increment(state.steps)
        first = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, state.first, updates)
        second = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * g * g, state.second, updates)
        largest = jax.tree.map(jnp.maximum, state.largest, second)
        step, root = 1 / (1 - b1**steps), jax.lax.rsqrt(1 - b2**steps)
        scaled = jax.tree.map(lambda m, v: step * m / (root * jnp.sqrt(v) + eps), first, largest)
        return scaled, ReleasedAmsgradState(steps, first, second, largest)

    return optax.GradientTransformation(init, update)


def released_adamw(
    learning_rate: Scalar, weight_decay: float = 1e-4, clip: bool = True
) -> optax.GradientTransformation:
    """The optimizer RDA was released with: clipping by recent norms, AMSGrad, decay.

    Args:
      learning_rate: of the steps and the decay.
      weight_decay: decoupled.
      clip: by recent norms, see `gdmam_jax.clip_by_recent_norm`.

    Returns:
      A transformation of plain updates; `gdmam_jax.summed` makes it take pairs.
    """
    return optax.chain(
        gdmam.clip_by_recent_norm() if clip else optax.identity(),
        scale_by_released_amsgrad(),
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(learning_rate),
    )


METHODS: dict[str, Method] = {}
"""All methods by name."""


def register(method: Method) -> Method:
    """Add a method to `METHODS`, so that experiments and the command line know it.

    Args:
      method: a `Method`.

    Returns:
      The same.

    Raises:
      ValueError: its name is taken.
    """
    if method.name in METHODS:
        raise ValueError(f"there is a method {method.name!r} already")
    METHODS[method.name] = method
    return method


def find(name: str) -> Method:
    """The method of this name.

    Raises:
      ValueError: there is none; the message lists all.

    Examples:
      >>> find("rda").label
      'RDA'
    """
    if name not in METHODS:
        raise ValueError(f"unknown method {name!r}; expected one of {', '.join(METHODS)}")
    return METHODS[name]


def _prediction_only(
    optimizer: Callable[[Scalar], optax.GradientTransformation],
) -> Callable[[Scalar], optax.GradientTransformation]:
    return lambda learning_rate: gdmam.summed(optimizer(learning_rate), 1.0, 0.0)


WEIGHTINGS: dict[str, tuple[str, gdmam.Weighting]] = {
    "prediction": ("Prediction loss alone", gdmam.constant_weighting(1.0, 0.0)),
    "sum": ("Sum", gdmam.sum_weighting),
    "equal-norm": ("Equal norm", gdmam.balanced_weighting),
    "pcgrad": ("PCGrad", gdmam.pcgrad_weighting),
    "config": ("ConFIG", gdmam.config_weighting),
    "imtl-g": ("IMTL-G", gdmam.imtl_g_weighting),
    "mgda": ("MGDA", gdmam.mgda_weighting),
    "upgrad": ("UPGrad", gdmam.upgrad_weighting),
}
"""Weightings whose weighted sum AdamW with AMSGrad takes: labels and functions by name."""

CHOICES: dict[str, tuple[gdmam.Weighting, gdmam.Gate]] = {
    **{
        f"preference={number:g}": (
            gdmam.unit_weighting(preference=number),
            gdmam.priority_gate,
        )
        for number in (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
    },
    "pcgrad": (gdmam.pcgrad_weighting, gdmam.open_gate),
}
"""Weightings and gates of `gdmam`, `gdmam-preference` and `gdmam-pcgrad`, by setting."""


def _switched(setting: Scalar, functions: Iterable[Callable[..., Any]]) -> Callable[..., Any]:
    """The function of this number, possibly traced."""
    functions = tuple(functions)
    return lambda *args: jax.lax.switch(jnp.asarray(setting, jnp.int32), functions, *args)


def _weighed(learning_rate: Scalar, setting: Scalar) -> optax.GradientTransformation:
    weighting = _switched(setting, (function for _, function in WEIGHTINGS.values()))
    return gdmam.weighed(released_adamw(learning_rate, clip=False), weighting)


def _gdmam(learning_rate: Scalar, setting: Scalar) -> optax.GradientTransformation:
    weighting, gate = (
        _switched(setting, functions) for functions in zip(*CHOICES.values(), strict=True)
    )
    return gdmam.gdmam(learning_rate, weighting=weighting, gate=gate, amsgrad=True)


def _chosen(*names: str) -> dict[str, float]:
    """Settings of `_gdmam`."""
    return {name: list(CHOICES).index(name) for name in names}


for _method in (
    Method("gdmam", "GDMAM", _gdmam, flat=True, settings=_chosen("preference=1")),
    Method("gdmam-pcgrad", "GDMAM PCGrad", _gdmam, flat=True, settings=_chosen("pcgrad")),
    Method(
        "gdmam-preference",
        "GDMAM, preference tuned",
        _gdmam,
        flat=True,
        settings=_chosen(*(name for name in CHOICES if name.startswith("preference"))),
    ),
    Method(
        "gdmam-described",
        "GDMAM described",
        partial(
            gdmam.gdmam,
            weighting=gdmam.norm_weighting,
            gate=gdmam.cosine_gate,
            momentum=gdmam.ratcheted_momentum,
            momenta="separate",
            amsgrad=True,
        ),
    ),
    Method("gdmam-released", "GDMAM released", gdmam.gdmam_released, similarity="sum"),
    Method(
        "rda", "RDA", lambda rate: gdmam.summed(released_adamw(rate)), rescale=over_total, flat=True
    ),
    Method("adamw", "AdamW", _prediction_only(optax.adamw), alignment=False),
    Method(
        "ofr-fl",
        "OFR-FL",
        _prediction_only(released_adamw),
        prediction_loss=losses.focal_loss,
        alignment=False,
    ),
    Method(
        "ofr-cb",
        "OFR-CB",
        _prediction_only(released_adamw),
        prediction_loss=losses.class_balanced_loss,
        alignment=False,
    ),
    Method("ofr-db", "OFR-DB", _prediction_only(released_adamw), alignment=False),
    *(
        Method(name, label, _weighed, flat=True, settings={name: number})
        for number, (name, (label, _)) in enumerate(WEIGHTINGS.items())
    ),
):
    register(_method)
