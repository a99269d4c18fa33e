"""Trains one problem with PyTorch and with JAX, and records the parameters after every step."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch

import gdmam_jax as gdmam
from tests.parity import reference
from tests.parity.problems import (
    Problem,
    golden_problem,
    made_up_convolutional,
    made_up_rda,
)

LEARNING_RATE = 3e-3
WEIGHT_DECAY = 0.01
CLIP = 4.0
"""What both gradients together may have as a norm, in runs of the allocated form."""

DESCRIBED = {
    "weighting": gdmam.norm_weighting,
    "gate": gdmam.cosine_gate,
    "momentum": gdmam.ratcheted_momentum,
    "momenta": "separate",
}
"""The choices of the method's description, in the allocated form."""

Record = dict[str, np.ndarray]

FORMS: dict[str, tuple[Callable[[], Any], Callable[[reference.Tensors], Any]]] = {
    "released": (
        lambda: gdmam.gdmam_released(LEARNING_RATE, weight_decay=WEIGHT_DECAY),
        lambda parameters: reference.Released(parameters, LEARNING_RATE, WEIGHT_DECAY),
    ),
    "allocated": (
        lambda: optax.chain(
            optax.clip_by_global_norm(CLIP), gdmam.gdmam(LEARNING_RATE, weight_decay=WEIGHT_DECAY)
        ),
        lambda parameters: reference.Allocated(parameters, LEARNING_RATE, WEIGHT_DECAY, clip=CLIP),
    ),
    "described": (
        lambda: optax.chain(
            optax.clip_by_global_norm(CLIP),
            gdmam.gdmam(LEARNING_RATE, weight_decay=WEIGHT_DECAY, amsgrad=True, **DESCRIBED),
        ),
        lambda parameters: reference.Allocated(
            parameters,
            LEARNING_RATE,
            WEIGHT_DECAY,
            weighting="norm",
            gate="cosine",
            momentum="ratcheted",
            momenta="separate",
            amsgrad=True,
            clip=CLIP,
        ),
    ),
}
"""Each form as (the optimizer, its reference)."""


def run_torch(
    problem: Problem, optimizer: Callable[[reference.Tensors], Any], dtype: torch.dtype
) -> Record:
    """The reference's trajectory: `params` of shape (steps, P), and what happened at each step."""
    # Tensors this small only wait for one another on several threads.
    torch.set_num_threads(1)
    parameters = {
        name: torch.tensor(array, dtype=dtype, requires_grad=True)
        for name, array in problem.parameters.items()
    }
    method = optimizer(parameters)
    rows: dict[str, list[Any]] = {}
    for batch in zip(*problem.batches, strict=True):
        values = problem.torch_losses(
            parameters, *(torch.tensor(array, dtype=dtype) for array in batch)
        )
        gradients = [
            torch.autograd.grad(
                loss, list(parameters.values()), retain_graph=True, materialize_grads=True
            )
            for loss in values
        ]
        report = method.step(*(dict(zip(parameters, each, strict=True)) for each in gradients))
        report["params"] = reference.flat(parameters).detach().to(torch.float64).numpy()
        for key, value in report.items():
            rows.setdefault(key, []).append(value)
    return {key: np.asarray(values) for key, values in rows.items()}


def run_jax(
    problem: Problem,
    optimizer: Any,
    dtype: Any,
    observe: Callable[[Any, Any], dict[str, jax.Array]] = lambda state, pairs: {},
) -> Record:
    """This package's trajectory, in one compiled scan; needs float64 switched on for float64.

    `observe` says what to record of each step beside the parameters, losses and diagnostics, from
    the new state and the pairs.
    """

    def step(carry: Any, batch: Any) -> Any:
        params, state = carry
        values, pairs = gdmam.value_and_paired_grad(problem.jax_losses)(params, *batch)
        updates, state = optimizer.update(pairs, state, params)
        params = optax.apply_updates(params, updates)
        report = {
            **gdmam.diagnostics(state),
            "prediction_loss": values[0],
            "alignment_loss": values[1],
            "params": problem.to_vector(params),
            **observe(state, pairs),
        }
        return (params, state), report

    @jax.jit
    def run(parameters: Any, batches: Any) -> Any:
        params = problem.to_tree(parameters)
        return jax.lax.scan(step, (params, optimizer.init(params)), batches)[1]

    record = run(
        *jax.tree.map(lambda array: np.asarray(array, dtype), (problem.parameters, problem.batches))
    )
    return {key: np.asarray(value, np.float64) for key, value in record.items()}


