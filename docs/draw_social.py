"""Draws the picture that a shared link shows, 1280 x 640: `python docs/draw_social.py`.

Writes docs/social.png: two conflicting gradients, and the steps of the sum and of GDMAM.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

import gdmam_jax as gdmam

STEPS = np.array([[0.79, -0.1], [-0.94, 2.21]])
"""What each loss asks for; the alignment loss asks for three times as much, and against."""
OPTIMIZERS = {
    "Sum: one loss rises": gdmam.summed(optax.sgd(1.0)),
    "GDMAM: both fall": optax.chain(gdmam.scale_by_gdmam(), optax.scale_by_learning_rate(1.0)),
}
COLOURS = ("#2f81f7", "#e0761b", "#9a5fe0")


def main() -> None:
    """Draws the words on the left and a panel for each optimizer on the right."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure = plt.figure(figsize=(12.8, 6.4), dpi=100, facecolor="white")
    figure.text(0.06, 0.66, "gdmam-jax", fontsize=46, weight="bold")
    words = "Train a JAX model\non a main loss and an\nauxiliary one that\nmay conflict with it"
    figure.text(0.06, 0.27, words, fontsize=24, color="0.3", linespacing=1.4)
    figure.text(0.06, 0.12, "optimizer = gdmam.gdmam(1e-3)", fontsize=17, family="monospace")
    for number, (title, optimizer) in enumerate(OPTIMIZERS.items()):
        pair = gdmam.GradientPair(*map(jnp.asarray, -STEPS))
        step, _ = jax.jit(optimizer.update)(pair, optimizer.init(jnp.zeros(2)), jnp.zeros(2))
        taken = np.asarray(step)
        panel = figure.add_axes((0.44 + 0.275 * number, 0.14, 0.27, 0.7))
        for vector, colour in zip((*STEPS, taken), COLOURS, strict=True):
            arrow = {"arrowstyle": "-|>", "color": colour, "lw": 5, "mutation_scale": 28}
            panel.annotate("", vector, (0, 0), arrowprops=arrow | {"shrinkA": 0, "shrinkB": 0})
        panel.set(xlim=(-1.1, 1.9), ylim=(-0.4, 2.4), aspect="equal")
        panel.set_axis_off()
        panel.set_title(title, fontsize=20)
    names = ("main loss", "auxiliary loss", "step taken")
    for left, name, colour in zip((0.48, 0.61, 0.79), names, COLOURS, strict=True):
        figure.text(left, 0.06, name, fontsize=17, color=colour, weight="bold")
    figure.savefig(Path(__file__).with_name("social.png"))


if __name__ == "__main__":
    main()
