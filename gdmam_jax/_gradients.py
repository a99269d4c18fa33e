"""Where gradients come from: several losses, one forward pass, a pull-back for each."""

import functools
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from gdmam_jax._checks import check_function, is_numeric
from gdmam_jax._geometry import matrix, norms
from gdmam_jax._losses import as_array
from gdmam_jax._numerics import pytree_dataclass, wide_dtype
from gdmam_jax._pairs import (
    GradientPair,
    check_floating,
    describe,
    halves,
    is_pair,
    named_leaves,
)
from gdmam_jax._remembering import made
from gdmam_jax._weightings import Weighting

OVERWRITTEN = "_overwrite_with_gradient"
"""Flax's collection of variables whose new values come as their gradients."""


def value_and_paired_grad(
    loss_fn: Callable[..., Any],
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
) -> Callable[..., tuple[Any, Any]]:
    r"""Values and paired gradients of two or more losses, from one forward pass.

    Like `jax.value_and_grad`, for a function that returns several scalars. The losses are evaluated
    and linearised once, and the linear map is transposed once for each loss. What only one loss
    depends on is left out of the others' backward passes.

    Args:
      loss_fn: returns ``(prediction_loss, alignment_loss)``, or
        ``((prediction_loss, alignment_loss), aux)`` with ``has_aux=True``. Each loss is a
        floating-point scalar; ``alignment_loss`` may be a tuple or dictionary of them.
      argnums: which positional argument, or arguments, to differentiate with respect to; trees of
        floating-point arrays.
      has_aux: whether ``loss_fn`` returns auxiliary data with the losses.

    Returns:
      A function with the arguments of ``loss_fn`` that returns ``(losses, pairs)``, or
      ``((losses, aux), pairs)`` with ``has_aux=True``. ``pairs`` has the structure of the argument
      with a `GradientPair` for each leaf; for several ``argnums`` a tuple of such trees.

    Raises:
      TypeError: ``loss_fn`` does not return floating-point scalars, or an argument to
        differentiate holds something other than floating-point arrays. Raised while tracing.

    Examples:
      >>> import jax.numpy as jnp
      >>> def losses(w, x):
      ...     hidden = w * x
      ...     return jnp.sum(hidden**2), jnp.sum(hidden)
      >>> (prediction, alignment), pair = value_and_paired_grad(losses)(jnp.array(2.0), 3.0)
      >>> float(pair.prediction), float(pair.alignment)
      (36.0, 3.0)
    """
    check_function("loss_fn", loss_fn)
    check_argnums(argnums)

    @functools.wraps(loss_fn, updated=())  # jax.jit's static_argnames looks at the signature
    def paired(*args: Any, **kwargs: Any) -> tuple[Any, Any]:
        positions = _differentiable(argnums, args)
        chosen = [args[position] for position in positions]

        def losses_of(*differentiated: Any) -> tuple[Any, Any]:
            new = dict(zip(positions, differentiated, strict=True))
            losses, aux = split_aux(_called(loss_fn, args, new, kwargs), has_aux)
            return _check_losses(losses), aux

        losses, pushforward, aux = jax.linearize(losses_of, *chosen, has_aux=True)
        structure: Any
        scalars, structure = jax.tree.flatten(losses)

        def pull_back(index: int) -> Any:
            pullback = jax.linear_transpose(
                lambda *tangents: jax.tree.leaves(pushforward(*tangents))[index], *chosen
            )
            return pullback(jax.lax.full_like(scalars[index], 1))

        def pair(*gradients: Any) -> GradientPair:
            return GradientPair(*structure.unflatten(gradients))

        pairs = jax.tree.map(pair, *map(pull_back, range(len(scalars))))
        pairs = tuple(map(_overwriting_merged, pairs))
        return (losses, aux) if has_aux else losses, pairs[0] if isinstance(argnums, int) else pairs

    return paired


@pytree_dataclass
class Weighing:
    """How the losses of `value_and_weighed_grad` were weighed, for logging.

    The K losses are in the order of `jax.tree.leaves`, the elements of an array one after the
    other; with ``example_argnums`` those of the first example come first. Arrays are float32, or
    float64 if a loss or a parameter is.

    Attributes:
      gramian: inner products of the losses' gradients; shape ``(K, K)``.
      weights: the losses' weights; shape ``(K,)``.
    """

    gramian: jax.Array
    weights: jax.Array


