"""A physics-informed network for Burgers' equation: two losses that fight, summed and by GDMAM.

The network u(x, t) must satisfy u_t + u u_x = (0.01 / pi) u_xx inside (the residual loss), and be
-sin(pi x) at first and 0 at both ends (the data loss). Their gradients oppose each other most of
the time. The same network is trained twice, with the same seed, learning rate and points: by Adam
on the sum of both losses, and by `gdmam(learning_rate)`.

    python examples/burgers.py

Prints both errors against the exact solution, and draws them. Under a minute on two cores.
"""

import argparse
import itertools
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from flax import nnx
from rich.console import Console
from rich.progress import Progress

import gdmam_jax as gdmam

matplotlib.use("Agg")
import matplotlib.pyplot as plt

VISCOSITY = 0.01 / np.pi
RESIDUAL_POINTS, DATA_POINTS = 256, 64
RECORD = 100
"""Steps between two looks at the error; one compiled call makes them."""

METHODS = {
    "summed Adam": lambda rate: gdmam.summed(optax.adam(rate)),
    "GDMAM": lambda rate: gdmam.gdmam(rate),
}


class Network(nnx.Module):
    """Four hidden layers of hyperbolic tangents, from (x, t) to u."""

    def __init__(self, width, rngs):
        sizes = [2, width, width, width, width, 1]
        self.layers = nnx.List([nnx.Linear(a, b, rngs=rngs) for a, b in itertools.pairwise(sizes)])

    def __call__(self, points):
        """Values of shape (N, 1) at points of shape (N, 2)."""
        hidden = points * jnp.array([1.0, 2.0]) - jnp.array([0.0, 1.0])  # to [-1, 1]
        for layer in self.layers[:-1]:
            hidden = jnp.tanh(layer(hidden))
        return self.layers[-1](hidden)


def residual(network, points):
    """How far the network is from solving the equation: forward-mode derivatives, batched."""
    to_right = jnp.zeros_like(points).at[:, 0].set(1)
    ahead = jnp.zeros_like(points).at[:, 1].set(1)

    def along_x(points):
        return jax.jvp(network, (points,), (to_right,))

    (u, u_x), (_, u_xx) = jax.jvp(along_x, (points,), (to_right,))
    _, u_t = jax.jvp(network, (points,), (ahead,))
    return u_t + u * u_x - VISCOSITY * u_xx


def losses(network, points):
    """The residual loss, and the data loss: what the two gradients are taken of."""
    inside, at_first, at_ends = points
    residual_loss = jnp.mean(residual(network, inside) ** 2)
    data_loss = jnp.mean((network(at_first) + jnp.sin(jnp.pi * at_first[:, :1])) ** 2)
    data_loss += jnp.mean(network(at_ends) ** 2)
    return residual_loss, data_loss


def draw_points(key):
    """New points for a step: inside, at t = 0, and at x = -1 and 1."""
    keys = jax.random.split(key, 4)
    inside = jax.random.uniform(keys[0], (RESIDUAL_POINTS, 2)) * jnp.array([2.0, 1.0])
    x = jax.random.uniform(keys[1], (DATA_POINTS,), minval=-1.0, maxval=1.0)
    t = jax.random.uniform(keys[2], (DATA_POINTS,))
    ends = jnp.where(jax.random.bernoulli(keys[3], shape=(DATA_POINTS,)), 1.0, -1.0)
    at_first, at_ends = jnp.stack([x, jnp.zeros_like(x)], 1), jnp.stack([ends, t], 1)
    return inside - jnp.array([1.0, 0.0]), at_first, at_ends


def exact(points):
    """The solution, by the Cole-Hopf transformation and Gauss-Hermite quadrature in float64."""
    roots, weights = np.polynomial.hermite.hermgauss(100)
    x, t = points[:, :1], points[:, 1:]
    y = x - np.sqrt(4 * VISCOSITY * t) * roots
    exponent = -np.cos(np.pi * y) / (2 * np.pi * VISCOSITY)
    mass = weights * np.exp(exponent - exponent.max(axis=1, keepdims=True))
    return -(np.sin(np.pi * y) * mass).sum(1, keepdims=True) / mass.sum(1, keepdims=True)


def make_steps(method, learning_rate, steps, graphdef, grid, solution):
    """Start and some steps of a training, compiled once."""
    schedule = optax.warmup_cosine_decay_schedule(0.0, learning_rate, 100, steps)
    optimizer = METHODS[method](schedule)

    def losses_of(params, points):
        return losses(nnx.merge(graphdef, params), points)

    def step(carry, key):
        params, opt_state = carry
        _, pairs = gdmam.value_and_paired_grad(losses_of)(params, draw_points(key))
        updates, opt_state = optimizer.update(pairs, opt_state, params)
        cosine = gdmam.decompose(pairs).geometry.cosine
        return (optax.apply_updates(params, updates), opt_state), cosine

    @partial(jax.jit, donate_argnums=0)
    def several(carry, keys):
        carry, cosines = jax.lax.scan(step, carry, keys)
        learned = nnx.merge(graphdef, carry[0])(grid)
        error = jnp.linalg.norm(learned - solution) / jnp.linalg.norm(solution)
        return carry, error, jnp.mean(cosines), learned

    return optimizer.init, several


