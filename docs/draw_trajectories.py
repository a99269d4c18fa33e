"""Draws trainings of two parameters on two losses: `python docs/draw_trajectories.py`.

Writes docs/trajectories.png, docs/trajectories_narrow.png for narrow screens, and prints a table of
where the trainings end. The alignment loss is a hundred times as large as the prediction loss in
each of three landscapes.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from draw_weightings import BLUE, GREY, ORANGE, STYLE, VIOLET

import gdmam_jax as gdmam

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).parent
STEPS, RATE, SCALE = 600, 0.03, 100.0
STARTS = jnp.array([[-2.0, 1.0], [-1.5, -1.2], [0.3, 1.8], [1.6, 1.2], [-0.4, -1.6]])


def valley(centre, turn, flatness):
    """A parabola around a centre, as flat along one axis as ``flatness`` says, turned."""
    cos, sin = np.cos(turn), np.sin(turn)
    axes = jnp.array([[cos, sin], [-sin, cos]])
    return lambda w: 0.5 * jnp.sum(jnp.array([1, flatness]) * (axes @ (w - jnp.array(centre))) ** 2)


def bent(w):
    """A valley along a parabola."""
    return 0.02 * (w[0] - 1) ** 2 + (w[1] - 0.4 * (w[0] ** 2 - 1)) ** 2


def straight(w):
    """A straight valley with the minimum of `bent`, which it meets a second time."""
    return 0.02 * (w[0] - 1) ** 2 + (w[1] + 0.6 * (w[0] - 1)) ** 2


LANDSCAPES = {
    "One minimum": (valley((1, 0), 0.5, 0.02), valley((1, 0), -0.5, 0.02)),
    "Behind a bend": (bent, straight),
    "Minima apart": (valley((1, 0.6), 0.5, 0.1), valley((-0.8, -0.6), -0.3, 0.1)),
}
"""The prediction loss and, not yet scaled, the alignment loss."""
REACHED = 5e-4
"""A loss this small is a minimum reached. No training ends within a factor of 20 of it."""
MINIMA = {
    "One minimum": ((1, 0), (1, 0)),
    "Behind a bend": ((1, 0), (1, 0)),
    "Minima apart": ((1, 0.6), (-0.8, -0.6)),
}


def methods():
    """The optimizers: one learning rate, which falls along half a cosine, no weight decay."""
    rate = optax.cosine_decay_schedule(RATE, STEPS)
    return {
        "Sum (Adam)": gdmam.summed(optax.adam(rate)),
        "PCGrad (Adam)": gdmam.weighed(optax.adam(rate), gdmam.pcgrad_weighting),
        "ConFIG (Adam)": gdmam.weighed(optax.adam(rate), gdmam.config_weighting),
        "GDMAM": gdmam.gdmam(rate, weight_decay=0.0),
        "GDMAM, conflict gate": gdmam.gdmam(rate, weight_decay=0.0, gate=gdmam.conflict_gate),
    }


def train(losses, optimizer):
    """All trainings of a method: the parameters at every step, shape (starts, steps + 1, 2)."""

    def scaled(w):
        prediction, alignment = (loss(w) for loss in losses)
        return prediction, SCALE * alignment

    def step(carry, _):
        w, state = carry
        _, pairs = gdmam.value_and_paired_grad(scaled)(w)
        updates, state = optimizer.update(pairs, state, w)
        w = optax.apply_updates(w, updates)
        return (w, state), w

    def run(w):
        return jax.lax.scan(step, (w, optimizer.init(w)), length=STEPS)[1]

    return np.concatenate([STARTS[:, None], jax.jit(jax.vmap(run))(STARTS)], axis=1)


def draw_landscape(panel, title):
    """The contours and minima of both losses."""
    x, y = np.linspace(-2.5, 2.5, 101), np.linspace(-2.4, 2.3, 95)
    grid = jnp.asarray(np.stack(np.meshgrid(x, y), axis=-1))
    for loss, minimum, colour in zip(LANDSCAPES[title], MINIMA[title], (BLUE, ORANGE), strict=True):
        height = np.asarray(jax.vmap(jax.vmap(loss))(grid))
        levels = height.max() * np.array([0.003, 0.03, 0.12, 0.35])
        panel.contour(x, y, height, levels, colors=colour, linewidths=0.7, alpha=0.8)
        panel.plot(*minimum, "*", color=colour, markersize=10, zorder=5)
    panel.set(aspect="equal", xticks=[], yticks=[], xlim=(x[0], x[-1]), ylim=(y[0], y[-1]))


def ends(title, paths):
    """How many trainings end at the common minimum, or both losses where there is none."""
    values = [np.array([float(loss(w)) for w in paths[:, -1]]) for loss in LANDSCAPES[title]]
    if title == "Minima apart":
        return " / ".join(f"{np.median(value):.2g}" for value in values)
    return f"{np.sum(np.maximum(*values) < REACHED)} of {len(STARTS)}"


def draw(paths, path, transposed):
    """A panel for each landscape and method; ``transposed`` for narrow screens."""
    shape = (len(LANDSCAPES), len(methods()))
    size = (6.6, 11.2) if transposed else (11.5, 7)
    figure, axes = plt.subplots(
        *(shape[::-1] if transposed else shape), figsize=size, layout="constrained", squeeze=False
    )
    panels = axes.T if transposed else axes
    for row, title in zip(panels, LANDSCAPES, strict=True):
        for panel, name in zip(row, methods(), strict=True):
            draw_landscape(panel, title)
            panel.plot(*paths[title, name].T, color=VIOLET, linewidth=2)
            panel.plot(*STARTS.T, "o", color=GREY, markersize=4)
            panel.plot(*paths[title, name][:, -1].T, "o", color=VIOLET, markersize=7)
    above, left = (LANDSCAPES, methods()) if transposed else (methods(), LANDSCAPES)
    for panel, name in zip(axes[0], above, strict=True):
        panel.set_title(name, fontsize=11)
    for panel, name in zip(axes[:, 0], left, strict=True):
        panel.set_ylabel(name, fontsize=11)
    handles = [
        plt.Line2D([], [], color=colour, marker=marker)
        for colour, marker in ((BLUE, "*"), (ORANGE, "*"), (VIOLET, "o"), (GREY, "o"))
    ]
    handles[-1].set_linestyle("none")
    labels = ("prediction loss", "alignment loss, times 100", "training and end", "start")
    columns = 2 if transposed else 4
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False)
    figure.savefig(path, dpi=90, pil_kwargs={"optimize": True})


def main() -> None:
    """Trains, draws and prints."""
    print(f"| | {' | '.join(methods())} |")
    paths = {}
    for title, losses in LANDSCAPES.items():
        for name, optimizer in methods().items():
            paths[title, name] = train(losses, optimizer)
        print(f"| {title} | {' | '.join(ends(title, paths[title, name]) for name in methods())} |")
    with plt.rc_context(STYLE):
        draw(paths, HERE / "trajectories.png", transposed=False)
        draw(paths, HERE / "trajectories_narrow.png", transposed=True)


if __name__ == "__main__":
    main()
