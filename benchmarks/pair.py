"""The losses' gradients from one forward pass, compared with the sum's and with PyTorch's ways.

There are three models, each in JAX and in PyTorch with the same sizes. Each way's cost is divided
by that of the summed loss's gradient in the same framework. Every loss depends on all parameters
but the head's, so that no backward pass is shorter than the summed loss's.
"""

import itertools
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
import torch
from torch import nn
from torch.nn import functional
from torch.profiler import ProfilerActivity, profile
from torchjd import aggregation, autojac

import gdmam_jax as gdmam
from benchmarks.timing import Case, measure_in_turn, ratio
from gdmam_jax.ldl.laboratory import training

CLASSES = 10


def benchmark(
    names: Sequence[str],
    losses: Sequence[int],
    batch: int,
    width: int,
    rounds: int,
    rematerialise: bool = False,
) -> list[dict[str, Any]]:
    """Time and memory of the gradients of all losses over those of the summed loss.

    Args:
      names: of the models, see `MODELS`.
      losses: how many, the prediction's included; each number is a set of cases.
      batch: examples.
      width: features of the layers.
      rounds: how many times each case runs.
      rematerialise: keep no activations in JAX's ways, but compute them again in each backward
        pass (`jax.checkpoint`).

    Returns:
      One row for each model, number of losses and way: time over the summed loss's, next to what
      the arithmetic of one forward and K backward passes would take; and memory over the summed
      loss's, which is what the step needs besides parameters and batch.
    """
    torch.set_num_threads(training.processors())
    rows = []
    for name, count in itertools.product(names, losses):
        make_jax, make_torch = MODELS[name]
        function, *arguments = make_jax(batch, width, count)
        if rematerialise:
            function = jax.checkpoint(function)
        cases, memory, off = _jax_cases(function, *arguments)
        torch_cases = _torch_cases(*make_torch(batch, width, count))
        memory |= {way: peak_bytes(case.run) for way, case in torch_cases.items()}
        cases |= torch_cases
        measure_in_turn(list(cases.values()), rounds)
        for way, case in cases.items():
            base = "JAX summed" if way.startswith("JAX") else "PyTorch summed"
            rows.append(
                {
                    "model": name,
                    "losses": count,
                    "way": way,
                    "milliseconds": case.milliseconds,
                    "over summed": ratio(case, cases[base]),
                    "(1 + 2K) / 3": 1.0 if way == base else (1 + 2 * count) / 3,
                    "memory": memory[way] / memory[base],
                    "off by": off if way == "JAX batched" else float("nan"),
                    "first call s": case.first,
                }
            )
    return rows


def _jax_cases(losses: Callable[..., Any], params: Any, batch: Any) -> tuple[dict, dict, float]:
    paired = gdmam.value_and_paired_grad(losses)
    count = len(jax.eval_shape(losses, params, *batch)[1])
    upgrad = gdmam.weighed(optax.identity(), gdmam.upgrad_weighting, alignment_losses=count)
    state = upgrad.init(params)

    def weighed(*args: Any) -> Any:
        values, pairs = paired(*args)
        return values, upgrad.update(pairs, state)[0]

    ways = {
        "JAX summed": jax.value_and_grad(lambda *args: sum(jax.tree.leaves(losses(*args)))),
        "JAX paired": paired,
        "JAX paired, UPGrad": weighed,
        "JAX batched": _batched(losses),
    }
    cases, memory, results = {}, {}, {}
    for way, function in ways.items():
        compiled = jax.jit(function).lower(params, *batch).compile()
        # What the step needs besides parameters and batch: activations and gradients.
        analysis = compiled.memory_analysis()
        memory[way] = analysis.temp_size_in_bytes + analysis.output_size_in_bytes
        cases[way] = Case(way, lambda f=compiled: jax.block_until_ready(f(params, *batch)))
        results[way] = compiled(params, *batch)[1]
    # Checked, because a compiler that is wrong can be fast.
    prediction, alignment = gdmam.unpair_gradients(results["JAX paired"])
    off = max(
        float(jnp.abs(both[k] - one).max() / jnp.maximum(jnp.abs(one).max(), 1e-30))
        for k, gradient in enumerate([prediction, *alignment])
        for both, one in zip(
            jax.tree.leaves(results["JAX batched"]), jax.tree.leaves(gradient), strict=True
        )
    )
    return cases, memory, off


def _batched(losses: Callable[..., Any]) -> Callable[..., Any]:
    """All gradients from one batched backward pass: the other way to get them."""

    def function(params: Any, *batch: Any) -> Any:
        def flat(params: Any) -> Any:
            return jax.tree.leaves(losses(params, *batch))

        values, pushforward = jax.linearize(flat, params)
        pull_back = jax.linear_transpose(pushforward, params)
        (gradients,) = jax.vmap(pull_back)(list(jnp.eye(len(values))))
        return values, gradients

    return function