def train(method, arguments, grid, solution, advance):
    """Trains one network; the same seed gives the same first parameters and points."""
    graphdef, params = nnx.split(Network(arguments.width, nnx.Rngs(arguments.seed)))
    start, several = make_steps(
        method, arguments.learning_rate, arguments.steps, graphdef, grid, solution
    )
    carry, errors, cosines = (params, start(params)), [], []
    keys = jax.random.split(jax.random.key(arguments.seed), arguments.steps)
    for keys_now in np.split(keys, arguments.steps // RECORD):
        carry, error, cosine, learned = several(carry, keys_now)
        errors.append(float(error))
        cosines.append(float(cosine))
        advance()
    return {"errors": errors, "cosines": cosines, "learned": np.asarray(learned)}


def conclusion(runs):
    """What happened, in plain words."""
    summed, ours = (runs[name]["errors"][-1] for name in METHODS)
    opposed = 100 * np.mean(np.array(runs["summed Adam"]["cosines"]) < 0)
    lines = [f"Relative error: summed Adam {summed:.3f}, GDMAM {ours:.3f}."]
    if ours < summed:
        lines.append(f"GDMAM's error is {summed / ours:.1f} times smaller.")
    else:
        lines.append("GDMAM's error is not smaller here.")
    lines.append(f"Under the sum, the two gradients opposed each other {opposed:.0f}% of the time.")
    lines.append("One seed: docs/physics.md has several equations, seeds and methods.")
    return "\n".join(lines)


def draw(runs, shape, solution, path):
    """The solution, both errors, and error and cosine over the steps."""
    figure, axes = plt.subplot_mosaic(
        [["exact", "learned", "summed", "ours"], ["error", "error", "cosine", "cosine"]],
        figsize=(13, 6),
        layout="constrained",
    )
    summed, ours = (runs[name]["learned"] for name in METHODS)
    span = {"extent": (0, 1, -1, 1), "aspect": "auto", "origin": "lower"}
    worst = max(np.abs(summed - solution).max(), np.abs(ours - solution).max())
    maps = {
        "exact": ("Exact solution", solution, {"cmap": "RdBu_r", "vmin": -1, "vmax": 1}),
        "learned": ("Learned by GDMAM", ours, {"cmap": "RdBu_r", "vmin": -1, "vmax": 1}),
        "summed": ("Error of summed Adam", np.abs(summed - solution), {"vmin": 0, "vmax": worst}),
        "ours": ("Error of GDMAM", np.abs(ours - solution), {"vmin": 0, "vmax": worst}),
    }
    for name, (title, values, style) in maps.items():
        image = axes[name].imshow(values.reshape(shape), **span, **style)
        axes[name].set(title=title, xlabel="t", ylabel="x")
        figure.colorbar(image, ax=axes[name], shrink=0.8)
    for name, color in zip(METHODS, ("C7", "C0"), strict=True):
        steps = RECORD * np.arange(1, 1 + len(runs[name]["errors"]))
        axes["error"].plot(steps, runs[name]["errors"], color=color, label=name)
        axes["cosine"].plot(steps, runs[name]["cosines"], color=color, label=name)
    axes["error"].set(title="Relative error", xlabel="step", yscale="log")
    axes["cosine"].set(title="Cosine of the two gradients", xlabel="step", ylim=(-1, 1))
    axes["cosine"].axhline(0, color="grey", linewidth=0.5)
    for name in ("error", "cosine"):
        axes[name].legend(frameon=False)
        axes[name].spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=4000, help="per training (4000)")
    parser.add_argument("--learning-rate", type=float, default=5e-3, help="at its peak (5e-3)")
    parser.add_argument("--width", type=int, default=32, help="of the hidden layers (32)")
    parser.add_argument("--seed", type=int, default=0, help="of parameters and points (0)")
    parser.add_argument(
        "--picture", type=Path, default=Path("burgers.png"), help="where to draw the results"
    )
    arguments = parser.parse_args()
    if arguments.steps < 200 or arguments.steps % RECORD:
        parser.error(f"--steps must be a multiple of {RECORD}, at least 200")

    console = Console()
    x, t = np.meshgrid(np.linspace(-1, 1, 101), np.linspace(0, 1, 101), indexing="ij")
    grid = np.stack([x.ravel(), t.ravel()], axis=1)
    solution = exact(grid)
    runs = {}
    with Progress(console=console) as progress:
        for name in METHODS:
            advance = partial(
                progress.advance, progress.add_task(name, total=arguments.steps), RECORD
            )
            runs[name] = train(name, arguments, jnp.float32(grid), jnp.float32(solution), advance)
    console.print(conclusion(runs))
    draw(runs, x.shape, solution, arguments.picture)
    console.print(f"Picture: {arguments.picture}")


if __name__ == "__main__":
    main()
