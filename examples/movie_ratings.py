"""How will a film's votes spread over the ten grades? GDMAM and the summed loss on real data.

The votes (1 to 10) for 15,713 films are predicted from year, length, budget, certificate and
genres. The training set is imbalanced: hardly anybody gave most of its films a 1, and many gave
them an 8. The model, RDA, has two losses: how wrong the predicted distribution is (prediction), and
how differently features and labels are represented (alignment).

    python examples/movie_ratings.py            # half a minute on two cores; also on GPU and TPU
    python examples/movie_ratings.py --help
"""

import argparse
import dataclasses
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib
import matplotlib.ticker
import numpy as np
import optax
from flax import nnx
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import gdmam_jax as gdmam
from gdmam_jax import ldl

matplotlib.use("Agg")
import matplotlib.pyplot as plt

BATCH = 50
WEIGHT_DECAY = 1e-4


def summed_adamw(learning_rate):
    """The baseline: AdamW (AMSGrad) on the sum of both losses."""
    return gdmam.summed(
        optax.chain(
            optax.scale_by_amsgrad(),
            optax.add_decayed_weights(WEIGHT_DECAY),
            optax.scale_by_learning_rate(learning_rate),
        )
    )


def default_gdmam(learning_rate):
    """GDMAM with its default choices, and the baseline's AMSGrad and weight decay."""
    return gdmam.gdmam(learning_rate, amsgrad=True, weight_decay=WEIGHT_DECAY)


def open_gdmam(learning_rate):
    """GDMAM that leaves both gradients their lengths: PCGrad's weights, open gate."""
    return gdmam.gdmam(
        learning_rate,
        weighting=gdmam.pcgrad_weighting,
        gate=gdmam.open_gate,
        amsgrad=True,
        weight_decay=WEIGHT_DECAY,
    )


BASELINE = "summed loss"
METHODS = {BASELINE: summed_adamw, "GDMAM, PCGrad weights": open_gdmam, "GDMAM": default_gdmam}


def load_data():
    """One fold of the films: an imbalanced training set, 20 validation films, an untouched test."""
    films = dataclasses.replace(
        ldl.films(), sampler=ldl.Thresholds(scarce_limit=0.2, plenty_limit=2.4, scarce=0, plenty=7)
    )
    folds = ldl.make_folds(films)
    parts = {
        "train": folds.train[0][folds.train_mask[0]],
        "validation": folds.validation[0],
        "test": folds.test[0][folds.test_mask[0]],
    }
    return {
        name: (jnp.asarray(folds.features[rows]), jnp.asarray(folds.labels[rows]))
        for name, rows in parts.items()
    }


def make_epoch(name, graphdef, data):
    """One epoch as one compiled program: batches, both gradients, updates, test measures."""
    x, y = data["train"]
    prediction_loss = partial(
        ldl.distribution_balanced, frequency=ldl.class_frequency(y), num_samples=len(y)
    )

    def losses(params, batch, key):
        model = nnx.merge(graphdef, params)
        noise = ldl.draw_noise(key, BATCH, model.hidden)
        return ldl.rda_losses(
            model,
            x[batch],
            y[batch],
            noise,
            lambda logits, target, weights: prediction_loss(logits, target, weights=weights),
        )

    def step(learning_rate, carry, batch_and_key):
        params, opt_state = carry
        _, pairs = gdmam.value_and_paired_grad(losses)(params, *batch_and_key)
        updates, opt_state = METHODS[name](learning_rate).update(pairs, opt_state, params)
        report = gdmam.diagnostics(opt_state) if name != BASELINE else {}
        return (optax.apply_updates(params, updates), opt_state), report

    def measures(params, part):
        features, labels = data[part]
        return ldl.measure(jax.nn.softmax(nnx.merge(graphdef, params)(features)), labels)

    @partial(jax.jit, donate_argnums=(0, 1))
    def epoch(params, opt_state, key, learning_rate):
        order_key, noise_key = jax.random.split(key)
        # A new order each epoch; the few films that fill no batch sit this epoch out.
        steps = len(y) // BATCH
        order = jax.random.permutation(order_key, len(y))[: steps * BATCH].reshape(steps, BATCH)
        keys = jax.random.split(noise_key, steps)
        (params, opt_state), report = jax.lax.scan(
            partial(step, learning_rate), (params, opt_state), (order, keys)
        )
        return params, opt_state, report, measures(params, "validation"), measures(params, "test")

    return epoch


