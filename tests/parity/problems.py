"""The models that parity is shown on, each in PyTorch and in JAX, on recorded batches and noise.

Parameters are named and laid out as in PyTorch; `Problem` says how JAX's tree is made of them and
read back, so that trajectories can be compared element by element.
"""

import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx
from torch import Tensor
from torch.nn import functional

from benchmarks.rda_torch import balanced_loss
from gdmam_jax.ldl import losses
from gdmam_jax.ldl.models import RDA, rda_losses

Arrays = dict[str, np.ndarray]
DATA = Path(__file__).parents[1] / "data"


@dataclasses.dataclass(frozen=True)
class Problem:
    """A model, its losses and everything random about its training.

    Attributes:
        name: for tables.
        parameters: the initial ones, by PyTorch name, in PyTorch layout, float64.
        batches: arrays of shape (steps, ...), one entry of each a step; float64.
        torch_losses: (parameters, *batch) -> (prediction loss, alignment loss).
        jax_losses: the same for JAX's tree of parameters.
        to_tree: arrays by PyTorch name -> JAX's tree.
        to_vector: JAX's tree -> one vector, in the order and layout of `parameters`.
    """

    name: str
    parameters: Arrays
    batches: tuple[np.ndarray, ...]
    torch_losses: Callable[..., tuple[Tensor, Tensor]]
    jax_losses: Callable[..., tuple[jax.Array, jax.Array]]
    to_tree: Callable[[dict[str, Any]], Any]
    to_vector: Callable[[Any], jax.Array]


RDA_LAYERS = (
    ("encoder_x", "encoder_x"),
    ("encoder_x_mu", "encoder_x_mean"),
    ("encoder_x_log_var", "encoder_x_log_variance"),
    ("encoder_y", "encoder_y"),
    ("encoder_y_mu", "encoder_y_mean"),
    ("encoder_y_log_var", "encoder_y_log_variance"),
    ("decoder", "decoder"),
)
"""The layers of RDA as (the released code, this project) name them."""


def torch_rda_losses(
    parameters: dict[str, Tensor],
    x: Tensor,
    y: Tensor,
    noise: Tensor,
    *,
    frequency: np.ndarray,
    samples: int,
    lambdas: tuple[float, float, float],
) -> tuple[Tensor, Tensor]:
    def affine(name: str, z: Tensor) -> Tensor:
        return functional.linear(z, parameters[f"{name}.weight"], parameters[f"{name}.bias"])

    h, k = affine("encoder_x", x), affine("encoder_y", y)
    mu_x, log_var_x = affine("encoder_x_mu", h), affine("encoder_x_log_var", h)
    mu_y, log_var_y = affine("encoder_y_mu", k), affine("encoder_y_log_var", k)
    z_x = mu_x + noise[0] * torch.exp(log_var_x / 2)
    z_y = mu_y + noise[1] * torch.exp(log_var_y / 2)
    logits = affine("decoder", torch.relu(h))
    prediction = balanced_loss(logits, y, torch.as_tensor(frequency, dtype=logits.dtype), samples)
    recovery = functional.cross_entropy(affine("decoder", z_y), y)
    normal = torch.distributions.Normal
    target = (
        torch.distributions.kl_divergence(
            normal(mu_x, torch.exp(log_var_x / 2)),
            normal(mu_y.detach(), torch.exp(log_var_y.detach() / 2)),
        )
        .sum(1)
        .mean()
    )
    cosines = [functional.cosine_similarity(z[:, None], z[None], dim=2) for z in (z_x, z_y)]
    similarity = ((cosines[0] - cosines[1]) ** 2).sum()
    return prediction, lambdas[0] * recovery + lambdas[1] * target + lambdas[2] * similarity


def rda_problem(
    name: str,
    parameters: Arrays,
    batches: tuple[np.ndarray, ...],
    training_labels: np.ndarray,
    lambdas: tuple[float, float, float],
) -> Problem:
    """RDA as released (unbounded log-variances, summed similarity) on batches of x, y and noise."""
    hidden, features = parameters["encoder_x.weight"].shape
    labels = parameters["decoder.weight"].shape[0]
    frequency, samples = training_labels.sum(0), len(training_labels)
    model = nnx.eval_shape(
        lambda: RDA(features, labels, hidden, log_variance_bound=None, rngs=nnx.Rngs(0))
    )
    graph, template = nnx.split(model)

    def to_tree(arrays: dict[str, Any]) -> Any:
        layers = {
            ours: {"kernel": arrays[f"{theirs}.weight"].T, "bias": arrays[f"{theirs}.bias"]}
            for theirs, ours in RDA_LAYERS
        }
        leaves = {path: layers[path[0]][path[1]] for path in dict(nnx.to_flat_state(template))}
        return jax.tree.unflatten(jax.tree.structure(template), list(leaves.values()))

    def to_vector(tree: Any) -> jax.Array:
        layers = nnx.to_pure_dict(tree)
        parts = [
            part.ravel()
            for _, ours in RDA_LAYERS
            for part in (layers[ours]["kernel"].T, layers[ours]["bias"])
        ]
        return jnp.concatenate(parts)

    def jax_losses(tree: Any, x: Any, y: Any, noise: Any) -> tuple[jax.Array, jax.Array]:
        balanced = functools.partial(losses.distribution_balanced, num_samples=samples)
        return rda_losses(
            nnx.merge(graph, tree),
            x,
            y,
            noise,
            lambda z, y, w: balanced(z, y, jnp.asarray(frequency, z.dtype), weights=w),
            recovery_weight=lambdas[0],
            target_weight=lambdas[1],
            similarity_weight=lambdas[2],
            similarity="sum",
        )

    torch_losses = functools.partial(
        torch_rda_losses, frequency=frequency, samples=samples, lambdas=lambdas
    )
    return Problem(name, parameters, batches, torch_losses, jax_losses, to_tree, to_vector)


