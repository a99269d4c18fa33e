"""Draws what every weighting makes of two conflicting gradients: `python docs/draw_weightings.py`.

Writes docs/conflict.svg, the sum, PCGrad, ConFIG and GDMAM beside each other,
docs/conflict_narrow.svg, the same for narrow screens, and docs/weightings.svg, all weightings. The
arrows are steps downhill, against the gradients.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax

import gdmam_jax as gdmam

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).parent
BLUE, ORANGE, VIOLET, GREY = "#2f81f7", "#e0761b", "#9a5fe0", "#7d8590"
"""Colours that can be seen on white and on dark pages; the pictures have no background."""
STYLE = {
    "svg.hashsalt": "gdmam",  # the same file in every run
    "savefig.transparent": True,
    "figure.constrained_layout.h_pad": 0.08,
    "axes.edgecolor": GREY,
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.titlecolor"), GREY),
    **dict.fromkeys(("xtick.color", "ytick.color"), GREY),
}

CONFLICT = np.array([[0.79, -0.1], [-0.94, 2.21]])
"""The prediction step, and the alignment step: three times as long, and against it."""
METHODS = {
    "Sum": gdmam.summed(optax.sgd(1.0)),
    "PCGrad": gdmam.weighed(optax.sgd(1.0), gdmam.pcgrad_weighting),
    "ConFIG": gdmam.weighed(optax.sgd(1.0), gdmam.config_weighting),
    "GDMAM": optax.chain(gdmam.scale_by_gdmam(), optax.scale_by_learning_rate(1.0)),
}

STEPS = np.array([[2.0, -0.6], [-0.75, 1.0]])
"""The prediction step, and a shorter alignment step that conflicts with it."""
WEIGHTINGS = {
    "sum": gdmam.sum_weighting,
    "mean": gdmam.mean_weighting,
    "norm": gdmam.norm_weighting,
    "balanced = IMTL-G": gdmam.balanced_weighting,
    "unit": gdmam.unit_weighting,
    "PCGrad": gdmam.pcgrad_weighting,
    "MGDA": gdmam.mgda_weighting,
    "CAGrad, c = 0.5": gdmam.cagrad_weighting(c=0.5),
    "Nash-MTL": gdmam.nash_mtl_weighting,
    "Aligned-MTL": gdmam.aligned_mtl_weighting,
    "ConFIG": gdmam.config_weighting,
    "UPGrad": gdmam.upgrad_weighting,
    "DualProj": gdmam.dual_proj_weighting,
}


def cone(steps: np.ndarray) -> np.ndarray:
    """The corners of a piece of the dual cone that is larger than the picture."""
    edges = []
    for own, other in (steps, steps[::-1]):
        edge = np.array([-own[1], own[0]])
        edges.append(10 * edge * np.sign(edge @ other))
    return np.array([edges[0], [0.0, 0.0], edges[1]])


def draw_panel(axes: plt.Axes, steps: np.ndarray, taken: np.ndarray) -> None:
    """What each loss asks for, what is done, and in grey the directions that raise neither loss."""
    axes.fill(*cone(steps).T, color=GREY, alpha=0.22, linewidth=0)
    for vector, colour, width in zip(
        (*steps, taken), (BLUE, ORANGE, VIOLET), (1.6, 1.6, 2.6), strict=True
    ):
        arrow = {"arrowstyle": "-|>", "color": colour, "lw": width, "shrinkA": 0, "shrinkB": 0}
        axes.annotate("", vector, (0, 0), arrowprops=arrow)
    axes.set(aspect="equal", xticks=[], yticks=[])


def legend(target: plt.Figure | plt.Axes, names: tuple[str, ...], **where: object) -> None:
    """Names the three arrows and the cone."""
    handles = [
        plt.Line2D([], [], color=colour, lw=width)
        for colour, width in ((BLUE, 1.6), (ORANGE, 1.6), (VIOLET, 2.6))
    ]
    handles.append(plt.Rectangle((0, 0), 1, 1, color=GREY, alpha=0.22, linewidth=0))
    target.legend(handles, names, frameon=False, **where)


def step_taken(method: optax.GradientTransformation) -> np.ndarray:
    """A method's first step on the two gradients of `CONFLICT`, as long as 1."""
    pair = gdmam.GradientPair(*(jnp.asarray(-step, jnp.float32) for step in CONFLICT))
    params = jnp.zeros(2)
    update = np.asarray(jax.jit(method.update)(pair, method.init(params), params)[0])
    return update / np.linalg.norm(update)


