"""Three losses, none of them weighed by hand: a wave that a stream carries (Flax NNX).

A network u(x, t) learns the convection equation u_t + 10 u_x = 0. Its prediction loss is the wave
at t = 0. The alignment losses are what flows in at x = 0, and the equation's residual. The residual
does not lead, since any constant solves it. The example shows both forms of alignment losses, a
tuple and a dictionary by name. A training step differs from an ordinary one in its first line.

    python examples/three_losses.py            # under 30 seconds on two cores
    python examples/three_losses.py --help

Prints a table of three ways to weigh the losses, and draws what they learned.
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
from rich.table import Table

import gdmam_jax as gdmam
from gdmam_jax.nnx import value_and_paired_grad

matplotlib.use("Agg")
import matplotlib.pyplot as plt

SPEED, LENGTH = 10.0, 2 * np.pi
RECORD = 100
"""Steps in one compiled call; after each call the error is measured."""


class Network(nnx.Module):
    """Three hidden layers of hyperbolic tangents, from (x, t) to u."""

    def __init__(self, width, rngs):
        sizes = [2, width, width, width, 1]
        self.layers = nnx.List([nnx.Linear(a, b, rngs=rngs) for a, b in itertools.pairwise(sizes)])

    def __call__(self, x, t):
        """Values at places and times, all of shape (N, 1)."""
        hidden = jnp.concatenate([2 * x / LENGTH - 1, 2 * t - 1], axis=1)
        for layer in self.layers[:-1]:
            hidden = jnp.tanh(layer(hidden))
        return self.layers[-1](hidden)


def losses_in_order(model, x, t):
    """Three losses: the prediction loss, and a tuple of the alignment losses."""
    zeros, ones = jnp.zeros_like(x), jnp.ones_like(x)
    _, change = jax.jvp(model, (x, t), (SPEED * ones, ones))  # u_t + 10 u_x
    residual = jnp.mean(change**2)
    inflow = jnp.mean((model(zeros, t) - jnp.sin(-SPEED * t)) ** 2)
    initial = jnp.mean((model(x, zeros) - jnp.sin(x)) ** 2)
    return initial, (inflow, residual)


def losses_by_name(model, x, t):
    """The same, the alignment losses in a dictionary."""
    initial, (inflow, residual) = losses_in_order(model, x, t)
    return initial, {"inflow": inflow, "residual": residual}


# An optimizer is told how many alignment losses there are, or what they are called.
METHODS = {
    "sum": (
        losses_in_order,
        lambda rate: gdmam.weighed(optax.adam(rate), gdmam.sum_weighting, alignment_losses=2),
    ),
    "ConFIG": (
        losses_in_order,
        lambda rate: gdmam.weighed(optax.adam(rate), gdmam.config_weighting, alignment_losses=2),
    ),
    "GDMAM": (
        losses_by_name,
        lambda rate: gdmam.gdmam(rate, alignment_losses=("inflow", "residual")),
    ),
}


def make_steps(losses, points):
    """A compiled function of the carried training and of keys, one for each step."""

    def step(training, key):
        model, optimizer = training
        x, t = jax.random.uniform(key, (2, points, 1)) * jnp.array([LENGTH, 1]).reshape(2, 1, 1)
        values, pairs = value_and_paired_grad(losses)(model, x, t)
        optimizer.update(model, pairs)
        happened = gdmam.diagnostics(optimizer.opt_state)
        cosines = {name: value for name, value in happened.items() if name.startswith("cosine")}
        return training, (values, cosines)

    return nnx.jit(nnx.scan(step, in_axes=(nnx.Carry, 0), out_axes=(nnx.Carry, 0)))


def train(method, options, grid, solution, advance):
    """Trains one network; the same seed gives the same first parameters and points."""
    losses, make_optimizer = METHODS[method]
    rate = optax.warmup_cosine_decay_schedule(0.0, options.learning_rate, 100, options.steps)
    model = Network(options.width, nnx.Rngs(options.seed))
    training = model, nnx.Optimizer(model, make_optimizer(rate), wrt=nnx.Param)
    steps = make_steps(losses, options.points)
    keys = jax.random.split(jax.random.key(options.seed), options.steps)
    errors, records = [], []
    for some in keys.reshape(-1, RECORD):
        training, happened = steps(training, some)
        learned = np.asarray(training[0](*grid))
        errors.append(np.linalg.norm(learned - solution) / np.linalg.norm(solution))
        records.append(jax.tree.map(jnp.mean, happened))
        advance(RECORD)
    (initial, alignment), cosines = jax.tree.map(lambda *means: np.array(means), *records)
    values = [initial, *jax.tree.leaves(alignment)]
    return {"errors": errors, "losses": values, "cosines": cosines, "learned": learned}


def table(runs):
    """Errors, and the losses' means over the last steps."""
    shown = Table(title="After training")
    shown.add_column("method")
    for name in ("relative error", "initial loss", "inflow loss", "residual loss"):
        shown.add_column(name, justify="right")
    for method, run in runs.items():
        values = [f"{loss[-1]:.1e}" for loss in run["losses"]]
        shown.add_row(method, f"{run['errors'][-1]:.4f}", *values)
    return shown


