"""Learn to read digits from few labels and many images without any (Flax Linen, TrainState).

Of 1,400 handwritten digits only a few are labelled. An encoder feeds two heads: a classifier
(prediction loss, on the labelled digits) and a decoder that draws the image again (alignment loss,
on all of them), so that the unlabelled ones shape the representation too. Batch statistics and
dropout go through ``aux`` and ``rngs`` as in any Linen training. In the training step only the
line that takes the gradients is new.

    python examples/linen_train_state.py            # under a minute on a CPU; also on GPU and TPU
    python examples/linen_train_state.py --help
"""

import argparse
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax.training.train_state import TrainState
from sklearn.datasets import load_digits

import gdmam_jax as gdmam

BATCH = 100


class Reader(nn.Module):
    """An encoder with a classifier and a decoder on top."""

    @nn.compact
    def __call__(self, images, train):
        """Logits, shape (batch, 10), and images, shape (batch, 64), of images."""
        hidden = nn.Dense(64, name="encoder")(images)
        hidden = nn.BatchNorm(use_running_average=not train, name="norm")(hidden)
        hidden = nn.Dropout(0.1, deterministic=not train)(nn.relu(hidden))
        logits = nn.Dense(10, name="classifier")(hidden)
        return logits, nn.Dense(64, name="decoder")(hidden)


MODEL = Reader()


class State(TrainState):
    """A train state with the model's batch statistics and a key for its dropout."""

    batch_stats: Any
    key: jax.Array


def losses(params, state, images, labels):
    """One forward pass, two losses; a label below 0 means that there is none."""
    (logits, drawn), changed = state.apply_fn(
        {"params": params, "batch_stats": state.batch_stats},
        images,
        train=True,
        rngs={"dropout": jax.random.fold_in(state.key, state.step)},
        mutable=["batch_stats"],
    )
    labelled = labels >= 0
    errors = optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels * labelled)
    prediction = jnp.sum(errors * labelled) / jnp.maximum(1, jnp.sum(labelled))
    alignment = jnp.mean((drawn - images) ** 2)
    return (prediction, alignment), changed["batch_stats"]


@partial(jax.jit, donate_argnums=0)
def train_epoch(state, images, labels):
    """One epoch; images and labels have a leading axis of steps."""

    def step(state, batch):
        (values, batch_stats), pairs = gdmam.value_and_paired_grad(losses, has_aux=True)(
            state.params, state, *batch
        )
        return state.apply_gradients(grads=pairs, batch_stats=batch_stats), values

    return jax.lax.scan(step, state, (images, labels))


@jax.jit
def logits_of(state, images):
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    return state.apply_fn(variables, images, train=False)[0]


def load_data(count, seed):
    """Images and labels: of the training set only ``count`` labels, evenly over the digits."""
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(seed).permutation(len(labels))
    images, labels = images[order].astype(np.float32) / 16, labels[order]
    kept = np.concatenate([np.flatnonzero(labels[:1400] == digit) for digit in range(10)])
    rank = np.concatenate([np.arange(np.sum(labels[:1400] == digit)) for digit in range(10)])
    hidden = np.full(1400, -1)
    few = kept[np.argsort(rank, kind="stable")[:count]]
    hidden[few] = labels[few]
    return (images[:1400], hidden), (images[1400:], labels[1400:])


def train(optimizer, data, epochs, seed):
    """A trained state, and both losses in the last epoch."""
    images, labels = data
    variables = MODEL.init(jax.random.key(seed), images[:1], train=False)
    state = State.create(
        apply_fn=MODEL.apply,
        params=variables["params"],
        batch_stats=variables["batch_stats"],
        tx=optimizer,
        key=jax.random.key(seed + 1),
    ).replace(step=jnp.asarray(0))
    generator = np.random.default_rng(seed)
    labelled, everything = np.flatnonzero(labels >= 0), np.arange(len(labels))
    for _ in range(epochs):
        # Half of every batch is labelled, so that no step is without a prediction loss.
        steps = len(labels) // (BATCH // 2)
        rows = np.concatenate(
            [
                generator.choice(labelled, (steps, BATCH // 2)),
                generator.permutation(everything)[: steps * (BATCH // 2)].reshape(steps, -1),
            ],
            axis=1,
        )
        state, values = train_epoch(state, images[rows], labels[rows])
    return state, [float(value.mean()) for value in values]


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--labels", type=int, default=50, help="how many labels, 10 to 1400 (50)")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--seeds", type=int, default=3, help="how many runs to average (3)")
    options = parser.parse_args()
    if not 10 <= options.labels <= 1400:
        parser.error("--labels must lie between 10 and 1400")
    if options.epochs < 1 or options.seeds < 1:
        parser.error("--epochs and --seeds must be at least 1")

    rate = options.learning_rate
    methods = {
        "labels only": gdmam.summed(optax.adam(rate), alignment_weight=0.0),
        "both losses, summed": gdmam.summed(optax.adam(rate)),
        "both losses, GDMAM": gdmam.gdmam(rate, weight_decay=0.0),
    }
    print(f"{'':<22} {'unseen digits read':>20} {'error of drawing':>18}")
    results, report = {}, {}
    for name, optimizer in methods.items():
        accuracies, drawings = [], []
        for seed in range(options.seeds):
            data, (images, labels) = load_data(options.labels, seed)
            state, (_, drawing) = train(optimizer, data, options.epochs, seed)
            accuracies.append(float(jnp.mean(logits_of(state, images).argmax(axis=1) == labels)))
            drawings.append(drawing)
        results[name] = np.mean(accuracies)
        spread = f" ± {np.std(accuracies):.1%}" if options.seeds > 1 else ""
        print(f"{name:<22} {np.mean(accuracies):>12.1%}{spread:>8} {np.mean(drawings):>18.4f}")
        if "GDMAM" in name:
            report = gdmam.diagnostics(state.opt_state)
    alone, summed, ours = results.values()
    print(
        f"\nFrom {options.labels} labels and {1400 - options.labels:,} images without one, the "
        f"model trained with GDMAM reads {ours:.1%} of the unseen\ndigits; from the labels alone "
        f"it is {alone:.1%}, with the sum of both losses {summed:.1%}. At the last step the\n"
        f"two gradients' cosine was {float(report['cosine']):.2f}, and the prediction momentum "
        f"{float(report['prediction_momentum']):.2f}."
    )


if __name__ == "__main__":
    main()
