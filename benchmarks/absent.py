"""Two tasks of which one is often without labels: what is left of the other, by weighting.

The alignment task's labels are missing from three batches in four, and not numbers in one of ten.
*Hidden*: as one does without help, a missing loss is 0, and a step that is not finite is left out
whole. *Said*: ``present=`` says which losses there are, and ``not_finite="skip_loss"`` leaves out
the loss alone.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import gdmam_jax as gdmam

WEIGHTINGS: dict[str, Any] = {
    name.removesuffix("_weighting"): getattr(gdmam, name)
    for name in dir(gdmam)
    if name.endswith("_weighting")
    and name not in ("constant_weighting", "running_weighting", "normalised_weighting")
} | {
    "running(mgda)": gdmam.running_weighting(gdmam.mgda_weighting),
    "normalised(upgrad)": gdmam.normalised_weighting(gdmam.upgrad_weighting),
    "gradient_norm": gdmam.gradient_norm_weighting(every=10),
}
FEATURES, HIDDEN, ROWS, BATCH = 10, 32, 256, 32
RATE = 0.01


def benchmark(names: Sequence[str], steps: int, seeds: int) -> list[dict[str, Any]]:
    """Test losses of the prediction task: the median over seeds, the best and the worst.

    Args:
      names: of the weightings; all where there are none.
      steps: of each training.
      seeds: how many trainings of each kind.
    """
    rows = []
    for name in names or sorted(WEIGHTINGS):
        row: dict[str, Any] = {"weighting": name}
        for what, said in (("hidden", False), ("said", True)):
            found, lost = trainings(WEIGHTINGS[name], said, steps, seeds)
            low, middle, high = (f"{q:.3f}" for q in np.quantile(found, (0, 0.5, 1)))
            row |= {what: f"{middle} ({low} to {high})"}
            row |= {f"steps lost, {what}": int(np.median(lost))}
        rows.append(row)
    return rows


def trainings(weighting: Any, said: bool, steps: int, seeds: int) -> tuple[np.ndarray, np.ndarray]:
    """Of each seed: the prediction task's test loss at the end, and how many steps were lost."""
    optimizer = gdmam.weighed(
        optax.adam(optax.cosine_decay_schedule(RATE, steps)),
        weighting,
        not_finite="skip_loss" if said else "skip",
    )

    def run(seed: jax.Array) -> tuple[jax.Array, jax.Array]:
        data, start, order = jax.random.split(jax.random.key(seed), 3)
        x, y = labelled(data)
        params = network(start)

        def losses(params: Any, rows: jax.Array, labels: jax.Array, missing: jax.Array) -> Any:
            error = jnp.mean((predict(params, rows) - labels) ** 2, axis=0)
            return error[0], jnp.where(missing, 0, error[1])

        def step(carry: Any, key: jax.Array) -> tuple[Any, None]:
            params, state = carry
            pick, absent, broken = jax.random.split(key, 3)
            missing = jax.random.bernoulli(absent, 0.75)
            chosen = jax.random.choice(pick, ROWS, (BATCH,), replace=False)
            nothing = jnp.where(jax.random.bernoulli(broken, 0.1), jnp.nan, 0)
            labels = y[chosen].at[:, 1].add(nothing)
            values, pairs = gdmam.value_and_paired_grad(losses)(params, x[chosen], labels, missing)
            present = {"present": (True, ~missing)} if said else {}
            updates, state = optimizer.update(pairs, state, params, value=values, **present)
            return (optax.apply_updates(params, updates), state), None

        keys = jax.random.split(order, steps)
        (params, state), _ = jax.lax.scan(step, (params, optimizer.init(params)), keys)
        x_test, y_test = x[ROWS:], y[ROWS:]
        test = jnp.mean((predict(params, x_test) - y_test)[:, 0] ** 2)
        return test, gdmam.diagnostics(state)["skipped"]

    return jax.tree.map(np.asarray, jax.jit(jax.vmap(run))(jnp.arange(seeds)))


def labelled(key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Rows for training and 1,000 for the test, and two labels of each that have a part in common.

    The labels' units differ by ten.
    """
    keys = jax.random.split(key, 3)
    x = jax.random.normal(keys[0], (ROWS + 1000, FEATURES))
    common, own = jax.random.normal(keys[1], (2, FEATURES)) / jnp.sqrt(FEATURES)
    first = jnp.sin(2 * x @ common)
    second = 10 * (jnp.sin(2 * x @ common) + jnp.cos(2 * x @ own))
    labels = jnp.stack([first, second], axis=1)
    return x, labels + 0.1 * jax.random.normal(keys[2], labels.shape) * jnp.array([1, 10])


def network(key: jax.Array) -> list[jax.Array]:
    sizes = (FEATURES, HIDDEN, HIDDEN, 2)
    keys = jax.random.split(key, 3)
    return [
        jax.random.normal(key, size) / jnp.sqrt(size[0])
        for key, size in zip(keys, zip(sizes, sizes[1:], strict=False), strict=True)
    ]


def predict(params: list[jax.Array], x: jax.Array) -> jax.Array:
    for weights in params[:-1]:
        x = jnp.tanh(x @ weights)
    return x @ params[-1]
