"""Draws what every weighting makes of two conflicting gradients: `python docs/draw_weightings.py`.

Writes docs/weightings.png.
"""

from pathlib import Path

import jax.numpy as jnp
import numpy as np

import gdmam_jax as gdmam

GRADIENTS = np.array([[2.0, -0.6], [-0.75, 1.0]])
"""The prediction gradient, and a shorter alignment gradient that conflicts with it."""

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
COLOURS = ("tab:blue", "tab:orange", "black")
NAMES = ("prediction gradient", "alignment gradient", "weighted sum")
LIMITS = ((-1.3, 2.3), (-1.1, 2.0))


def cone() -> np.ndarray:
    """The corners of a piece of the dual cone that is larger than the picture."""
    edges = []
    for own, other in (GRADIENTS, GRADIENTS[::-1]):
        edge = np.array([-own[1], own[0]])
        edges.append(10 * edge * np.sign(edge @ other))
    return np.array([edges[0], [0.0, 0.0], edges[1]])


def main() -> None:
    """Draws one panel for each weighting, and the legend in what is left."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    gramian = jnp.asarray(GRADIENTS @ GRADIENTS.T)
    norms = jnp.linalg.norm(jnp.asarray(GRADIENTS), axis=1)
    figure, axes = plt.subplots(3, 5, figsize=(11, 6.2), layout="constrained")
    for panel, (name, weighting) in zip(axes.flat, WEIGHTINGS.items(), strict=False):
        direction = np.asarray(weighting(gramian, norms)) @ GRADIENTS
        panel.fill(*cone().T, color="0.9", linewidth=0)
        for vector, colour in zip((*GRADIENTS, direction), COLOURS, strict=True):
            panel.annotate(
                "",
                vector,
                (0, 0),
                arrowprops={"arrowstyle": "-|>", "color": colour, "shrinkA": 0, "shrinkB": 0},
            )
        panel.set(xlim=LIMITS[0], ylim=LIMITS[1], aspect="equal", xticks=[], yticks=[])
        panel.set_title(name, fontsize=10)
    for panel in axes.flat[len(WEIGHTINGS) :]:
        panel.axis("off")
    handles = [
        *(
            plt.Line2D([], [], color=colour, label=name)
            for colour, name in zip(COLOURS, NAMES, strict=True)
        ),
        plt.Rectangle((0, 0), 1, 1, color="0.9", label="against neither loss"),
    ]
    axes.flat[len(WEIGHTINGS)].legend(handles=handles, loc="center left", frameon=False)
    figure.savefig(Path(__file__).with_name("weightings.png"), dpi=110)


if __name__ == "__main__":
    main()
