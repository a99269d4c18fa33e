"""A loss for each example, or dozens of tasks: one weighed gradient, against TorchJD's two engines.

A multilayer perceptron is trained with UPGrad on the Gramian of all losses. Cost is divided by that
of the mean loss's gradient in the same framework. With given gradients only UPGrad itself is timed.
"""

import itertools
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch import nn
from torchjd import aggregation, autogram, autojac

import gdmam_jax as gdmam
from benchmarks.pair import jacobian_to_gradient, peak_bytes
from benchmarks.timing import Case, measure_in_turn, ratio
from gdmam_jax.ldl.laboratory import training

LAYERS = 4
MEAN = "JAX mean loss"
TORCH_MEAN = "PyTorch mean loss"
TORCH_GIVEN = "TorchJD"
GRADIENTS = ("random", "conflicting", "nearly dependent")


def benchmark(
    losses: Sequence[int], parameters: int, chunk: int, rounds: int
) -> list[dict[str, Any]]:
    """Time and memory of UPGrad's gradient of one loss for each example.

    Args:
      losses: how many, one for each example; each number is a set of cases.
      parameters: about how many, in layers of equal width.
      chunk: for how many losses gradients are held at once, in the cases with chunks.
      rounds: how many times each case runs.

    Returns:
      One row for each number of losses and way: time over that of the mean loss's gradient, the
      memory in MiB that is needed besides parameters and batch, and the seconds that tracing and
      compilation took.
    """
    torch.set_num_threads(training.processors())
    width, rows = round((parameters / LAYERS) ** 0.5), []
    for count in losses:
        cases, memory = _jax_cases(count, width, chunk)
        torch_cases = _torch_cases(count, width, chunk)
        memory |= {way: peak_bytes(case.run) for way, case in torch_cases.items()}
        cases |= torch_cases
        measure_in_turn(list(cases.values()), rounds)
        for way, case in cases.items():
            rows.append(
                {
                    "losses": count,
                    "way": way,
                    "milliseconds": case.milliseconds,
                    "over mean": ratio(case, cases[MEAN if way.startswith("JAX") else TORCH_MEAN]),
                    "MiB": memory[way] / 2**20,
                    "first call s": case.first,
                }
            )
    return rows


def given(losses: Sequence[int], parameters: int, rounds: int) -> list[dict[str, Any]]:
    """Time of UPGrad's combination of given gradients, compared with TorchJD's.

    Args:
      losses: how many; each number is a set of cases.
      parameters: how long the gradients are.
      rounds: how many times each case runs.

    Returns:
      One row for each number of losses, kind of gradients and way: time over TorchJD's.
    """
    torch.set_num_threads(training.processors())

    @jax.jit
    def combined(rows: jax.Array) -> jax.Array:
        return gdmam.upgrad_weighting(rows @ rows.T, None) @ rows

    cases: dict[tuple[int, str, str], Case] = {}
    for count, kind in itertools.product(losses, GRADIENTS):
        rows = _gradients(kind, count, parameters)
        ours, theirs, aggregator = jnp.asarray(rows), torch.tensor(rows), aggregation.UPGrad()
        ways = {
            "JAX": lambda rows=ours: jax.block_until_ready(combined(rows)),
            TORCH_GIVEN: lambda rows=theirs, aggregator=aggregator: aggregator(rows),
        }
        cases |= {(count, kind, way): Case(way, run) for way, run in ways.items()}
    measure_in_turn(list(cases.values()), rounds)
    return [
        {
            "losses": count,
            "gradients": kind,
            "way": way,
            "milliseconds": case.milliseconds,
            "over TorchJD": ratio(case, cases[count, kind, TORCH_GIVEN]),
        }
        for (count, kind, way), case in cases.items()
    ]


def _gradients(kind: str, count: int, parameters: int) -> np.ndarray:
    """Gradients of the losses, ``(count, parameters)``, float32.

    Conflicting ones have a long part in common, with changing signs; nearly dependent ones are
    combinations of three, but for a part in 100,000.
    """
    random = np.random.default_rng(count)
    rows = random.normal(size=(count, parameters))
    if kind == "conflicting":
        rows += 10 * (-1.0) ** np.arange(count)[:, None] * random.normal(size=parameters)
    if kind == "nearly dependent":
        few = random.normal(size=(count, 3)) @ random.normal(size=(3, parameters))
        rows = few + 1e-5 * rows
    return rows.astype(np.float32)


def _jax_cases(count: int, width: int, chunk: int) -> tuple[dict[str, Case], dict[str, int]]:
    keys = jax.random.split(jax.random.key(0), LAYERS + 1)
    params = [(2 / width) ** 0.5 * jax.random.normal(key, (width, width)) for key in keys[1:]]
    x, y = jax.random.normal(keys[0], (2, count, width))

    def loss(params: Any, x: Any, y: Any) -> jax.Array:
        for weight in params[:-1]:
            x = jax.nn.relu(x @ weight)
        return jnp.mean((x @ params[-1] - y) ** 2, axis=-1)

    def weighed(**given: Any) -> Callable[..., Any]:
        return gdmam.value_and_weighed_grad(loss, gdmam.upgrad_weighting, **given)

    ways = {
        MEAN: jax.value_and_grad(lambda *args: jnp.mean(loss(*args))),
        "JAX": weighed(),
        f"JAX, chunks of {chunk}": weighed(chunk=chunk),
        "JAX, by example": weighed(example_argnums=(1, 2)),
        f"JAX, by example, chunks of {chunk}": weighed(example_argnums=(1, 2), chunk=chunk),
    }
    cases, memory = {}, {}
    for way, function in ways.items():
        start = time.perf_counter()
        compiled = jax.jit(function).lower(params, x, y).compile()
        seconds = time.perf_counter() - start
        analysis = compiled.memory_analysis()
        memory[way] = analysis.temp_size_in_bytes + analysis.output_size_in_bytes
        cases[way] = Case(way, lambda f=compiled: jax.block_until_ready(f(params, x, y)), seconds)
    return cases, memory


def _torch_cases(count: int, width: int, chunk: int) -> dict[str, Case]:
    # The engine hooks into its model, which would cost the other ways.
    model, hooked = _torch_model(width), _torch_model(width)
    engine, weighting = autogram.Engine(hooked, batch_dim=0), aggregation.UPGradWeighting()
    x, y = torch.randn(2, count, width)

    def losses(model: nn.Module) -> torch.Tensor:
        return ((model(x) - y) ** 2).mean(1)

    def mean() -> None:
        losses(model).mean().backward()

    def jacobian(size: int | None) -> None:
        params = list(model.parameters())
        autojac.backward(losses(model), inputs=params, parallel_chunk_size=size)
        jacobian_to_gradient(params)

    def gramian() -> None:
        values = losses(hooked)
        values.backward(weighting(engine.compute_gramian(values)))

    def cleared(function: Callable[[], None]) -> Callable[[], None]:
        def run() -> None:
            function()
            for param in (*model.parameters(), *hooked.parameters()):
                param.grad = None

        return run

    ways = {
        TORCH_MEAN: mean,
        "TorchJD autojac": lambda: jacobian(None),
        f"TorchJD autojac, chunks of {chunk}": lambda: jacobian(chunk),
        "TorchJD autogram": gramian,
    }
    return {way: Case(way, cleared(function)) for way, function in ways.items()}


def _torch_model(width: int) -> nn.Module:
    layers = [
        module
        for _ in range(LAYERS - 1)
        for module in (nn.Linear(width, width, bias=False), nn.ReLU())
    ]
    return nn.Sequential(*layers, nn.Linear(width, width, bias=False))