def train(name, model, epoch, learning_rate, epochs, seed, advance):
    """Trains one model; the same seed gives the same first parameters, batches and noise."""
    # Copied, since the compiled epoch takes over its arguments' memory.
    params = jax.tree.map(jnp.copy, nnx.state(model))
    opt_state = METHODS[name](learning_rate).init(params)
    reports, validations, tests = [], [], []
    for key in jax.random.split(jax.random.key(seed), epochs):
        params, opt_state, report, validation, test = epoch(params, opt_state, key, learning_rate)
        reports.append(report)
        validations.append(validation)
        tests.append(test)
        advance()

    def stack(trees):
        return jax.tree.map(lambda *values: np.stack(values), *trees)

    return {
        "learning rate": learning_rate,
        "report": jax.tree.map(np.concatenate, stack(reports)),
        "validation": stack(validations),
        "test": stack(tests),
    }


def finite(values):
    """Divergences, infinite where training diverged: NaN would look like the lowest."""
    return np.nan_to_num(values, nan=np.inf)


def best_epoch(run):
    """The epoch with the lowest divergence on the validation films."""
    return int(np.argmin(finite(run["validation"]["kld"])))


def print_table(console, runs):
    """The six measures on the test films, at the epoch chosen on the validation films."""
    table = Table("", title="Test films, parameters of the best validation epoch")
    for name in runs:
        table.add_column(name, justify="right")
    for measure, label in MEASURES.items():
        values = [run["test"][measure][best_epoch(run)] for run in runs.values()]
        best = np.fmax.reduce(values) if label.endswith("↑") else np.fmin.reduce(values)
        cells = [f"[bold]{value:.4f}[/]" if value == best else f"{value:.4f}" for value in values]
        table.add_row(label, *cells)
    table.add_section()
    table.add_row("best epoch", *[str(best_epoch(run) + 1) for run in runs.values()])
    table.add_row("learning rate", *[f"{run['learning rate']:g}" for run in runs.values()])
    console.print(table)


MEASURES = {
    "chebyshev": "Chebyshev ↓",
    "clark": "Clark ↓",
    "canberra": "Canberra ↓",
    "kld": "KLD ↓",
    "cosine": "cosine ↑",
    "intersection": "intersection ↑",
}


def conclusion(runs):
    """Who won, in plain words."""
    final = {name: float(run["test"]["kld"][best_epoch(run)]) for name, run in runs.items()}
    diverged = [name for name, kld in final.items() if not np.isfinite(kld)]
    lines = [f"{name} diverged with every learning rate." for name in diverged]
    best = min(final, key=lambda name: finite(final[name]))
    if best not in diverged:
        lines.append(f"Lowest test divergence (KLD): {best}, {final[best]:.4f}.")
    baseline = final[BASELINE]
    for name, run in runs.items():
        if name == BASELINE or {name, BASELINE} & set(diverged):
            continue
        change = 100 * (final[name] / baseline - 1)
        verdict = "better" if change < -1 else "worse" if change > 1 else "about equal"
        conflicts = 100 * np.mean(run["report"]["cosine"] < 0)
        lines.append(
            f"{name}: {change:+.1f}% against the summed loss ({verdict}); "
            f"the gradients conflicted in {conflicts:.0f}% of its steps."
        )
    lines.append("One data set, one fold, one seed: see docs/ldl_results.md for more.")
    return "\n".join(lines)