def deviation(params: np.ndarray, expected: np.ndarray) -> float:
    """Largest difference over all steps and parameters, relative to the largest parameter."""
    return float(np.max(np.abs(params - expected)) / np.max(np.abs(expected)))


PROBLEMS = {"RDA": made_up_rda, "convolutional": made_up_convolutional}


@functools.cache
def compare(
    problem_name: str, form: str, steps: int = 300, float32_steps: int = 300
) -> dict[str, Any]:
    """Everything the tests and the table say about one form on one problem.

    In float64 it is trained for ``steps``, in float32 for the first ``float32_steps`` of them.

    Returns:
        `conflicts` and `clipped`, the shares of steps at which they occurred; `float64`, the
        deviation of the two trajectories; `jax_float32` and `torch_float32`, how far each one's
        float32 trajectory is from its own float64 one.
    """
    problem, (optimizer, method) = PROBLEMS[problem_name](), FORMS[form]
    long, short = (
        dataclasses.replace(problem, batches=tuple(each[:number] for each in problem.batches))
        for number in (steps, float32_steps)
    )
    with jax.enable_x64(True):
        ours = run_jax(long, optimizer(), "float64"), run_jax(short, optimizer(), "float32")
    theirs = run_torch(long, method, torch.float64), run_torch(short, method, torch.float32)
    strayed = [
        deviation(less["params"], precise["params"][:float32_steps])
        for precise, less in (ours, theirs)
    ]
    return {
        "conflicts": np.mean(theirs[0]["cosine"] < 0),
        "clipped": np.mean(theirs[0]["clipped"]),
        "float64": deviation(ours[0]["params"], theirs[0]["params"]),
        "jax_float32": strayed[0],
        "torch_float32": strayed[1],
    }


def _observe_released(state: Any, pairs: Any) -> dict[str, jax.Array]:
    released = next(part for part in state if isinstance(part, gdmam.ReleasedState))
    statistics, weights = released.statistics, released.allocation.weights
    squares = [
        jnp.sum((weights[0] * pair.prediction + weights[1] * pair.alignment) ** 2)
        for pair in jax.tree.leaves(
            pairs, is_leaf=lambda node: isinstance(node, gdmam.GradientPair)
        )
    ]
    return {
        "b1": released.decay,
        "beta": statistics.momentum,
        "sigma": statistics.deviation,
        "gradient_norm": jnp.sqrt(sum(squares)),
        "queue": released.clipping.norms,
    }


@functools.cache
def compare_golden(name: str, *, end_to_end: bool) -> dict[str, float]:
    """Largest deviation from a recorded run of the released code, for each recorded quantity.

    Replayed from the recorded gradients, or end to end: this project's model, losses and gradients
    on the recorded batches and noise. Relative to the quantity's largest recorded value.
    """
    problem, config, recorded = golden_problem(name)
    if not end_to_end:
        # The gradient of a linear loss is its coefficients: the recorded gradient.
        problem = dataclasses.replace(
            problem,
            batches=(recorded["prediction_gradient"], recorded["alignment_gradient"]),
            jax_losses=lambda tree, *gradients: tuple(
                jnp.vdot(gradient, problem.to_vector(tree)) for gradient in gradients
            ),
        )
    optimizer = gdmam.gdmam_released(
        config["learning_rate"],
        weight_decay=config["weight_decay"],
        clip_factor=config["gradient_clip"],
    )
    with jax.enable_x64(True):
        ours = run_jax(problem, optimizer, "float64", _observe_released)
    limits = config["gradient_clip"] * ours["queue"].max(-1)
    ours["clip_max_norm"] = np.append(np.inf, limits[:-1])
    names = ["params", "sigma", "beta", "b1", "gradient_norm", "clip_max_norm"]
    if end_to_end:
        names += ["prediction_loss", "alignment_loss", "weighted_loss"]
        ours["weighted_loss"] = (
            ours["prediction_weight"] * ours["prediction_loss"]
            + ours["alignment_weight"] * ours["alignment_loss"]
        )
    return {each: _golden_deviation(ours[each], recorded[each]) for each in names}


def _golden_deviation(found: np.ndarray, expected: np.ndarray) -> float:
    finite = np.isfinite(expected)
    if found.shape != expected.shape or not np.array_equal(finite, np.isfinite(found)):
        return np.inf
    return deviation(found[finite], expected[finite])