def _torch_cases(losses: Callable[..., Any], params: list, batch: Any) -> dict[str, Case]:
    def evaluated() -> list:
        prediction, alignment = losses(*batch)
        return [prediction, *alignment]

    def summed() -> None:
        torch.autograd.grad(sum(evaluated()), params)

    def in_turn() -> list:
        values = evaluated()
        return [
            torch.autograd.grad(
                value, params, retain_graph=value is not values[-1], allow_unused=True
            )
            for value in values
        ]

    def jacobian() -> None:
        autojac.backward(evaluated(), inputs=params)
        for param in params:
            del param.jac

    def weighed() -> None:
        autojac.backward(evaluated(), inputs=params)
        jacobian_to_gradient(params)
        for param in params:
            param.grad = None

    ways = {
        "PyTorch summed": summed,
        "PyTorch in turn": in_turn,
        "TorchJD autojac": jacobian,
        "TorchJD autojac, UPGrad": weighed,
    }
    return {way: Case(way, function) for way, function in ways.items()}


def jacobian_to_gradient(params: Sequence[Any]) -> None:
    """TorchJD's UPGrad, in the way that saves memory: the Gramian is summed over the parameters."""
    autojac.jac_to_grad(params, aggregation.UPGrad(), optimize_gramian_computation=True)


