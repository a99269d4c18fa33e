"""Two tasks, of which one often has no labels: how well the other is learned, by weighting.

The alignment task's labels are missing from three batches in four, and are NaN in one of ten.
*Hidden*, as one does without help: a missing loss is 0, and a step that is not finite is left out
whole. *Said*: ``present=`` says which losses there are, and ``not_finite="skip_loss"`` leaves out
only that loss.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import gdmam_jax as gdmam
from benchmarks import timing

WEIGHTINGS: dict[str, Any] = {
    name.removesuffix("_weighting"): getattr(gdmam, name)
    for name in dir(gdmam)
    if name.endswith("_weighting")
    and name not in ("constant_weighting", "running_weighting", "normalised_weighting")
} | {
    "pcd(0.3)": gdmam.pcd_weighting(tau=0.3),
    "running(mgda)": gdmam.running_weighting(gdmam.mgda_weighting),
    "normalised(upgrad)": gdmam.normalised_weighting(gdmam.upgrad_weighting),
    "gradient_norm": gdmam.gradient_norm_weighting(every=10),
}
"""By name, with the numbers they come with."""

FEATURES, HIDDEN, BATCH, TESTS = 10, 32, 32, 2000
RATE = 0.01


def benchmark(names: Sequence[str], steps: int, seeds: int) -> list[dict[str, Any]]:
    """Test losses of the prediction task: the median over seeds, the best and the worst.

    Args:
      names: of the weightings; all if there are none.
      steps: of each training.
      seeds: how many trainings of each kind.
    """
    rows = []
    for name in timing.tracked("weightings", names or sorted(WEIGHTINGS)):
        (hidden, lost), (said, fewer) = (
            trainings(WEIGHTINGS[name], way, steps, seeds) for way in (False, True)
        )
        rows.append(
            {
                "weighting": name,
                "hidden": timing.spread(hidden),
                "said": timing.spread(said),
                "said / hidden": timing.spread(said / hidden),
                "steps lost, hidden": int(np.median(lost)),
                "steps lost, said": int(np.median(fewer)),
            }
        )
    return rows


def trainings(weighting: Any, said: bool, steps: int, seeds: int) -> tuple[np.ndarray, np.ndarray]:
    """Of each seed: the prediction task's test loss at the end, and how many steps were lost."""
    optimizer = gdmam.weighed(
        optax.adam(optax.cosine_decay_schedule(RATE, steps)),
        weighting,
        not_finite="skip_loss" if said else "skip",
    )

    def run(seed: jax.Array) -> tuple[jax.Array, jax.Array]:
        task, start, order, test = jax.random.split(jax.random.key(seed), 4)
        directions = jax.random.normal(task, (2, FEATURES)) / jnp.sqrt(FEATURES)
        params = network(start)

        def losses(params: Any, x: jax.Array, y: jax.Array, missing: jax.Array) -> Any:
            # Each column by itself: the derivative of one loss must not meet the other's labels,
            # and that of a missing loss none at all, since 0 times NaN is NaN.
            y = y.at[:, 1].set(jnp.where(missing, 0, y[:, 1]))
            guesses = predict(params, x)
            first, second = (jnp.mean((guesses[:, k] - y[:, k]) ** 2) for k in range(2))
            return first, jnp.where(missing, 0, second)

        def step(carry: Any, key: jax.Array) -> tuple[Any, None]:
            params, state = carry
            draw, absent, broken = jax.random.split(key, 3)
            x, y = labelled(draw, directions, BATCH)
            y = y.at[:, 1].add(jnp.where(jax.random.bernoulli(broken, 0.1), jnp.nan, 0))
            missing = jax.random.bernoulli(absent, 0.75)
            values, pairs = gdmam.value_and_paired_grad(losses)(params, x, y, missing)
            present = {"present": (True, ~missing)} if said else {}
            updates, state = optimizer.update(pairs, state, params, value=values, **present)
            return (optax.apply_updates(params, updates), state), None

        keys = jax.random.split(order, steps)
        (params, state), _ = jax.lax.scan(step, (params, optimizer.init(params)), keys)
        x, y = labelled(test, directions, TESTS)
        error = jnp.mean((predict(params, x) - y)[:, 0] ** 2)
        return error, gdmam.diagnostics(state)["skipped"]

    return jax.tree.map(np.asarray, jax.jit(jax.vmap(run))(jnp.arange(seeds)))


def labelled(key: jax.Array, directions: jax.Array, rows: int) -> tuple[jax.Array, jax.Array]:
    """Features, and two labels of each row that have a part in common, in units ten times apart."""
    first, second = jax.random.split(key)
    x = jax.random.normal(first, (rows, FEATURES))
    common, own = jnp.sin(2 * x @ directions[0]), jnp.cos(2 * x @ directions[1])
    labels = jnp.stack([common, 10 * (common + own)], axis=1)
    return x, labels + 0.1 * jax.random.normal(second, labels.shape) * jnp.array([1, 10])


def network(key: jax.Array) -> list[jax.Array]:
    sizes = [(FEATURES, HIDDEN), (HIDDEN, HIDDEN), (HIDDEN, 2)]
    keys = jax.random.split(key, len(sizes))
    return [
        jax.random.normal(key, size) / jnp.sqrt(size[0])
        for key, size in zip(keys, sizes, strict=True)
    ]


def predict(params: list[jax.Array], x: jax.Array) -> jax.Array:
    for weights in params[:-1]:
        x = jnp.tanh(x @ weights)
    return x @ params[-1]