def draw_conflict(path: Path, columns: int) -> None:
    """Four methods on two gradients, and below each how fast the losses fall."""
    rows = len(METHODS) // columns
    figure, axes = plt.subplots(
        2 * rows,
        columns,
        figsize=(2.15 * columns, 3.3 * rows + 0.3),
        height_ratios=(3.4, 1) * rows,
        layout="constrained",
    )
    panels = axes.reshape(rows, 2, columns).swapaxes(1, 2).reshape(-1, 2)
    units = CONFLICT / np.linalg.norm(CONFLICT, axis=1, keepdims=True)
    for (above, below), (name, method) in zip(panels, METHODS.items(), strict=True):
        taken = step_taken(method)
        draw_panel(above, CONFLICT, 1.3 * taken)
        above.set(xlim=(-1.3, 1.3), ylim=(-0.2, 2.3))
        above.spines[:].set_visible(False)
        above.set_title(name, fontsize=13)
        falls = units @ taken
        below.barh([1, 0], falls, color=(BLUE, ORANGE), height=0.6)
        below.axvline(0, color=GREY, linewidth=0.8)
        below.set(xlim=(-1.05, 1.05), ylim=(-0.5, 1.5), xticks=[], yticks=[])
        below.spines[:].set_visible(False)
        for height, fall in zip((1, 0), falls, strict=True):
            text = f"{'falls' if fall > 0 else 'RISES'} {abs(fall):.2f}"
            side = "right" if fall > 0 else "left"
            below.text(-np.sign(fall) * 0.07, height, text, ha=side, va="center", fontsize=9)
    names = ("what the prediction loss asks for", "the alignment loss", "the step taken")
    legend(
        figure, (*names, "raises neither"), loc="outside lower center", ncols=columns, fontsize=10
    )
    figure.savefig(path, metadata={"Date": None})


def draw_weightings(path: Path, columns: int) -> None:
    """One panel for each weighting, and the legend in what is left."""
    gramian = jnp.asarray(STEPS @ STEPS.T)
    norms = jnp.linalg.norm(jnp.asarray(STEPS), axis=1)
    rows = 15 // columns
    size = (2.2 * columns, 2.07 * rows)
    figure, axes = plt.subplots(rows, columns, figsize=size, layout="constrained")
    for panel, (name, weighting) in zip(axes.flat, WEIGHTINGS.items(), strict=False):
        draw_panel(panel, STEPS, np.asarray(jax.jit(weighting)(gramian, norms)) @ STEPS)
        panel.set(xlim=(-1.3, 2.3), ylim=(-1.1, 2.0))
        panel.set_title(name, fontsize=11)
    for panel in axes.flat[len(WEIGHTINGS) :]:
        panel.axis("off")
    names = ("prediction", "alignment", "weighted sum", "raises neither loss")
    legend(axes.flat[len(WEIGHTINGS)], names, loc="center left", fontsize=11)
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    """Draws all pictures."""
    with plt.rc_context(STYLE):
        draw_conflict(HERE / "conflict.svg", columns=4)
        draw_conflict(HERE / "conflict_narrow.svg", columns=2)
        draw_weightings(HERE / "weightings.svg", columns=5)
        draw_weightings(HERE / "weightings_narrow.svg", columns=3)


if __name__ == "__main__":
    main()