def made_up_rda(steps: int = 300, seed: int = 0) -> Problem:
    """RDA on made-up, imbalanced label distributions, the alignment gradient the larger."""
    random = np.random.default_rng(seed)
    samples, features, labels, hidden, batch = 40, 12, 5, 10, 8
    x = random.uniform(size=(samples, features))
    scores = 2 * x @ random.normal(size=(features, labels)) + np.linspace(0, 2, labels)
    y = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
    sizes = {
        "encoder_x": (hidden, features),
        "encoder_y": (hidden, labels),
        "decoder": (labels, hidden),
    }
    parameters = {}
    for name, _ in RDA_LAYERS:
        shape = sizes.get(name, (hidden, hidden))
        parameters[f"{name}.weight"] = random.normal(size=shape) * np.sqrt(2 / shape[1])
        parameters[f"{name}.bias"] = np.zeros(shape[0])
    index = random.integers(samples, size=(steps, batch))
    noise = random.normal(size=(steps, 2, batch, hidden))
    return rda_problem("RDA", parameters, (x[index], y[index], noise), y, (1.0, 0.3, 0.1))


def _torch_convolutional(
    parameters: dict[str, Tensor], images: Tensor, target: Tensor, auxiliary: Tensor
) -> tuple[Tensor, Tensor]:
    h = images
    for name in ("convolution_1", "convolution_2"):
        h = functional.conv2d(h, parameters[f"{name}.weight"], parameters[f"{name}.bias"], stride=2)
        h = torch.tanh(h)
    h = h.flatten(1)

    def affine(name: str) -> Tensor:
        return functional.linear(h, parameters[f"{name}.weight"], parameters[f"{name}.bias"])

    return functional.cross_entropy(affine("head"), target), functional.mse_loss(
        affine("auxiliary_head"), auxiliary
    )


def _jax_convolutional(
    parameters: dict[str, Any], images: jax.Array, target: jax.Array, auxiliary: jax.Array
) -> tuple[jax.Array, jax.Array]:
    h = images
    for name in ("convolution_1", "convolution_2"):
        h = jax.lax.conv_general_dilated(
            h,
            parameters[name]["weight"],
            (2, 2),
            "VALID",
            dimension_numbers=("NCHW", "OIHW", "NCHW"),
        )
        h = jnp.tanh(h + parameters[name]["bias"][:, None, None])
    h = h.reshape(len(h), -1)

    def affine(name: str) -> jax.Array:
        return h @ parameters[name]["weight"].T + parameters[name]["bias"]

    prediction = losses.cross_entropy(affine("head"), target)
    return prediction, jnp.mean((affine("auxiliary_head") - auxiliary) ** 2)


def made_up_convolutional(steps: int = 300, seed: int = 1) -> Problem:
    """Two strided convolutions shared by a classifying head and a regressing one."""
    random = np.random.default_rng(seed)
    samples, labels, outputs, batch = 40, 4, 3, 8
    images = random.normal(size=(samples, 2, 11, 11))
    target = random.dirichlet(np.full(labels, 0.3), size=samples)
    auxiliary = 3 * random.normal(size=(samples, outputs))
    shapes = {
        "convolution_1": (4, 2, 3, 3),
        "convolution_2": (6, 4, 3, 3),
        "head": (labels, 24),
        "auxiliary_head": (outputs, 24),
    }
    parameters = {}
    for name, shape in shapes.items():
        scale = np.sqrt(1 / np.prod(shape[1:]))
        parameters[f"{name}.weight"] = scale * random.normal(size=shape)
        parameters[f"{name}.bias"] = np.zeros(shape[0])
    index = random.integers(samples, size=(steps, batch))

    def to_tree(arrays: dict[str, Any]) -> Any:
        return {
            name: {part: arrays[f"{name}.{part}"] for part in ("weight", "bias")} for name in shapes
        }

    def to_vector(tree: Any) -> jax.Array:
        parts = [tree[name][part].ravel() for name in shapes for part in ("weight", "bias")]
        return jnp.concatenate(parts)

    return Problem(
        "convolutional",
        parameters,
        (images[index], target[index], auxiliary[index]),
        _torch_convolutional,
        _jax_convolutional,
        to_tree,
        to_vector,
    )


GOLDEN = ("released_alignment_dominated", "released_mixed")


def golden_problem(name: str) -> tuple[Problem, dict[str, Any], dict[str, np.ndarray]]:
    """A recorded run of the released code: its problem, its configuration, what was recorded."""
    with np.load(DATA / f"{name}.npz") as file:
        recorded = dict(file)
    config = json.loads(str(recorded["config"]))
    parameters = {str(key): recorded[f"init/{key}"] for key in recorded["param_names"]}
    index = recorded["batch_index"]
    problem = rda_problem(
        name,
        parameters,
        (recorded["x"][index], recorded["y"][index], recorded["noise"]),
        recorded["y"],
        tuple(config[f"lambda_{part}"] for part in ("recovery", "target", "similarity")),
    )
    return problem, config, recorded