def value_and_weighed_grad(
    loss_fn: Callable[..., Any],
    weighting: Weighting,
    *,
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
    chunk: int | None = None,
    example_argnums: int | Sequence[int] = (),
) -> Callable[..., tuple[Any, Any, Weighing]]:
    r"""Values and one weighed gradient of many losses: dozens of tasks, or one for each example.

    $$g = \sum_k w_k g_k, \qquad w = \operatorname{weighting}(G, n), \qquad
    G_{jk} = \langle g_j, g_k\rangle, \quad n_k = |g_k|$$

    It takes one forward pass, K backward passes for the inner products and one for the weighed
    losses. The result is an ordinary gradient, for any optimizer. The size of the program does not
    depend on K.

    Args:
      loss_fn: returns the losses, or ``(losses, aux)`` with ``has_aux=True``: a floating-point
        array of any shape or a tree of them, each element a loss. The first is the prediction loss.
      weighting: a function ``(gramian, norms) -> weights``; the norms are those of this step. The
        weights are applied in the losses' dtype: where they may exceed what float16 holds, return
        losses in float32.
      argnums: which positional argument, or arguments, to differentiate with respect to; trees of
        floating-point arrays.
      has_aux: whether ``loss_fn`` returns auxiliary data with the losses.
      chunk: for how many losses, or examples, gradients are held at once. None: for all; their
        inner products are one matrix product for each leaf, in float32 or better. With a number,
        each gradient is pushed forward through the linearised losses instead, which takes K more
        forward passes, in the model's own precision.
      example_argnums: which positional argument, or arguments, hold examples along the first axis
        of their leaves, if the losses of an example depend on no other example. Then ``loss_fn`` is
        a function of one example, and losses and ``aux`` get a leading axis of examples. The K
        backward passes then cost as much as one over all examples, plus one more forward pass.

    Returns:
      A function with the arguments of ``loss_fn`` that returns ``(losses, gradient, weighing)``, or
      ``((losses, aux), gradient, weighing)`` with ``has_aux=True``. ``gradient`` has the
      structure and dtypes of the argument; for several ``argnums`` it is a tuple. ``weighing`` is a
      `Weighing`.

    Raises:
      TypeError: ``loss_fn`` does not return floating-point arrays, an argument to differentiate
        holds something other than floating-point arrays, or it is one of ``example_argnums``.
        Raised while tracing.
      ValueError: there are fewer than two losses, or no array to differentiate with respect to,
        ``chunk`` is less than 1, the weighting does not return K weights, or an array is sharded
        over explicit axes of a mesh.

    Examples:
      >>> import jax.numpy as jnp
      >>> import gdmam_jax as gdmam
      >>> x, y = jnp.eye(3), jnp.array([1.0, 2.0, 3.0])
      >>> def losses(w):
      ...     return (x @ w - y) ** 2
      >>> step = value_and_weighed_grad(losses, gdmam.mgda_weighting)
      >>> values, gradient, weighing = step(jnp.zeros(3))
      >>> [round(weight, 2) for weight in weighing.weights.tolist()]
      [0.73, 0.18, 0.08]

      The same from the loss of one example:

      >>> def loss(w, x, y):
      ...     return (x @ w - y) ** 2
      >>> step = value_and_weighed_grad(loss, gdmam.mgda_weighting, example_argnums=(1, 2))
      >>> _, _, weighing = step(jnp.zeros(3), x, y)
      >>> [round(weight, 2) for weight in weighing.weights.tolist()]
      [0.73, 0.18, 0.08]

    References:
      Quinton and Rey, Jacobian Descent for Multi-Objective Optimization, 2024.
    """
    check_function("loss_fn", loss_fn)
    check_memoryless(weighting)
    check_argnums(argnums)
    check_argnums(example_argnums, "example_argnums")
    if not (chunk is None or (isinstance(chunk, int) and chunk >= 1)):
        raise ValueError(f"chunk must be None or a number of losses, at least 1, got {chunk!r}")

    @functools.wraps(loss_fn, updated=())
    def weighed(*args: Any, **kwargs: Any) -> tuple[Any, Any, Weighing]:
        positions = _differentiable(argnums, args)
        over = argument_positions(example_argnums, len(args), "example_argnums")
        if both := {*positions} & {*over}:
            raise TypeError(f"argument {min(both)} is in argnums and in example_argnums")
        chosen, examples = ([args[position] for position in some] for some in (positions, over))
        if not jax.tree.leaves(chosen):
            raise ValueError(f"there is no array to differentiate with respect to: got {chosen}")

        def losses_of(chosen: Any, examples: Any) -> tuple[jax.Array, Any]:
            new = dict(zip((*positions, *over), (*chosen, *examples), strict=True))
            losses, aux = split_aux(_called(loss_fn, args, new, kwargs), has_aux)
            check_floating(losses, "the loss")
            return ravel_pytree(losses)[0], (losses, aux)

        weighing, gradient, (losses, aux) = _weighed(weighting, losses_of, chosen, examples, chunk)
        single = gradient[0] if isinstance(argnums, int) else tuple(gradient)
        return (losses, aux) if has_aux else losses, single, weighing

    return weighed


