r"""Which digits are in the picture, and how much of each? Label distributions of blended images.

Three handwritten digits (scikit-learn's, 8 x 8) are laid over each other in known
proportions, which are the label. An encoder, convolutional or a vision transformer, feeds RDA.
RDA's prediction loss says how far the predicted distribution is off. Its alignment loss says how
differently images and labels are represented. GDMAM is compared with the sum of both.

    python examples/image_labels.py                       # about a minute on two cores
    python examples/image_labels.py --encoder vit --hidden 512 --layers 8 --batch 4096 --bf16 \
        --fsdp --steps 20000 --checkpoints runs/digits    # a GPU machine or a TPU slice
    python examples/image_labels.py --help

With several processes, run the same command in each: see docs/many_devices.md.
"""

import argparse
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import training
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from language_model import Block
from sklearn.datasets import load_digits

import gdmam_jax as gdmam
import gdmam_jax.nnx
from gdmam_jax import ldl


def load_images():
    """Digits to train with, and others: ``(images in [0, 1], one-hot labels)`` of both."""
    digits = load_digits()
    images = digits.images[..., None].astype(np.float32) / 16
    labels = np.eye(10, dtype=np.float32)[digits.target]
    order = np.random.default_rng(0).permutation(len(images))
    return [(images[part], labels[part]) for part in (order[500:], order[:500])]


DIGITS, UNSEEN = load_images()


def blend(digits, number, seed):
    """``number`` blends of three digits each, the same for the same seed on every process."""
    images, labels = digits
    draw = np.random.default_rng(seed)
    chosen = draw.integers(0, len(images), (number, 3))
    shares = draw.dirichlet((1, 1, 1), number).astype(np.float32)
    return (
        np.einsum("bk,bkhwc->bhwc", shares, images[chosen]),
        np.einsum("bk,bkl->bl", shares, labels[chosen]),
    )


def draw_batch(arguments, number):
    """What step ``number`` trains on."""
    return blend(DIGITS, arguments.batch, (arguments.seed, number))


class VisionTransformer(nnx.Module):
    """Patches of 2 x 2 pixels, attention between them, and their mean."""

    def __init__(self, hidden, layers, heads, rngs):
        self.patches = nnx.Conv(1, hidden, (2, 2), strides=2, rngs=rngs)
        self.position = nnx.Param(0.02 * rngs.params.normal((16, hidden)))
        self.blocks = nnx.List([Block(hidden, heads, None, rngs) for _ in range(layers)])
        self.norm = nnx.RMSNorm(hidden, rngs=rngs)

    def __call__(self, images):
        """Shape (n, 8, 8, 1) to (n, hidden)."""
        x = self.patches(images).reshape(len(images), 16, -1) + self.position
        for block in self.blocks:
            x = block(x, None)
        return self.norm(x).mean(1)


class InBfloat16(nnx.Module):
    """Runs a module in bfloat16; its parameters stay in float32."""

    def __init__(self, module):
        self.module = module

    def __call__(self, x):
        """What the module makes of ``x``, in float32."""
        graphdef, params = nnx.split(self.module)
        params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
        return nnx.merge(graphdef, params)(x.astype(jnp.bfloat16)).astype(jnp.float32)


def make_model(arguments):
    rngs = nnx.Rngs(arguments.seed)
    if arguments.encoder == "vit":
        encoder = VisionTransformer(arguments.hidden, arguments.layers, arguments.heads, rngs)
    else:
        encoder = ldl.ConvolutionalEncoder(1, arguments.hidden, rngs=rngs)
    if arguments.bf16:
        encoder = InBfloat16(encoder)
    return ldl.RDA(None, 10, arguments.hidden, encoder=encoder, rngs=rngs)


def prediction_loss(logits, labels, weights):
    return ldl.kullback_leibler(jax.nn.softmax(logits), labels, weights)


def losses(model, images, labels, key):
    """RDA's two losses on one batch."""
    noise = ldl.draw_noise(key, len(images), model.hidden)
    return ldl.rda_losses(model, images, labels, noise, prediction_loss)


def make_step(graphdef, seed):
    """One training step, compiled; its state is updated in place."""

    @partial(jax.jit, donate_argnums=0)
    def step(state, batch):
        model, optimizer = nnx.merge(graphdef, state)
        key = jax.random.fold_in(jax.random.key(seed), optimizer.step[...])
        (prediction, alignment), pairs = gdmam.nnx.value_and_paired_grad(losses)(model, *batch, key)
        optimizer.update(model, pairs)
        cosine = gdmam.decompose(nnx.to_pure_dict(pairs)).geometry.cosine
        metrics = {"prediction": prediction, "alignment": alignment, "cosine": cosine}
        return nnx.state((model, optimizer)), metrics

    return step


def make_parser():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=300, help="steps of each method (300)")
    parser.add_argument("--batch", type=int, default=128, help="blends per step (128)")
    parser.add_argument("--encoder", choices=["convolutional", "vit"], default="convolutional")
    parser.add_argument("--hidden", type=int, default=64, help="width of all representations (64)")
    parser.add_argument("--layers", type=int, default=2, help="layers of the transformer (2)")
    parser.add_argument("--heads", type=int, default=4, help="heads of its attention (4)")
    parser.add_argument("--learning-rate", type=float, default=3e-3, help="initial rate (0.003)")
    training.add_flags(parser)
    return parser


def prepare(name, arguments):
    """A function that makes model and optimizer, their structure, and the training step."""
    rate = optax.cosine_decay_schedule(arguments.learning_rate, arguments.steps)

    def make():
        model = make_model(arguments)
        return model, nnx.Optimizer(model, training.METHODS[name](rate), wrt=nnx.Param)

    graphdef = nnx.graphdef(nnx.eval_shape(make))
    return lambda: nnx.state(make()), graphdef, make_step(graphdef, arguments.seed)


def evaluate(state, graphdef, images, labels):
    """Both losses, and the predicted distributions."""
    model, _ = nnx.merge(graphdef, state)
    return losses(model, images, labels, jax.random.key(0)), jax.nn.softmax(model(images))


def in_words(distribution):
    """The three largest shares: "60% 3, 30% 8, 10% 1"."""
    return ", ".join(f"{distribution[k]:.0%} {k}" for k in np.argsort(-distribution)[:3])


def main():
    arguments, mesh = training.start(make_parser())
    training.report(
        f"{len(DIGITS[0])} digits to blend, {len(UNSEEN[0])} others for the test, "
        f"{mesh.size} {jax.devices()[0].platform}"
    )
    test = blend(UNSEEN, 1024, 0)
    results, cosines, predicted = {}, {}, {"truth": test[1]}
    for name in arguments.methods:
        make_state, graphdef, step = prepare(name, arguments)
        state = training.create(make_state, mesh, arguments.fsdp)
        state, cosines[name] = training.fit(
            name, arguments, mesh, state, step, partial(draw_batch, arguments)
        )
        whole = NamedSharding(mesh, P())
        measured, predicted[name] = jax.jit(evaluate, static_argnums=1, out_shardings=whole)(
            state, graphdef, *test
        )
        results[name] = [float(loss) for loss in measured]
    training.conclude(results, cosines)
    training.report("The first three test images:")
    for name, distributions in predicted.items():
        shown = "; ".join(in_words(np.asarray(row)) for row in distributions[:3])
        training.report(f"  {name:16}  {shown}")


if __name__ == "__main__":
    main()
