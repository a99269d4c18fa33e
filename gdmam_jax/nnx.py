"""Gradients of several losses of `flax.nnx` modules. The only core module that imports Flax."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from flax import nnx
from flax.nnx import filterlib

from gdmam_jax import _gradients
from gdmam_jax._checks import check_function
from gdmam_jax._pairs import check_floating
from gdmam_jax._weightings import Weighting

_CONTEXT = "gdmam_jax"


def value_and_paired_grad(
    loss_fn: Callable[..., Any],
    *,
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
    wrt: filterlib.Filter = nnx.Param,
) -> Callable[..., tuple[Any, Any]]:
    """Values and paired gradients of losses of NNX modules, from one forward pass.

    Like `gdmam_jax.value_and_paired_grad`, with the reference semantics of
    `flax.nnx.value_and_grad`: what the loss function changes in a module, a `flax.nnx.Rngs` or a
    metric, in any argument, stays changed, as after one ordinary forward pass. Random streams and
    batch statistics advance once, although there are several gradients.

    Args:
      loss_fn: a function of modules and other arguments that returns
        ``(prediction_loss, alignment_loss)``, or ``((prediction_loss, alignment_loss), aux)`` with
        ``has_aux=True``. Each loss is a floating-point scalar; ``alignment_loss`` may be a tuple or
        dictionary of them.
      argnums: which positional argument, or arguments, to differentiate with respect to: modules,
        or other objects that hold NNX variables.
      has_aux: whether ``loss_fn`` returns auxiliary data with the losses.
      wrt: which of their variables to differentiate with respect to: a filter, such as
        `flax.nnx.LoRAParam`. It should be the same as the ``wrt`` of `flax.nnx.Optimizer`.

    Returns:
      A function with the arguments of ``loss_fn`` that returns ``(losses, pairs)``, or
      ``((losses, aux), pairs)`` with ``has_aux=True``. ``pairs`` is a `flax.nnx.State` of the
      chosen variables, each with a `gdmam_jax.GradientPair` for its value, as
      ``flax.nnx.Optimizer.update(model, pairs)`` takes it; for several ``argnums`` a tuple of them.

    Raises:
      TypeError: ``loss_fn`` does not return floating-point scalars, an argument to
        differentiate holds no variable that ``wrt`` chooses, or a chosen variable is not a
        floating-point array. Raised while tracing.

    Examples:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> import gdmam_jax as gdmam
      >>> import gdmam_jax.nnx
      >>> model = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
      >>> optimizer = nnx.Optimizer(model, gdmam.gdmam(0.1), wrt=nnx.Param)
      >>> def losses(model, x):
      ...     return jnp.mean((model(x) - 1) ** 2), jnp.mean(model.kernel[...] ** 2)
      >>> (prediction, alignment), pairs = gdmam.nnx.value_and_paired_grad(losses)(
      ...     model, jnp.ones((3, 2)))
      >>> pairs["kernel"].prediction.shape
      (2, 1)
      >>> _ = optimizer.update(model, pairs)
    """
    return _of_modules(_gradients.value_and_paired_grad, loss_fn, argnums, has_aux, wrt)


def value_and_weighed_grad(
    loss_fn: Callable[..., Any],
    weighting: Weighting,
    *,
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
    chunk: int | None = None,
    wrt: filterlib.Filter = nnx.Param,
) -> Callable[..., tuple[Any, Any, _gradients.Weighing]]:
    """Values and one weighed gradient of many losses of NNX modules.

    Like `gdmam_jax.value_and_weighed_grad`, with the reference semantics of
    `flax.nnx.value_and_grad`: modules, random streams and batch statistics change as in one
    ordinary forward pass. There is no ``example_argnums``, since each example would change the
    module by itself. For a module that calls do not change, split it, see below.

    Args:
      loss_fn: a function of modules and other arguments that returns the losses, or
        ``(losses, aux)`` with ``has_aux=True``: a floating-point array of any shape or a tree of
        them, each element a loss. The first is the prediction loss.
      weighting: a function ``(gramian, norms) -> weights``; the norms are those of this step.
      argnums: which positional argument, or arguments, to differentiate with respect to: modules,
        or other objects that hold NNX variables.
      has_aux: whether ``loss_fn`` returns auxiliary data with the losses.
      chunk: for how many losses gradients are held at once; None: for all.
      wrt: which of their variables to differentiate with respect to: a filter, as in
        `flax.nnx.Optimizer`.

    Returns:
      A function with the arguments of ``loss_fn`` that returns ``(losses, gradient, weighing)``, or
      ``((losses, aux), gradient, weighing)`` with ``has_aux=True``. ``gradient`` is a
      `flax.nnx.State` of the chosen variables; for several ``argnums`` a tuple of them.
      ``weighing`` is a `gdmam_jax.Weighing`.

    Raises:
      TypeError: ``loss_fn`` does not return floating-point arrays, an argument to differentiate
        holds no variable that ``wrt`` chooses, or a chosen variable is not a floating-point array.
        Raised while tracing.
      ValueError: as `gdmam_jax.value_and_weighed_grad`.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> from flax import nnx
      >>> import gdmam_jax as gdmam
      >>> import gdmam_jax.nnx
      >>> model = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
      >>> optimizer = nnx.Optimizer(model, optax.adam(0.1), wrt=nnx.Param)
      >>> def losses(model, x):
      ...     return (model(x)[:, 0] - 1) ** 2
      >>> values, gradient, weighing = gdmam.nnx.value_and_weighed_grad(
      ...     losses, gdmam.upgrad_weighting)(model, jnp.ones((3, 2)))
      >>> weighing.gramian.shape
      (3, 3)
      >>> _ = optimizer.update(model, gradient)

      The same from the loss of one example:

      >>> graphdef, params = nnx.split(model)
      >>> def loss(params, x):
      ...     return (nnx.merge(graphdef, params)(x)[0] - 1) ** 2
      >>> values, gradient, weighing = gdmam.value_and_weighed_grad(
      ...     loss, gdmam.upgrad_weighting, example_argnums=1)(params, jnp.ones((3, 2)))
      >>> _ = optimizer.update(model, gradient)
    """

    def transformed(pure: Callable[..., Any], **given: Any) -> Callable[..., Any]:
        return _gradients.value_and_weighed_grad(pure, weighting, chunk=chunk, **given)

    _gradients.check_memoryless(weighting)
    return _of_modules(transformed, loss_fn, argnums, has_aux, wrt)


def _of_modules(
    transform: Callable[..., Any],
    loss_fn: Callable[..., Any],
    argnums: int | Sequence[int],
    has_aux: bool,
    wrt: filterlib.Filter,
) -> Callable[..., Any]:
    """Lets a transformation of functions, such as `value_and_paired_grad`, take modules."""
    check_function("loss_fn", loss_fn)
    for each in argnums if isinstance(argnums, Sequence) else (argnums,):
        if isinstance(each, nnx.DiffState):
            raise TypeError(
                f"argnums must be integers, got {each}; write argnums={each.argnum}, "
                "wrt=the same filter"
            )
    _gradients.check_argnums(argnums)
    predicate = filterlib.to_predicate(wrt)

    @nnx.update_context(_CONTEXT)
    def transformed(*args: Any, **kwargs: Any) -> Any:
        positions = _gradients.argument_positions(argnums, len(args))

        def chosen_in(position: int) -> filterlib.Filter:
            return lambda path, value: path[:2] == (0, position) and predicate(path[2:], value)

        with nnx.split_context(_CONTEXT) as outside:
            graphdef, *states = outside.split(
                (args, kwargs), *(chosen_in(position) for position in positions), ...
            )
        rest = states.pop()
        for position, state in zip(positions, states, strict=True):
            if not jax.tree.leaves(state):
                raise TypeError(
                    f"argument {position} holds no variable that wrt={wrt} chooses, or only those "
                    "of an argument before it"
                )
        chosen = [state[0][position] for state, position in zip(states, positions, strict=True)]
        for position, state in zip(positions, chosen, strict=True):
            advice = "choose only such variables with wrt="
            check_floating(state, f"argument {position} of the loss function,", advice)

        def pure(*differentiated: Any) -> Any:
            chosen_states: list[nnx.State] = [
                nnx.State({0: {position: state}})
                for position, state in zip(positions, differentiated, strict=True)
            ]
            with nnx.merge_context(_CONTEXT, inner=True) as inside:
                merged_args, merged_kwargs = inside.merge(graphdef, *chosen_states, rest)
            result = loss_fn(*merged_args, **merged_kwargs)
            losses, aux = _gradients.split_aux(result, has_aux)
            with nnx.split_context(_CONTEXT) as inside:
                changed = inside.split((merged_args, merged_kwargs, aux))
            return losses, changed

        (losses, changed), gradients, *more = transform(
            pure, argnums=range(len(chosen)), has_aux=True
        )(*chosen)
        with nnx.merge_context(_CONTEXT, inner=False) as outside:
            *_, aux = outside.merge(*changed)
        single = gradients[0] if isinstance(argnums, int) else gradients
        return (losses, aux) if has_aux else losses, single, *more

    return transformed
