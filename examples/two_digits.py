"""Two digits in one picture, read by one network with two heads: where to settle their conflict.

Handwritten digits lie over each other. The upper left one is the main task. The lower right one is
an auxiliary task, whose loss comes in another unit: it is multiplied by 0.01, 1 and 100. Each
factor is trained with in three ways: by Adam on the sum, with ConFIG's weights on a gradient for
each loss (pairs), and with ConFIG's weights at the features that both heads share, by one line in
the model (fork).

    python examples/two_digits.py            # about three minutes on two cores
    python examples/two_digits.py --help

Prints a table of accuracies and seconds, and draws them.
"""

import argparse
import time
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
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import gdmam_jax as gdmam
from gdmam_jax.nnx import value_and_paired_grad

matplotlib.use("Agg")
import matplotlib.pyplot as plt

SCALES = (0.01, 1.0, 100.0)
SHIFT = 2
"""Pixels by which the second digit lies to the right of the first, and below it."""
BLOCK = 100
"""Steps in one compiled call."""
HELD_OUT = 4000
"""Pictures that accuracies are measured on, of digits that no training has seen."""


class Reader(nnx.Module):
    """A trunk of two hidden layers, and a head for each digit."""

    def __init__(self, width, rngs):
        side = 8 + SHIFT
        self.trunk = nnx.Sequential(
            nnx.Linear(side * side, width, rngs=rngs),
            nnx.relu,
            nnx.Linear(width, width, rngs=rngs),
            nnx.relu,
        )
        self.heads = nnx.List([nnx.Linear(width, 10, rngs=rngs) for _ in range(2)])

    def __call__(self, pictures, forked=False):
        """Logits of the first and of the second digit, both of shape (N, 10)."""
        features = self.trunk(pictures.reshape(len(pictures), -1))
        copies = gdmam.fork(features, 2) if forked else (features, features)
        return [head(copy) for head, copy in zip(self.heads, copies, strict=True)]


def losses(model, batch, scale, forked=False):
    """Cross entropy of the first digit, and that of the second in another unit."""
    pictures, labels = batch
    cross_entropy = optax.losses.softmax_cross_entropy_with_integer_labels
    main, auxiliary = (
        cross_entropy(logits, label).mean()
        for logits, label in zip(model(pictures, forked), labels, strict=True)
    )
    return main, scale * auxiliary


def summed(model, batch, scale, forked=False):
    main, auxiliary = losses(model, batch, scale, forked)
    return main + auxiliary


# By name: the gradient, and the optimizer that takes it.
METHODS = {
    "sum": (nnx.grad(summed), optax.adam),
    "pairs": (
        lambda *args: value_and_paired_grad(losses)(*args)[1],
        lambda rate: gdmam.weighed(optax.adam(rate), gdmam.config_weighting),
    ),
    "fork": (nnx.grad(lambda *args: summed(*args, forked=True)), optax.adam),
}


def overlay(key, count, images, digits):
    """Pictures of two random digits each, and the labels of both."""
    chosen = jax.random.randint(key, (2, count), 0, len(images))
    room = ((0, 0), (0, SHIFT), (0, SHIFT)), ((0, 0), (SHIFT, 0), (SHIFT, 0))
    first, second = (jnp.pad(images[k], pad) for k, pad in zip(chosen, room, strict=True))
    return jnp.maximum(first, second), digits[chosen]


def make_steps(gradient, options, data):
    """A compiled function of the carried training, of a key for each step, and of the scale."""

    def step(training, key, scale):
        model, optimizer = training
        optimizer.update(model, gradient(model, overlay(key, options.batch, *data), scale))
        return training

    return nnx.jit(nnx.scan(step, in_axes=(nnx.Carry, 0, None), out_axes=nnx.Carry))


@nnx.jit
def accuracies(model, batch):
    pictures, labels = batch
    read = jnp.stack([jnp.argmax(logits, axis=1) for logits in model(pictures)])
    return jnp.mean(read == labels, axis=1)