def _check_replicated(tree: Any) -> None:
    for leaf in jax.tree.leaves(tree):
        axes = [axis for axis in jax.typeof(leaf).sharding.spec if axis is not None]
        if axes:
            raise ValueError(
                f"value_and_weighed_grad takes no arrays that are sharded over explicit axes, got "
                f"one over {axes}; make the mesh with axis_types of jax.sharding.AxisType.Auto, or "
                "use value_and_paired_grad"
            )


def _weighed(
    weighting: Weighting, losses_of: Callable[..., Any], chosen: Any, examples: Any, chunk: Any
) -> tuple[Weighing, Any, Any]:
    """What `value_and_weighed_grad` does with a function of parameters and of one example."""

    def all_losses(chosen: Any) -> tuple[jax.Array, Any]:
        over = jax.vmap(losses_of, (None, 0)) if examples else losses_of
        losses, aux = over(chosen, examples)
        _check_replicated(losses)
        return losses.ravel(), aux

    _check_replicated((chosen, examples))
    losses, pushforward, aux = jax.linearize(all_losses, chosen, has_aux=True)
    if losses.size < 2:
        raise ValueError(f"the loss function must return two losses or more, got {losses.size}")
    transpose = jax.linear_transpose(pushforward, chosen)

    def pull_back(cotangents: jax.Array) -> Any:
        return transpose(cotangents)[0]

    def of_example(example: Any) -> Any:
        own, pullback, _ = jax.vjp(lambda chosen: losses_of(chosen, example), chosen, has_aux=True)
        return jax.vmap(pullback)(jnp.eye(own.size, dtype=own.dtype))[0]

    units = jnp.eye(losses.size, dtype=losses.dtype)[:, None]
    gradients_of, mapped = (of_example, examples) if examples else (jax.vmap(pull_back), units)
    dtype = wide_dtype(losses, *jax.tree.leaves(chosen))
    if chunk is None:
        stacked = jax.tree.leaves([*map(_not_overwriting, jax.vmap(gradients_of)(mapped))])
        by_loss = (leaf.reshape(losses.size, *leaf.shape[2:]) for leaf in stacked)
        gramian = functools.reduce(jnp.add, map(matrix, by_loss))
    else:
        # The transpose of the pull-back pushes forward; unlike the linearised losses themselves, it
        # also goes through functions with a backward pass of their own (jax.custom_vjp).
        push_forward = jax.linear_transpose(pull_back, losses)

        def rows(unit: Any) -> jax.Array:
            return jax.vmap(lambda gradient: push_forward(gradient)[0])(gradients_of(unit))

        gramian = jax.lax.map(rows, mapped, batch_size=chunk)
    gramian = gramian.reshape(losses.size, losses.size).astype(dtype)
    gramian = (gramian + gramian.T) / 2
    weights = as_array(
        "weighting", weighting(gramian, norms(gramian)), losses.shape, dtype, "weights"
    )
    return Weighing(gramian, weights), pull_back(weights.astype(losses.dtype)), aux


def _overwriting_merged(pairs: Any) -> Any:
    """One value instead of a pair, for what Flax overwrites with the gradient.

    FP8 layers keep their scales and largest absolute values there. The losses' largest serves all.
    """
    if not isinstance(pairs, Mapping) or OVERWRITTEN not in pairs:
        return pairs
    merged = jax.tree.map(
        lambda pair: functools.reduce(jnp.maximum, halves(pair)),
        pairs[OVERWRITTEN],
        is_leaf=is_pair,
    )
    make: Any = type(pairs)
    return make({**pairs, OVERWRITTEN: merged})


def _not_overwriting(gradients: Any) -> Any:
    """Without the new values of what Flax overwrites, which are no gradients."""
    if not isinstance(gradients, Mapping):
        return gradients
    return {name: each for name, each in gradients.items() if name != OVERWRITTEN}