def draw(runs, path):
    """Test divergence over epochs, and what GDMAM did at each step."""
    figure, axes = plt.subplots(2, 2, figsize=(11, 7), layout="constrained")
    for (name, run), color in zip(runs.items(), ("C7", "C1", "C0"), strict=False):
        axes[0, 0].plot(run["test"]["kld"], color, label=name)
        at = best_epoch(run)
        axes[0, 0].plot(at, run["test"]["kld"][at], "o", color=color)
    axes[0, 0].set(title="Test KLD (dot: best validation epoch)", xlabel="epoch", yscale="log")
    axes[0, 0].yaxis.set_minor_formatter(matplotlib.ticker.FormatStrFormatter("%.2f"))

    name = list(runs)[-1]
    report = runs[name]["report"]
    window = max(1, len(report["cosine"]) // 100)

    def plot(axis, key, **style):
        smooth = np.convolve(report[key], np.ones(window) / window, "valid")
        return axis.plot(np.arange(len(smooth)) + window / 2, smooth, **style)[0]

    gate_axis = axes[0, 1].twinx()
    lines = [
        plot(axes[0, 1], "cosine", label="cosine (left)"),
        plot(gate_axis, "gate", label="gate of the parallel part (right)", color="C1", alpha=0.6),
    ]
    axes[0, 1].set(title=f"Angle of the two gradients: {name}", xlabel="step")
    axes[0, 1].axhline(0, color="grey", linewidth=0.5)
    gate_axis.set_ylim(-0.05, 1.4)
    for task in ("prediction", "alignment"):
        plot(axes[1, 0], f"{task}_weight", label=task)
    axes[1, 0].set(title=f"Task weights: {name}", xlabel="step", yscale="log")
    for part in ("prediction", "alignment"):
        plot(axes[1, 1], f"{part}_norm", label=part)
    axes[1, 1].set(title=f"Norms of the gradients: {name}", xlabel="step", yscale="log")
    for axis in axes.flat:
        axis.spines["top"].set_visible(False)
    below = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.15), "ncols": 3}
    axes[0, 0].legend(frameon=False, **below)  # the curves are everywhere else
    axes[0, 1].legend(handles=lines, frameon=False, **below)
    for axis in axes[1]:
        axis.legend(frameon=False)
    figure.savefig(path, dpi=120)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--epochs", type=int, default=300, help="epochs per training (300)")
    parser.add_argument("--seed", type=int, default=0, help="of parameters, batches and noise (0)")
    parser.add_argument(
        "--learning-rates",
        type=float,
        nargs="+",
        default=[1e-4, 3e-4, 1e-3, 3e-3],
        help="tried for every method; the best on the validation films is kept",
    )
    parser.add_argument(
        "--picture", type=Path, default=Path("movie_ratings.png"), help="where to draw the results"
    )
    arguments = parser.parse_args()
    if arguments.epochs < 1:
        parser.error("--epochs must be at least 1")
    arguments.picture.parent.mkdir(parents=True, exist_ok=True)

    console = Console()
    data = load_data()
    sizes = ", ".join(f"{len(labels)} {name}" for name, (_, labels) in data.items())
    frequency = data["train"][1].sum(0)
    console.print(
        f"Films: {sizes}. The most and the least frequent grade in training differ "
        f"{float(frequency.max() / frequency.min()):.0f}-fold. Device: {jax.devices()[0].platform}."
    )
    features, labels = data["train"]
    model = ldl.RDA(features.shape[1], labels.shape[1], rngs=nnx.Rngs(arguments.seed))
    runs = {}
    with Progress(console=console) as progress:
        for name in METHODS:
            total = arguments.epochs * len(arguments.learning_rates)
            advance = partial(progress.advance, progress.add_task(name, total=total))
            epoch = make_epoch(name, nnx.graphdef(model), data)
            tried = [
                train(name, model, epoch, rate, arguments.epochs, arguments.seed, advance)
                for rate in arguments.learning_rates
            ]
            runs[name] = min(tried, key=lambda run: finite(run["validation"]["kld"]).min())
    print_table(console, runs)
    console.print(conclusion(runs))
    draw(runs, arguments.picture)
    console.print(f"Picture: {arguments.picture}")


if __name__ == "__main__":
    main()