def peak_bytes(run: Callable[[], Any]) -> int:
    """The most bytes that PyTorch holds during a call, above what it holds before."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # The profiler's notes would cut the tables.
    run()  # What the first call alone makes does not count.
    activities = [ProfilerActivity.CPU]
    with profile(activities=activities, profile_memory=True, acc_events=True) as profiled:
        run()
    events = profiled.profiler.kineto_results.events()
    changes = [event for event in events if event.name() == "[memory]"]
    changes.sort(key=lambda event: event.start_ns())
    return max(itertools.accumulate((change.nbytes() for change in changes), initial=0))


Split = Callable[[Any, int], Sequence[Any]]
"""A function of the features and of the number of losses: the features that each loss gets."""


def _shared(features: Any, count: int) -> Sequence[Any]:
    return [features] * count


def _losses(head: Any, features: Any, labels: Any, targets: Any, split: Split) -> Any:
    """Cross entropy of the prediction, and distances of the representation from targets."""
    first, *others = split(features, 1 + len(targets))
    logits = jax.nn.log_softmax(first @ head)
    prediction = -jnp.mean(logits[jnp.arange(len(labels)), labels])
    return prediction, tuple(
        ((hidden - target) ** 2).mean() for hidden, target in zip(others, targets, strict=True)
    )


def _random_batch(key: int, *shape: int) -> tuple[jax.Array, jax.Array]:
    keys = jax.random.split(jax.random.key(key))
    labels = jax.random.randint(keys[1], shape[:1], 0, CLASSES)
    return jax.random.normal(keys[0], shape), labels


def _matrix(key: int, *shape: int) -> jax.Array:
    fan_in = shape[0] if len(shape) == 2 else shape[0] * shape[1] * shape[2]
    return jax.random.normal(jax.random.key(key), shape) * (2 / fan_in) ** 0.5


MLP_LAYERS = 6


def _mlp_jax(batch: int, width: int, count: int) -> tuple[Any, ...]:
    params = [_matrix(i, width, width) for i in range(MLP_LAYERS)]
    params.append(_matrix(99, width, CLASSES))
    x, labels = _random_batch(0, batch, width)
    targets = jax.random.normal(jax.random.key(5), (count - 1, batch, width))

    def losses(
        params: Any, x: Any, labels: Any, targets: Any, split: Split = _shared
    ) -> tuple[Any, Any]:
        for weight in params[:-1]:
            x = jax.nn.relu(x @ weight)
        return _losses(params[-1], x, labels, targets, split)

    return losses, params, (x, labels, targets)


def _mlp_torch(batch: int, width: int, count: int) -> tuple[Any, ...]:
    layers = [
        module
        for _ in range(MLP_LAYERS)
        for module in (nn.Linear(width, width, bias=False), nn.ReLU())
    ]
    return _torch_losses(nn.Sequential(*layers), width, (batch, width), (count - 1, batch, width))


class TorchLosses:
    """The losses of a batch: `trunk` computes features, and `of` their losses."""

    def __init__(self, trunk: nn.Module, features: int) -> None:
        self.trunk = trunk
        self.head = nn.Linear(features, CLASSES, bias=False)

    def __call__(self, x: Any, labels: Any, targets: Any) -> tuple[Any, tuple[Any, ...]]:
        return self.of(self.trunk(x), labels, targets)

    def of(self, features: Any, labels: Any, targets: Any) -> tuple[Any, tuple[Any, ...]]:
        prediction = functional.cross_entropy(self.head(features), labels)
        return prediction, tuple(((features - target) ** 2).mean() for target in targets)


def _torch_losses(
    trunk: nn.Module, features: int, inputs: tuple[int, ...], hidden: tuple[int, ...]
) -> tuple[Any, ...]:
    losses = TorchLosses(trunk, features)
    x, targets = torch.randn(inputs), torch.randn(hidden)
    labels = torch.randint(0, CLASSES, inputs[:1])
    return losses, [*trunk.parameters(), *losses.head.parameters()], (x, labels, targets)


BLOCKS = 3
SIDE = 16


def _resnet_jax(batch: int, width: int, count: int) -> tuple[Any, ...]:
    channels = max(4, width // 8)
    params = {
        "first": _matrix(0, 3, 3, 3, channels),
        "blocks": [
            [_matrix(10 * i + j, 3, 3, channels, channels) for j in (1, 2)] for i in range(BLOCKS)
        ],
        "head": _matrix(99, channels, CLASSES),
    }
    x, labels = _random_batch(0, batch, SIDE, SIDE, 3)
    targets = jax.random.normal(jax.random.key(5), (count - 1, batch, channels))

    def convolve(x: Any, kernel: Any) -> Any:
        dimensions = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", None, None, dimensions)

    def losses(
        params: Any, x: Any, labels: Any, targets: Any, split: Split = _shared
    ) -> tuple[Any, Any]:
        x = jax.nn.relu(convolve(x, params["first"]))
        for first, second in params["blocks"]:
            x = x + convolve(jax.nn.relu(convolve(x, first)), second)
        z = jax.nn.relu(x).mean((1, 2))
        return _losses(params["head"], z, labels, targets, split)

    return losses, params, (x, labels, targets)


class _Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first, self.second = (
            nn.Conv2d(channels, channels, 3, padding=1, bias=False) for _ in range(2)
        )

    def forward(self, x: Any) -> Any:
        return x + self.second(torch.relu(self.first(x)))


class _Mean(nn.Module):
    def forward(self, x: Any) -> Any:
        return torch.relu(x).mean((2, 3))


def _resnet_torch(batch: int, width: int, count: int) -> tuple[Any, ...]:
    channels = max(4, width // 8)
    trunk = nn.Sequential(
        nn.Conv2d(3, channels, 3, padding=1, bias=False),
        nn.ReLU(),
        *(_Residual(channels) for _ in range(BLOCKS)),
        _Mean(),
    )
    return _torch_losses(trunk, channels, (batch, 3, SIDE, SIDE), (count - 1, batch, channels))


TRANSFORMER_LAYERS = 2
LENGTH = 32
HEADS = 4


def _transformer_jax(batch: int, width: int, count: int) -> tuple[Any, ...]:
    shapes = {
        "qkv": (width, 3 * width),
        "out": (width, width),
        "up": (width, 4 * width),
        "down": (4 * width, width),
    }
    params = {
        "layers": [
            {
                name: 0.5 * _matrix(10 * i + j, *shape)
                for j, (name, shape) in enumerate(shapes.items())
            }
            for i in range(TRANSFORMER_LAYERS)
        ],
        "head": _matrix(99, width, CLASSES),
    }
    x, labels = _random_batch(0, batch, LENGTH, width)
    targets = jax.random.normal(jax.random.key(5), (count - 1, batch, width))

    def losses(
        params: Any, x: Any, labels: Any, targets: Any, split: Split = _shared
    ) -> tuple[Any, Any]:
        for layer in params["layers"]:
            parts = (jax.nn.standardize(x) @ layer["qkv"]).reshape(batch, LENGTH, 3, HEADS, -1)
            attended = jax.nn.dot_product_attention(*(parts[:, :, i] for i in range(3)))
            x = x + attended.reshape(x.shape) @ layer["out"]
            x = x + jax.nn.gelu(jax.nn.standardize(x) @ layer["up"]) @ layer["down"]
        z = x.mean(1)
        return _losses(params["head"], z, labels, targets, split)

    return losses, params, (x, labels, targets)


class _TransformerLayer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Any) -> Any:
        normal = functional.layer_norm(x, x.shape[-1:])
        parts = self.qkv(normal).reshape(*x.shape[:2], 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        # Written out: TorchJD's batched pull-back has no rule for the fused CPU kernel.
        query, key, value = parts
        scores = torch.softmax(query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5, -1)
        x = x + self.out((scores @ value).transpose(1, 2).reshape(x.shape))
        hidden = functional.gelu(self.up(functional.layer_norm(x, x.shape[-1:])))
        return x + self.down(hidden)


class _MeanOverPositions(nn.Module):
    def forward(self, x: Any) -> Any:
        return x.mean(1)


def _transformer_torch(batch: int, width: int, count: int) -> tuple[Any, ...]:
    layers = [_TransformerLayer(width) for _ in range(TRANSFORMER_LAYERS)]
    trunk = nn.Sequential(*layers, _MeanOverPositions())
    return _torch_losses(trunk, width, (batch, LENGTH, width), (count - 1, batch, width))


MODELS = {
    "mlp": (_mlp_jax, _mlp_torch),
    "resnet": (_resnet_jax, _resnet_torch),
    "transformer": (_transformer_jax, _transformer_torch),
}
"""By name: functions of (batch, width, count of losses) that make the model in JAX and PyTorch."""
