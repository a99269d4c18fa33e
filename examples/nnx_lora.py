"""Fine-tune a model on a new task with LoRA, without forgetting the old one (Flax NNX).

A small network learns to read handwritten digits. Then the digits come upside down. From then on
only LoRA parameters are trained, with two losses that conflict: the error on the new, turned digits
(prediction), and how far the outputs for the old, upright ones have moved (alignment). Dropout,
batch statistics and the optimizer are NNX's own; the training step differs from an ordinary one
in its first line.

    python examples/nnx_lora.py            # under a minute on a CPU; also on GPU and TPU
    python examples/nnx_lora.py --help
"""

import argparse

import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_digits

import gdmam_jax as gdmam
from gdmam_jax.nnx import value_and_paired_grad

BATCH = 100
HIDDEN = 64
PRETRAINED = nnx.All(nnx.Param, nnx.Not(nnx.LoRAParam))


class Reader(nnx.Module):
    """Two hidden layers; every layer has a LoRA branch, which does nothing before it is trained."""

    def __init__(self, rank: int, rngs: nnx.Rngs):
        sizes = [(64, HIDDEN), (HIDDEN, HIDDEN), (HIDDEN, 10)]
        self.layers = nnx.List([nnx.LoRALinear(*size, lora_rank=rank, rngs=rngs) for size in sizes])
        self.norms = nnx.List([nnx.BatchNorm(HIDDEN, rngs=rngs) for _ in range(2)])
        self.dropout = nnx.Dropout(0.1, rngs=rngs)

    def __call__(self, images):
        """Logits, shape (batch, 10), of flat images, shape (batch, 64)."""
        hidden = images
        for layer, norm in zip(self.layers, self.norms, strict=False):
            hidden = self.dropout(nnx.relu(norm(layer(hidden))))
        return self.layers[-1](hidden)


def error(model, batch):
    logits = model(batch["images"])
    return optax.losses.softmax_cross_entropy_with_integer_labels(logits, batch["labels"]).mean()


def losses(model, batch):
    """One forward pass of turned and upright digits together, two losses."""
    count = len(batch["labels"])
    logits = model(jnp.concatenate([batch["turned"], batch["images"]]))
    new, old = logits[:count], logits[count:]
    prediction = optax.losses.softmax_cross_entropy_with_integer_labels(new, batch["labels"])
    alignment = optax.losses.kl_divergence(nnx.log_softmax(old), batch["before"])
    return prediction.mean(), alignment.mean()


@nnx.jit
def pretraining_step(model, optimizer, batch):
    gradients = nnx.grad(error, argnums=nnx.DiffState(0, PRETRAINED))(model, batch)
    optimizer.update(model, gradients)


@nnx.jit
def finetuning_step(model, optimizer, batch):
    _, pairs = value_and_paired_grad(losses, wrt=nnx.LoRAParam)(model, batch)
    optimizer.update(model, pairs)
    parts = gdmam.decompose(nnx.as_pure(pairs))
    return parts.geometry.cosine


def load_data():
    images, labels = load_digits(return_X_y=True)
    images = images.astype(np.float32) / 16
    turned = images.reshape(-1, 8, 8)[:, ::-1, ::-1].reshape(-1, 64)
    order = np.random.default_rng(0).permutation(len(labels))
    data = {"images": images[order], "turned": turned[order], "labels": labels[order]}
    return (
        {name: array[:1400] for name, array in data.items()},
        {name: array[1400:] for name, array in data.items()},
    )


def batches(data, epochs, seed):
    generator = np.random.default_rng(seed)
    for _ in range(epochs):
        order = generator.permutation(len(data["labels"]))
        for start in range(0, len(order) - BATCH + 1, BATCH):
            rows = order[start : start + BATCH]
            yield {name: array[rows] for name, array in data.items()}


@nnx.jit
def logits_of(model, images):
    return model(images)


def accuracy(model, images, labels):
    model.eval()
    return float(jnp.mean(logits_of(model, images).argmax(axis=1) == labels))


def report(name, model, test):
    new = accuracy(model, test["turned"], test["labels"])
    old = accuracy(model, test["images"], test["labels"])
    print(f"{name:<34} {new:>14.1%} {old:>14.1%}")
    return new, old


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pretraining-epochs", type=int, default=20)
    parser.add_argument("--epochs", type=int, default=20, help="epochs of fine-tuning (20)")
    parser.add_argument("--rank", type=int, default=4, help="rank of the LoRA matrices (4)")
    parser.add_argument("--learning-rate", type=float, default=5e-3)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    for name in ("pretraining_epochs", "epochs", "rank"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    if options.seed < 0:
        parser.error("--seed must be at least 0")

    train, test = load_data()
    pretrained = Reader(options.rank, nnx.Rngs(options.seed))
    optimizer = nnx.Optimizer(pretrained, optax.adam(3e-3), wrt=PRETRAINED)
    for batch in batches(train, options.pretraining_epochs, options.seed):
        pretraining_step(pretrained, optimizer, batch)

    print(f"{'right of 397 unseen digits':<34} {'turned (new)':>14} {'upright (old)':>14}")
    before = report("before fine-tuning", pretrained, test)
    # What the outputs for upright digits should stay close to.
    train["before"] = np.asarray(nnx.softmax(logits_of(pretrained, train["images"])))
    pretrained.train()
    rate = options.learning_rate
    methods = {
        "fine-tuned on the new digits only": gdmam.summed(optax.adam(rate), 1.0, 0.0),
        "both losses, summed": gdmam.summed(optax.adam(rate)),
        "both losses, GDMAM": gdmam.gdmam(rate, weight_decay=0.0),
    }
    results, cosines = {}, []
    for name, transformation in methods.items():
        model = nnx.clone(pretrained)
        optimizer = nnx.Optimizer(model, transformation, wrt=nnx.LoRAParam)
        cosines = [
            finetuning_step(model, optimizer, batch)
            for batch in batches(train, options.epochs, options.seed)
        ]
        results[name] = report(name, model, test)

    trained = optax.tree.size(nnx.as_pure(nnx.state(pretrained, nnx.LoRAParam)))
    total = optax.tree.size(nnx.as_pure(nnx.state(pretrained, nnx.Param)))
    alone, summed, ours = results.values()
    conflicts = np.mean(np.array(cosines) < 0)
    print(
        f"\nGDMAM trained {trained:,} of {total:,} parameters. The model now reads {ours[0]:.1%} "
        f"of the turned digits\n(before: {before[0]:.1%}) and still {ours[1]:.1%} of the upright "
        f"ones (before: {before[1]:.1%}; {alone[1]:.1%} when fine-tuned\non the turned ones only; "
        f"{summed[0]:.1%} and {summed[1]:.1%} with the sum of both losses). "
        f"The two gradients\nconflicted in {conflicts:.0%} of its steps."
    )


if __name__ == "__main__":
    main()
