"""A physics-informed network for Burgers' equation: two losses that fight, summed and by GDMAM.

The network u(x, t) must satisfy u_t + u u_x = (0.01 / pi) u_xx inside (the residual loss), and be
-sin(pi x) at t = 0 and 0 at both ends (the data loss). The two gradients oppose each other most of
the time. The same network is trained by Adam on the sum of both losses, by `gdmam(learning_rate)`,
and by Muon behind GDMAM's allocation, with the same seed, learning rate and points.

The data loss is the prediction, the loss that leads. The residual has trivial solutions, such as
u = 0. If it led, a training could end there.

    python examples/burgers.py

Prints the errors against the exact solution, and draws them. Takes half a minute on two cores.
"""

import argparse
import itertools
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from rich.console import Console
from rich.progress import Progress

import gdmam_jax as gdmam

matplotlib.use("Agg")
import matplotlib.pyplot as plt

VISCOSITY = 0.01 / np.pi
RESIDUAL_POINTS, DATA_POINTS = 256, 64
RECORD = 100
"""Steps in one compiled call; after each call the error is measured."""

METHODS = {
    "summed Adam": lambda rate: gdmam.summed(optax.adam(rate)),
    "GDMAM": lambda rate: gdmam.gdmam(rate),
    "GDMAM, Muon": lambda rate: optax.chain(gdmam.allocate(), optax.contrib.muon(rate)),
}
COLORS = dict(zip(METHODS, ("C7", "C0", "C2"), strict=True))


@partial(jax.jit, static_argnums=1)
def make_start(seed, width):
    """Weights and biases of four hidden layers, from (x, t) to u, and a key for the points."""
    shapes = list(itertools.pairwise([2, width, width, width, width, 1]))
    *layer_keys, key = jax.random.split(jax.random.key(seed), len(shapes) + 1)
    weights = map(jax.nn.initializers.lecun_normal(), layer_keys, shapes)
    return [(weight, jnp.zeros(weight.shape[1])) for weight in weights], key


def network(params, points):
    """Values u of shape (N, 1) at points of shape (N, 2), with hyperbolic tangents."""
    hidden = points * jnp.array([1.0, 2.0]) - jnp.array([0.0, 1.0])  # to [-1, 1]
    for weight, bias in params[:-1]:
        hidden = jnp.tanh(hidden @ weight + bias)
    weight, bias = params[-1]
    return hidden @ weight + bias


def residual(u, points):
    """How far a function is from solving the equation: forward-mode derivatives, batched."""
    to_right = jnp.zeros_like(points).at[:, 0].set(1)
    ahead = jnp.zeros_like(points).at[:, 1].set(1)

    def along_x(points):
        return jax.jvp(u, (points,), (to_right,))

    (value, slope), push = jax.linearize(along_x, points)
    _, curvature = push(to_right)
    change, _ = push(ahead)
    return change + value * slope - VISCOSITY * curvature


def losses(params, batch):
    """The data loss, which leads, and the residual loss."""
    inside, edge, values = batch
    u = partial(network, params)
    # The mean at t = 0, plus the mean at both ends.
    data_loss = jnp.sum((u(edge) - values) ** 2) / DATA_POINTS
    return data_loss, jnp.mean(residual(u, inside) ** 2)


def draw_batch(key):
    """New points for a step: inside, and at t = 0 and x = -1 and 1, with the values of u there."""
    shape = (RESIDUAL_POINTS + 2 * DATA_POINTS, 2)
    points = jax.random.uniform(key, shape, minval=jnp.array([-1.0, 0.0]))
    inside, at_first, at_ends = jnp.split(points, (RESIDUAL_POINTS, RESIDUAL_POINTS + DATA_POINTS))
    at_first = at_first.at[:, 1].set(0)
    at_ends = at_ends.at[:, 0].set(jnp.where(at_ends[:, 0] < 0, -1, 1))
    edge = jnp.concatenate([at_first, at_ends])
    return inside, edge, -jnp.sin(jnp.pi * edge[:, :1])


def exact(points):
    """The solution, by the Cole-Hopf transformation and Gauss-Hermite quadrature in float64."""
    roots, weights = np.polynomial.hermite.hermgauss(100)
    x, t = points[:, :1], points[:, 1:]
    y = x - np.sqrt(4 * VISCOSITY * t) * roots
    exponent = -np.cos(np.pi * y) / (2 * np.pi * VISCOSITY)
    mass = weights * np.exp(exponent - exponent.max(axis=1, keepdims=True))
    return -(np.sin(np.pi * y) * mass).sum(1, keepdims=True) / mass.sum(1, keepdims=True)


def make_steps(method, learning_rate, steps, grid, solution):
    """The optimizer's start, and a block of training steps, each compiled once."""
    schedule = optax.warmup_cosine_decay_schedule(0.0, learning_rate, 100, steps)
    optimizer = METHODS[method](schedule)

    def step(carry, _):
        params, opt_state, key = carry
        key, points_key = jax.random.split(key)
        _, pairs = gdmam.value_and_paired_grad(losses)(params, draw_batch(points_key))
        updates, opt_state = optimizer.update(pairs, opt_state, params)
        cosine = gdmam.decompose(pairs).geometry.cosine
        return (optax.apply_updates(params, updates), opt_state, key), cosine

    @jax.jit
    def several(carry):
        carry, cosines = jax.lax.scan(step, carry, length=RECORD)
        learned = network(carry[0], grid)
        error = jnp.linalg.norm(learned - solution) / jnp.linalg.norm(solution)
        return carry, error, jnp.mean(cosines), jnp.mean(cosines < 0), learned

    return jax.jit(optimizer.init), several


