"""Conflicts settled at the features, against the summed loss, and against those at parameters.

The models are those of `benchmarks.pair`. Each way's cost is divided by that of the summed loss's
gradient in the same framework. The heads are small, so that nothing hides what a fork costs.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import optax
import torch
from torchjd import aggregation, autojac

import gdmam_jax as gdmam
from benchmarks.pair import MODELS, TorchLosses, jacobian_to_gradient, peak_bytes
from benchmarks.timing import Case, measure_in_turn, ratio
from gdmam_jax.ldl.laboratory import training

SUMMED = "JAX summed"
TORCH_SUMMED = "PyTorch summed"


def benchmark(
    names: Sequence[str], losses: Sequence[int], batch: int, width: int, rounds: int
) -> list[dict[str, Any]]:
    """Time and memory of a gradient with its conflict settled, over those of the summed loss.

    Args:
      names: of the models, see `benchmarks.pair.MODELS`.
      losses: how many, the prediction's included; each number is a set of cases.
      batch: examples.
      width: features of the layers.
      rounds: how many times each case runs.

    Returns:
      One row for each model, number of losses and way: time over the summed loss's, and the memory
      in MiB that is needed besides parameters and batch.
    """
    torch.set_num_threads(training.processors())
    rows = []
    for name, count in itertools.product(names, losses):
        make_jax, make_torch = MODELS[name]
        cases, memory = _jax_cases(*make_jax(batch, width, count), count)
        torch_cases = _torch_cases(*make_torch(batch, width, count))
        memory |= {way: peak_bytes(case.run) for way, case in torch_cases.items()}
        cases |= torch_cases
        measure_in_turn(list(cases.values()), rounds)
        for way, case in cases.items():
            rows.append(
                {
                    "model": name,
                    "losses": count,
                    "way": way,
                    "milliseconds": case.milliseconds,
                    "over summed": ratio(
                        case, cases[SUMMED if way.startswith("JAX") else TORCH_SUMMED]
                    ),
                    "MiB": memory[way] / 2**20,
                    "first call s": case.first,
                }
            )
    return rows


def _jax_cases(
    losses: Callable[..., Any], params: Any, batch: Any, count: int
) -> tuple[dict[str, Case], dict[str, int]]:
    def total(params: Any, *batch: Any, **given: Any) -> jax.Array:
        return sum(jax.tree.leaves(losses(params, *batch, **given)))

    def forked(params: Any, state: Any, *batch: Any, **choices: Any) -> jax.Array:
        split = functools.partial(gdmam.fork, state=state, **choices)
        return total(params, *batch, split=split)

    of_gdmam = functools.partial(forked, weighting=gdmam.unit_weighting, gate=gdmam.priority_gate)
    of_upgrad = functools.partial(forked, weighting=gdmam.upgrad_weighting)

    upgrad = gdmam.weighed(optax.identity(), gdmam.upgrad_weighting, alignment_losses=count - 1)
    opt_state = upgrad.init(params)

    def paired(params: Any, state: Any, *batch: Any) -> Any:
        values, pairs = gdmam.value_and_paired_grad(losses)(params, *batch)
        return values, *upgrad.update(pairs, state)

    state = gdmam.fork_state(count)
    ways = {
        SUMMED: (jax.value_and_grad(total), (params, *batch)),
        "JAX fork": (jax.value_and_grad(forked), (params, None, *batch)),
        "JAX fork, GDMAM": (jax.value_and_grad(of_gdmam), (params, None, *batch)),
        "JAX fork, UPGrad": (jax.value_and_grad(of_upgrad), (params, None, *batch)),
        "JAX fork, UPGrad, state": (
            jax.value_and_grad(of_upgrad, argnums=(0, 1)),
            (params, state, *batch),
        ),
        "JAX pairs, UPGrad": (paired, (params, opt_state, *batch)),
    }
    cases, memory = {}, {}
    for way, (function, arguments) in ways.items():
        compiled = jax.jit(function).lower(*arguments).compile()
        analysis = compiled.memory_analysis()
        memory[way] = analysis.temp_size_in_bytes + analysis.output_size_in_bytes
        cases[way] = Case(way, lambda f=compiled, a=arguments: jax.block_until_ready(f(*a)))
    return cases, memory


def _torch_cases(losses: TorchLosses, params: list, batch: Any) -> dict[str, Case]:
    x, *rest = batch
    trunk = list(losses.trunk.parameters())

    def cleared(function: Callable[[], None]) -> Callable[[], None]:
        def run() -> None:
            function()
            for param in params:
                param.grad = None

        return run

    def summed() -> None:
        prediction, alignment = losses(*batch)
        (prediction + sum(alignment)).backward()

    def at_the_parameters() -> None:
        features = losses.trunk(x)
        prediction, alignment = losses.of(features, *rest)
        autojac.mtl_backward([prediction, *alignment], features=features)
        jacobian_to_gradient(trunk)

    def at_the_features() -> None:
        features = losses.trunk(x)
        leaf = features.detach().requires_grad_()
        prediction, alignment = losses.of(leaf, *rest)
        prediction.backward()
        rows = [leaf.grad, *(torch.autograd.grad(each, leaf)[0] for each in alignment)]
        settled = aggregation.UPGrad()(torch.stack(rows).flatten(1))
        features.backward(settled.view_as(features))

    ways = {
        TORCH_SUMMED: summed,
        "TorchJD mtl_backward, UPGrad": at_the_parameters,
        "PyTorch at the features, UPGrad": at_the_features,
    }
    return {way: Case(way, cleared(function)) for way, function in ways.items()}