def draw(runs, shape, solution, path):
    """The wave and every method's error; the errors, and GDMAM's cosines, over the steps."""
    figure = plt.figure(figsize=(13, 6), layout="constrained")
    above, below = figure.subfigures(2, 1)
    maps, (error, cosine) = above.subplots(1, 1 + len(runs)), below.subplots(1, 2)
    span = {"extent": (0, 1, 0, LENGTH), "aspect": "auto", "origin": "lower"}
    wrong = {method: np.abs(run["learned"] - solution) for method, run in runs.items()}
    worst = max(each.max() for each in wrong.values())
    shown = {"Exact solution": (solution, {"cmap": "RdBu_r"})}
    for method in runs:
        shown[f"Error of {method}"] = (wrong[method], {"vmin": 0, "vmax": worst})
    for axes, (title, (values, style)) in zip(maps, shown.items(), strict=True):
        image = axes.imshow(values.reshape(shape), **span, **style)
        axes.set(title=title, xlabel="t", ylabel="x")
        above.colorbar(image, ax=axes, shrink=0.8)
    for (method, run), color in zip(runs.items(), ("C7", "C1", "C0"), strict=False):
        steps = RECORD * np.arange(1, 1 + len(run["errors"]))
        error.plot(steps, run["errors"], color=color, label=method)
    for name, values in runs["GDMAM"]["cosines"].items():
        cosine.plot(steps, values, label=name.removeprefix("cosine/"))
    error.set(title="Relative error", xlabel="step", yscale="log")
    cosine.set(title="GDMAM: cosine with the initial loss's gradient", xlabel="step")
    cosine.axhline(0, color="grey", linewidth=0.5)
    for axes in (error, cosine):
        axes.legend(frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=1500, help="steps of a training (1500)")
    parser.add_argument("--learning-rate", type=float, default=1e-2, help="peak rate (1e-2)")
    parser.add_argument("--width", type=int, default=24, help="width of hidden layers (24)")
    parser.add_argument("--points", type=int, default=128, help="per step and loss (128)")
    parser.add_argument("--seed", type=int, default=0, help="of parameters and points (0)")
    parser.add_argument("--picture", type=Path, default=Path("three_losses.png"))
    options = parser.parse_args()
    if options.steps < 2 * RECORD or options.steps % RECORD:
        parser.error(f"--steps must be a multiple of {RECORD}, at least {2 * RECORD}")
    if options.width < 1 or options.points < 1:
        parser.error("--width and --points must be at least 1")

    x, t = np.meshgrid(np.linspace(0, LENGTH, 101), np.linspace(0, 1, 101), indexing="ij")
    grid = jnp.float32(x.reshape(-1, 1)), jnp.float32(t.reshape(-1, 1))
    solution = np.sin(x - SPEED * t).reshape(-1, 1)
    runs, console = {}, Console()
    with Progress(console=console) as progress:
        for method in METHODS:
            advance = partial(progress.advance, progress.add_task(method, total=options.steps))
            runs[method] = train(method, options, grid, solution, advance)
    console.print(table(runs))
    summed, ours = (runs[method]["errors"][-1] for method in ("sum", "GDMAM"))
    console.print(
        f"GDMAM's error is {ours / summed:.2g} times that of Adam on the sum, with this seed and "
        "rate."
    )
    draw(runs, x.shape, solution, options.picture)
    console.print(f"Picture: {options.picture}")


if __name__ == "__main__":
    main()