def train(method, arguments, starts, grid, solution, advance):
    """Trains a network from each start; every method has the same networks and points."""
    init, several = make_steps(method, arguments.learning_rate, arguments.steps, grid, solution)
    results = []
    for params, key in starts:
        carry, history = (params, init(params), key), []
        for _ in range(arguments.steps // RECORD):
            carry, *seen, learned = several(carry)
            history.append([float(each) for each in seen])
            advance()
        run = dict(zip(("errors", "cosines", "opposed"), zip(*history, strict=True), strict=True))
        results.append({**run, "learned": np.asarray(learned)})
    return results


def conclusion(runs):
    """What happened, in plain words."""
    finals = {name: np.array([run["errors"][-1] for run in found]) for name, found in runs.items()}
    lines = []
    for name, errors in finals.items():
        several = f" ({errors.min():.3f} to {errors.max():.3f})" if len(errors) > 1 else ""
        lines.append(f"{name}: relative error {np.median(errors):.3f}{several}.")
    opposed = 100 * np.mean([run["opposed"] for run in runs["summed Adam"]])
    lines.append(f"Under the sum, the two gradients opposed each other in {opposed:.0f}% of steps.")
    count = len(runs["summed Adam"])
    lines.append("One seed; --seeds 10 trains ten." if count == 1 else f"Medians of {count} seeds.")
    return "\n".join(lines)


def draw(runs, shape, solution, path):
    """The solution, each method's error, and errors and cosines over the steps, of one seed."""
    first = {name: found[0] for name, found in runs.items()}
    figure, axes = plt.subplot_mosaic(
        [["exact", *METHODS], ["error", "error", "cosine", "cosine"]],
        figsize=(13, 6),
        layout="constrained",
    )
    span = {"extent": (0, 1, -1, 1), "aspect": "auto", "origin": "lower"}
    off = {name: np.abs(run["learned"] - solution) for name, run in first.items()}
    worst = max(error.max() for error in off.values())
    maps = {"exact": ("Exact solution", solution, {"cmap": "RdBu_r", "vmin": -1, "vmax": 1})}
    for name, error in off.items():
        maps[name] = (f"Error of {name}", error, {"vmin": 0, "vmax": worst})
    for name, (title, values, style) in maps.items():
        image = axes[name].imshow(values.reshape(shape), **span, **style)
        axes[name].set(title=title, xlabel="t", ylabel="x")
        figure.colorbar(image, ax=axes[name], shrink=0.8)
    for name, run in first.items():
        steps = RECORD * np.arange(1, 1 + len(run["errors"]))
        axes["error"].plot(steps, run["errors"], color=COLORS[name], label=name)
        axes["cosine"].plot(steps, run["cosines"], color=COLORS[name], label=name)
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
    parser.add_argument("--steps", type=int, default=4000, help="steps of a training (4000)")
    parser.add_argument("--learning-rate", type=float, default=5e-3, help="peak rate (5e-3)")
    parser.add_argument("--width", type=int, default=32, help="width of hidden layers (32)")
    parser.add_argument("--seeds", type=int, default=1, help="networks per method (1), from seed 0")
    parser.add_argument(
        "--picture", type=Path, default=Path("burgers.png"), help="where to draw the results"
    )
    parser.add_argument("--output", type=Path, help="where to write every final error, as JSON")
    arguments = parser.parse_args()
    if arguments.seeds < 1 or arguments.width < 1:
        parser.error("--seeds and --width must be at least 1")
    if arguments.steps < 200 or arguments.steps % RECORD:
        parser.error(f"--steps must be a multiple of {RECORD}, at least 200")
    if arguments.output is not None:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)

    console = Console()
    x, t = np.meshgrid(np.linspace(-1, 1, 101), np.linspace(0, 1, 101), indexing="ij")
    grid = np.stack([x.ravel(), t.ravel()], axis=1)
    solution = exact(grid)
    data = jnp.float32(grid), jnp.float32(solution)
    starts = [make_start(seed, arguments.width) for seed in range(arguments.seeds)]
    stopping = threading.Event()

    def train_with_progress(name):
        task = progress.add_task(name, total=arguments.steps * arguments.seeds)

        def advance():
            if stopping.is_set():
                raise KeyboardInterrupt
            progress.advance(task, RECORD)

        return train(name, arguments, starts, *data, advance)

    # A network this small keeps one core busy: the methods train side by side.
    with Progress(console=console) as progress, ThreadPoolExecutor() as pool:
        try:
            runs = dict(zip(METHODS, pool.map(train_with_progress, METHODS), strict=True))
        finally:
            stopping.set()  # An interrupt ends the other threads, too.
    console.print(conclusion(runs))
    draw(runs, x.shape, solution, arguments.picture)
    console.print(f"Picture: {arguments.picture}")
    if arguments.output is not None:
        finals = {name: [run["errors"][-1] for run in found] for name, found in runs.items()}
        arguments.output.write_text(json.dumps(finals, indent=1) + "\n")


if __name__ == "__main__":
    main()
