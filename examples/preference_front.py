"""How much should a regulariser count? A front of preferences in one program, picked by validation.

A network learns scikit-learn's handwritten digits from 300 images, of which a third have a label
drawn at random. Its prediction loss is the cross-entropy; its alignment loss is a regulariser: a
small change of the image should change the answer little. The two losses do not say how much that
should count. So a dozen preferences are trained at once, with `jax.vmap` over a number that
`optax.inject_hyperparams` puts into the optimizer's state. The accuracy on other images, whose
labels are just as often wrong, picks one.

    python examples/preference_front.py            # under 30 seconds on two cores
    python examples/preference_front.py --wrong 0  # all labels right: the default is picked
    python examples/preference_front.py --help

Prints how well the pick, the default and the sum do on the test images, and draws the front.
"""

import argparse
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from sklearn.datasets import load_digits

import gdmam_jax as gdmam

matplotlib.use("Agg")
import matplotlib.pyplot as plt

BLOCK = 100
"""Steps in one compiled call, after which the progress bar moves."""
TRAINING, VALIDATION = 300, 500
"""Images; the other 997 are for testing."""
BATCH = 64


def gdmam_of(rate, number):
    """GDMAM with the number as its preference for the alignment loss."""
    return gdmam.gdmam(rate, weighting=gdmam.unit_weighting(preference=number))


def adam_on_the_sum(rate, number):
    """Adam on the sum with the number as the factor of the alignment loss."""
    return gdmam.weighed(optax.adam(rate), gdmam.constant_weighting(1.0, number))


METHODS = {"GDMAM": gdmam_of, "sum": adam_on_the_sum}


def load(seed, wrong):
    """Images and labels to train on, to pick by and to test on; the last has all labels right."""
    random = np.random.default_rng(seed)
    digits = load_digits()
    order = random.permutation(len(digits.target))
    pixels, labels = np.float32(digits.data[order] / 16), digits.target[order]
    drawn = np.where(
        random.random(len(labels)) < wrong, random.integers(0, 10, len(labels)), labels
    )
    end = TRAINING + VALIDATION
    parts = (
        (pixels[:TRAINING], drawn[:TRAINING]),
        (pixels[TRAINING:end], drawn[TRAINING:end]),
        (pixels[end:], labels[end:]),
    )
    return jax.tree.map(jnp.asarray, parts)


def init(key, width):
    """Two hidden layers, as a list of kernels and biases."""
    sizes = 64, width, width, 10
    return [
        (jax.random.normal(key, (a, b)) / a**0.5, jnp.zeros(b))
        for key, a, b in zip(jax.random.split(key, 3), sizes[:-1], sizes[1:], strict=True)
    ]


def answer(params, pixels):
    """A logit for each digit."""
    for kernel, bias in params[:-1]:
        pixels = jnp.tanh(pixels @ kernel + bias)
    kernel, bias = params[-1]
    return pixels @ kernel + bias


def losses(params, pixels, labels, change):
    """Cross-entropy, and how much the answers change, squared, for a change of the pixels."""
    logits, changes = jax.jvp(lambda pixels: answer(params, pixels), (pixels,), (change,))
    wrong = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return jnp.mean(wrong), jnp.mean(changes**2)


def make_front(make_optimizer, data, options):
    """A function that starts a training for each number, and one that makes a block of steps."""
    rate = optax.cosine_decay_schedule(options.learning_rate, options.steps)
    # The number becomes a part of the optimizer's state, where each training has its own.
    optimizer = optax.inject_hyperparams(lambda number: make_optimizer(rate, number))(number=1.0)

    def start(number):
        params = init(jax.random.key(options.seed), options.width)
        state = optimizer.init(params)
        return params, state._replace(hyperparams={"number": number})

    def step(carry, key):
        params, state = carry
        for_batch, for_change = jax.random.split(key)
        rows = jax.random.randint(for_batch, (BATCH,), 0, TRAINING)
        pixels, labels = (array[rows] for array in data)
        change = jax.random.normal(for_change, pixels.shape)
        values, pairs = gdmam.value_and_paired_grad(losses)(params, pixels, labels, change)
        updates, state = optimizer.update(pairs, state, params)
        return (optax.apply_updates(params, updates), state), values

    def block(carry, keys):
        return jax.lax.scan(step, carry, keys)[0]

    return jax.jit(jax.vmap(start)), jax.jit(jax.vmap(block, in_axes=(0, None)))