def train(options, data, held_out, advance):
    """Trains every method, scale and seed; all methods in turn, so that their times compare."""
    compiled = {
        name: make_steps(gradient, options, data) for name, (gradient, _) in METHODS.items()
    }
    rate = optax.cosine_decay_schedule(options.learning_rate, options.steps)
    found = {name: [] for name in METHODS}
    seconds = {name: [] for name in METHODS}
    for scale in SCALES:
        results = {name: [] for name in METHODS}
        for seed in range(options.seeds):
            trainings = {}
            for name, (_, make_optimizer) in METHODS.items():
                model = Reader(options.width, nnx.Rngs(seed))
                trainings[name] = model, nnx.Optimizer(model, make_optimizer(rate), wrt=nnx.Param)
            keys = jax.random.split(jax.random.key(seed), options.steps).reshape(-1, BLOCK)
            for block in keys:
                for name, steps in compiled.items():
                    start = time.perf_counter()
                    trainings[name] = jax.block_until_ready(steps(trainings[name], block, scale))
                    seconds[name].append(time.perf_counter() - start)
                    advance(BLOCK)
            for name, (model, _) in trainings.items():
                results[name].append(np.asarray(accuracies(model, held_out)))
        for name, result in results.items():
            found[name].append(result)
    medians = {name: 1000 / BLOCK * float(np.median(times)) for name, times in seconds.items()}
    return {name: np.array(result) for name, result in found.items()}, medians


def table(found, seconds):
    """Means over the seeds, with the lowest and the highest; (scale, seed, task) each."""
    shown = Table(
        title="Accuracy of the main and, below it, the auxiliary task; seconds for 1,000 steps"
    )
    shown.add_column("method")
    for name in (*(f"auxiliary loss x {scale:g}" for scale in SCALES), "seconds"):
        shown.add_column(name, justify="right")
    for method, result in found.items():
        cells = [
            "\n".join(
                f"{values.mean():.3f} ({values.min():.3f} - {values.max():.3f})"
                for values in at_scale.T
            )
            for at_scale in result
        ]
        shown.add_row(method, *cells, f"{seconds[method]:.2f}")
    return shown


def draw(found, seconds, path):
    """Every seed's accuracies over the scale of the auxiliary loss, and the methods' times."""
    figure, (*tasks, times) = plt.subplots(
        1, 3, figsize=(12, 4), width_ratios=(3, 3, 2), layout="constrained"
    )
    tasks[1].sharey(tasks[0])
    colors = dict(zip(METHODS, ("C7", "C0", "C1"), strict=True))
    for number, axes in enumerate(tasks):
        for shift, (method, result) in enumerate(found.items()):
            places = np.arange(len(SCALES)) + 0.15 * (shift - 1)
            means = result[:, :, number].mean(axis=1)
            axes.plot(places, means, color=colors[method], label=method)
            axes.plot(places, result[:, :, number], ".", color=colors[method], alpha=0.5)
        axes.set_xticks(range(len(SCALES)), [f"{scale:g}" for scale in SCALES])
        axes.set(xlabel="scale of the auxiliary loss", ylabel="accuracy")
    tasks[0].set_title("Main task")
    tasks[1].set_title("Auxiliary task")
    tasks[0].legend(frameon=False)
    times.bar(list(seconds), list(seconds.values()), color=[colors[method] for method in seconds])
    times.set(title="Time", ylabel="seconds for 1,000 steps")
    for axes in (*tasks, times):
        axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=1500, help="steps of a training (1500)")
    parser.add_argument("--seeds", type=int, default=3, help="trainings of each kind (3)")
    parser.add_argument("--learning-rate", type=float, default=3e-3, help="initial rate (3e-3)")
    parser.add_argument("--width", type=int, default=256, help="width of hidden layers (256)")
    parser.add_argument("--batch", type=int, default=128, help="pictures in a step (128)")
    parser.add_argument("--picture", type=Path, default=Path("two_digits.png"))
    options = parser.parse_args()
    if options.steps < BLOCK or options.steps % BLOCK:
        parser.error(f"--steps must be a multiple of {BLOCK}, at least {BLOCK}")
    if min(options.seeds, options.width, options.batch) < 1:
        parser.error("--seeds, --width and --batch must be at least 1")

    digits = load_digits()
    seen, unseen, names_seen, names_unseen = (
        jnp.asarray(part)
        for part in train_test_split(
            np.float32(digits.images / 16), digits.target, test_size=0.3, random_state=0
        )
    )
    held_out = overlay(jax.random.key(99), HELD_OUT, unseen, names_unseen)
    console = Console(width=120)
    with Progress(console=console) as progress:
        total = len(SCALES) * len(METHODS) * options.seeds * options.steps
        task = progress.add_task("training", total=total)
        found, seconds = train(
            options, (seen, names_seen), held_out, lambda steps: progress.advance(task, steps)
        )
    console.print(table(found, seconds))
    draw(found, seconds, options.picture)
    console.print(f"Picture: {options.picture}")


if __name__ == "__main__":
    main()
