r"""A small transformer learns to write like Python's manual, without becoming too sure of itself.

The prediction loss is that of the next character. The alignment loss is a penalty on
overconfidence: every predicted distribution should stay near the characters' frequencies. Once the
model knows more than the frequencies, the two losses pull in opposite directions. GDMAM is compared
with their sum, and with the prediction loss alone.

    python examples/language_model.py                     # one or two minutes on two cores
    python examples/language_model.py --width 1024 --layers 12 --context 1024 --batch 64 --bf16 \
        --fsdp --steps 20000 --learning-rate 1e-3 --checkpoints runs/large
    python examples/language_model.py --help

With several processes, run the same command in each: see docs/many_devices.md.
"""

import argparse
from functools import partial
from pydoc_data.topics import topics

import jax
import jax.numpy as jnp
import numpy as np
import optax
import training
from flax import nnx

import gdmam_jax as gdmam

VOCABULARY = 128  # ASCII


def load_text(names, without=None):
    """Chapters of the language reference, which comes with Python, as ASCII codes.

    Chapters repeat one another: paragraphs that the text ``without`` holds, too, are left out.
    """
    text = "\n\n".join(topics[name] for name in names).encode("ascii", "replace")
    if without is not None:
        known = set(without.tobytes().split(b"\n\n"))
        text = b"\n\n".join(part for part in text.split(b"\n\n") if part not in known)
    return np.frombuffer(text, np.uint8)


UNSEEN_TOPICS = sorted(topics)[::10]
TEXT = load_text(name for name in sorted(topics) if name not in UNSEEN_TOPICS)
UNSEEN = load_text(UNSEEN_TOPICS, without=TEXT)
FREQUENCIES = (np.bincount(TEXT, minlength=VOCABULARY) / len(TEXT)).astype(np.float32)


def draw_windows(text, length, number, seed):
    """``number`` pieces of ``text``, shape (number, length); the same for the same seed."""
    starts = np.random.default_rng(seed).integers(0, len(text) - length, number)
    return text[starts[:, None] + np.arange(length)].astype(np.int32)


class Block(nnx.Module):
    """Attention, then a perceptron, each added to its normalised input."""

    def __init__(self, width, heads, dtype, rngs):
        self.attention_norm = nnx.RMSNorm(width, dtype=dtype, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(heads, width, dtype=dtype, decode=False, rngs=rngs)
        self.norm = nnx.RMSNorm(width, dtype=dtype, rngs=rngs)
        self.up = nnx.Linear(width, 4 * width, dtype=dtype, rngs=rngs)
        self.down = nnx.Linear(4 * width, width, dtype=dtype, rngs=rngs)

    def __call__(self, x, mask=None):
        """Shape (n, length, width) to the same."""
        x = x + self.attention(self.attention_norm(x), mask=mask)
        return x + self.down(nnx.gelu(self.up(self.norm(x))))


class Transformer(nnx.Module):
    """Characters to logits of the next ones; one table serves for input and output."""

    def __init__(self, width, layers, heads, context, dtype, rngs):
        init = nnx.initializers.normal(0.02)
        self.table = nnx.Embed(VOCABULARY, width, embedding_init=init, dtype=dtype, rngs=rngs)
        self.position = nnx.Embed(context, width, embedding_init=init, dtype=dtype, rngs=rngs)
        self.blocks = nnx.List([Block(width, heads, dtype, rngs) for _ in range(layers)])
        self.norm = nnx.RMSNorm(width, dtype=dtype, rngs=rngs)

    def __call__(self, characters):
        """Shape (n, length) to logits of shape (n, length, 128)."""
        x = self.table(characters) + self.position(jnp.arange(characters.shape[1]))
        mask = nnx.make_causal_mask(characters)
        for block in self.blocks:
            x = block(x, mask)
        return self.table.attend(self.norm(x))


def draw_batch(arguments, number):
    """What step ``number`` trains on."""
    return draw_windows(TEXT, arguments.context + 1, arguments.batch, (arguments.seed, number))


def losses(params, graphdef, windows):
    """How surprising the next character is, and how far predictions are from the frequencies."""
    logits = nnx.merge(graphdef, params)(windows[:, :-1]).astype(jnp.float32)
    prediction = optax.softmax_cross_entropy_with_integer_labels(logits, windows[:, 1:])
    alignment = optax.losses.kl_divergence(jax.nn.log_softmax(logits), FREQUENCIES)
    return jnp.mean(prediction), jnp.mean(alignment)


def make_step(optimizer, graphdef):
    """One training step, compiled; its state is updated in place."""

    @partial(jax.jit, donate_argnums=0)
    def step(state, windows):
        params, opt_state = state
        (prediction, alignment), pairs = gdmam.value_and_paired_grad(losses)(
            params, graphdef, windows
        )
        updates, opt_state = optimizer.update(pairs, opt_state, params)
        cosine = gdmam.decompose(pairs).geometry.cosine
        metrics = {"prediction": prediction, "alignment": alignment, "cosine": cosine}
        return (optax.apply_updates(params, updates), opt_state), metrics

    return step


def prepare(name, arguments):
    """A function that makes the first state, the model's structure, and the training step."""

    def make_model():
        return Transformer(
            arguments.width,
            arguments.layers,
            arguments.heads,
            arguments.context,
            jnp.bfloat16 if arguments.bf16 else jnp.float32,
            nnx.Rngs(arguments.seed),
        )

    rate = optax.warmup_cosine_decay_schedule(
        0, arguments.learning_rate, max(1, arguments.steps // 10), arguments.steps
    )
    optimizer = training.METHODS[name](rate)
    graphdef = nnx.graphdef(nnx.eval_shape(make_model))

    def make_state():
        params = nnx.state(make_model(), nnx.Param)
        return params, optimizer.init(params)

    return make_state, graphdef, make_step(optimizer, graphdef)


def make_parser():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=300, help="steps of each method (300)")
    parser.add_argument("--batch", type=int, default=32, help="pieces of text per step (32)")
    parser.add_argument("--context", type=int, default=32, help="characters per piece (32)")
    parser.add_argument("--width", type=int, default=64, help="width of the representation (64)")
    parser.add_argument("--layers", type=int, default=2, help="layers of the transformer (2)")
    parser.add_argument("--heads", type=int, default=4, help="heads of the attention (4)")
    parser.add_argument("--learning-rate", type=float, default=1e-2, help="peak rate (0.01)")
    training.add_flags(parser)
    return parser


def main():
    arguments, mesh = training.start(make_parser())
    training.report(f"{len(TEXT):,} characters of text, {mesh.size} {jax.devices()[0].platform}")
    test = draw_windows(UNSEEN, arguments.context + 1, 8 * arguments.batch, arguments.seed)
    results, cosines = {}, {}
    for name in arguments.methods:
        make_state, graphdef, step = prepare(name, arguments)
        state = training.create(make_state, mesh, arguments.fsdp)
        (params, _), cosines[name] = training.fit(
            name, arguments, mesh, state, step, partial(draw_batch, arguments)
        )
        measured = jax.jit(losses, static_argnums=1)(
            params, graphdef, training.split_batch(test, mesh)
        )
        results[name] = [float(loss) for loss in measured]
    training.conclude(results, cosines)


if __name__ == "__main__":
    main()