@jax.jit
def judge(front, validation, test):
    """Both losses and the accuracy on the validation images, and the test accuracy, of each."""
    change = jax.random.normal(jax.random.key(0), validation[0].shape)

    def accuracy(params, pixels, labels):
        return jnp.mean(jnp.argmax(answer(params, pixels), axis=-1) == labels)

    def one(params):
        prediction, alignment = losses(params, *validation, change)
        return {
            "prediction": prediction,
            "alignment": alignment,
            "validation": accuracy(params, *validation),
            "test": accuracy(params, *test),
        }

    return jax.vmap(one)(front)


def train(make_optimizer, numbers, parts, options, advance):
    """Trains the whole front: what `judge` says of each number."""
    start, block = make_front(make_optimizer, parts[0], options)
    carry = start(jnp.asarray(numbers, jnp.float32))
    keys = jax.random.split(jax.random.key(options.seed + 1), options.steps)
    for some in keys.reshape(-1, BLOCK):
        carry = jax.block_until_ready(block(carry, some))
        advance(BLOCK)
    return jax.tree.map(np.asarray, judge(carry[0], *parts[1:]))


def table(numbers, fronts):
    """The pick and the number 1 of each method."""
    shown = Table(title="Accuracy", caption="picked: the highest on the validation images")
    shown.add_column("method")
    for name in ("number", "validation", "test"):
        shown.add_column(name, justify="right")
    for method, front in fronts.items():
        for how, at in (("picked", pick(front)), ("1", int(np.argmax(numbers == 1)))):
            cells = (
                f"{numbers[at]:.2g}",
                f"{front['validation'][at]:.3f}",
                f"{front['test'][at]:.3f}",
            )
            shown.add_row(f"{method}, {how}", *cells)
    return shown


def pick(front):
    """The place of the highest validation accuracy."""
    return int(np.argmax(front["validation"]))


def draw(numbers, fronts, path):
    """Prediction against alignment loss, and the accuracies over the numbers; picks are stars."""
    figure, (losses, accuracies) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for (method, front), color in zip(fronts.items(), ("C0", "C7"), strict=False):
        best = pick(front)
        for axes, x, y in (
            (losses, front["alignment"], front["prediction"]),
            (accuracies, numbers, front["test"]),
        ):
            axes.plot(x, y, "o-", color=color, label=method, markersize=4)
            axes.plot(x[best], y[best], "*", color=color, markersize=16)
        accuracies.plot(numbers, front["validation"], ":", color=color)
    ours = fronts["GDMAM"]
    for number, *at in zip(numbers, ours["alignment"], ours["prediction"], strict=True):
        shift = {"xytext": (9, 5), "textcoords": "offset points", "annotation_clip": True}
        losses.annotate(f"{number:.2g}", at, fontsize=8, **shift)
    losses.set(xscale="log", xlabel="alignment loss", ylabel="prediction loss")
    # Further left the answers hardly depend on the image.
    losses.set_xlim(left=1e-4)
    losses.set_title("The front, on the validation images")
    accuracies.set(xscale="log", xlabel="preference, or factor in the sum", ylabel="accuracy")
    accuracies.set_title("Test images; dotted: validation, wrong labels and all")
    for axes in (losses, accuracies):
        axes.legend(frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=12, help="preferences from 0.01 to 100 (12)")
    parser.add_argument("--steps", type=int, default=600, help="steps of a training (600)")
    parser.add_argument("--learning-rate", type=float, default=3e-3, help="initial rate (3e-3)")
    parser.add_argument("--width", type=int, default=48, help="width of hidden layers (48)")
    parser.add_argument("--wrong", type=float, default=1 / 3, help="share of random labels (1/3)")
    parser.add_argument("--seed", type=int, default=0, help="of data, parameters, batches (0)")
    parser.add_argument("--picture", type=Path, default=Path("preference_front.png"))
    options = parser.parse_args()
    if options.steps < BLOCK or options.steps % BLOCK:
        parser.error(f"--steps must be a multiple of {BLOCK}, at least {BLOCK}")
    if options.count < 2 or options.width < 1:
        parser.error("--count must be at least 2, and --width at least 1")
    if options.seed < 0:
        parser.error("--seed must be at least 0")
    if not 0 <= options.wrong <= 1:
        parser.error("--wrong must be between 0 and 1")

    # 1 is GDMAM's default, and the plain sum.
    numbers = np.unique(np.append(np.geomspace(0.01, 100, options.count), 1.0))
    parts, fronts, console = load(options.seed, options.wrong), {}, Console()
    with Progress(console=console) as progress:
        for method, make_optimizer in METHODS.items():
            task = progress.add_task(method, total=options.steps)
            fronts[method] = train(
                make_optimizer,
                numbers,
                parts,
                options,
                lambda steps, task=task: progress.advance(task, steps),
            )
    console.print(table(numbers, fronts))
    draw(numbers, fronts, options.picture)
    console.print(f"Picture: {options.picture}")


if __name__ == "__main__":
    main()