def _check_argument(argument: Any, position: int) -> None:
    nnx: Any = sys.modules.get("flax.nnx")
    if nnx is not None and isinstance(argument, nnx.Module):
        raise TypeError(
            f"argument {position} of the loss function is the NNX module "
            f"{type(argument).__name__}; use the function of this name in gdmam_jax.nnx"
        )
    equinox: Any = sys.modules.get("equinox")
    is_module = equinox is not None and isinstance(argument, equinox.Module)
    advice = (
        "use eqx.partition(model, eqx.is_inexact_array)"
        if is_module
        else "give them to the loss function in another argument"
    )
    check_floating(argument, f"argument {position} of the loss function,", advice)


def check_memoryless(weighting: Any) -> None:
    """Raise a ``TypeError`` unless ``weighting`` is a function of the step's gradients alone."""
    advice = "; value_and_weighed_grad needs one without a memory"
    check_function("weighting", made(weighting), advice)


def check_argnums(argnums: Any, what: str = "argnums") -> None:
    """Raise a ``TypeError`` unless ``argnums`` is an integer or a sequence of integers."""
    several = argnums if isinstance(argnums, Sequence) else (argnums,)
    if not all(isinstance(position, int) for position in several):
        raise TypeError(f"{what} must be an integer or a sequence of them, got {argnums!r}")


def argument_positions(
    argnums: int | Sequence[int], count: int, what: str = "argnums"
) -> tuple[int, ...]:
    """Which of ``count`` positional arguments ``argnums`` means, counted from 0."""
    positions = (argnums,) if isinstance(argnums, int) else tuple(argnums)
    for position in positions:
        if not -count <= position < count:
            raise TypeError(
                f"{what}={argnums} needs an argument at position {position}, "
                f"but {count} positional arguments were given"
            )
    positions = tuple(position % count for position in positions)
    if len({*positions}) < len(positions):
        raise ValueError(f"{what}={argnums} names an argument twice")
    return positions


def _differentiable(argnums: int | Sequence[int], args: Sequence[Any]) -> tuple[int, ...]:
    """Which arguments ``argnums`` means; a ``TypeError`` if one is not of floating-point arrays."""
    positions = argument_positions(argnums, len(args))
    for position in positions:
        _check_argument(args[position], position)
    return positions


def _called(loss_fn: Any, args: Sequence[Any], new: Mapping[int, Any], kwargs: Any) -> Any:
    """What the loss function returns with new arguments at some positions."""
    return loss_fn(*(new.get(k, old) for k, old in enumerate(args)), **kwargs)


def split_aux(result: Any, has_aux: bool) -> tuple[Any, Any]:
    """The losses and the auxiliary data, or None, that a loss function returned."""
    if not has_aux:
        return result, None
    if not isinstance(result, tuple) or len(result) != 2:
        raise TypeError(
            "with has_aux=True the loss function must return (losses, aux), got "
            f"{type(result).__name__}"
        )
    return result


def _check_losses(losses: Any) -> tuple[jax.Array, Any]:
    if not isinstance(losses, tuple | list) or len(losses) != 2:
        raise TypeError(
            "the loss function must return two losses, (prediction_loss, alignment_loss), got "
            + (f"{len(losses)} values" if isinstance(losses, tuple | list) else describe(losses))
            + "; with several alignment losses return prediction, (second, third), and give the "
            "optimizer alignment_losses=2"
        )
    prediction, alignment = losses
    if isinstance(prediction, tuple | list) and len(prediction) == 2:
        raise TypeError(
            "the prediction loss is a pair of values: did the loss function return "
            "((prediction_loss, alignment_loss), aux)? Then give has_aux=True"
        )
    named = [("prediction loss", prediction)]
    named += [
        ("alignment loss" + (f" {name}" if name != "(root)" else ""), loss)
        for name, loss in named_leaves(alignment)
    ]
    for name, loss in named:
        if not (
            is_numeric(loss)
            and jnp.shape(loss) == ()
            and jnp.issubdtype(jnp.result_type(loss), jnp.floating)
        ):
            raise TypeError(f"the {name} must be a floating-point scalar, got {describe(loss)}")
    if len(named) == 1:
        raise TypeError(f"there is no alignment loss: got {alignment!r}")
    return jnp.asarray(prediction), jax.tree.map(jnp.asarray, alignment)
