"""Time to the first step, and size of the program, by number of leaves and losses."""

import itertools
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

import gdmam_jax as gdmam
from benchmarks.hlo import instructions
from benchmarks.timing import tracked
from benchmarks.update import BASELINE, OPTIMIZERS, RELEASED

OPTIMIZERS = OPTIMIZERS | {
    f"{name}(adamw)": lambda dtype, others=1, weighting=weighting: gdmam.weighed(
        optax.adamw(1e-3, mu_dtype=dtype), weighting, alignment_losses=others
    )
    for name, weighting in (("MGDA", gdmam.mgda_weighting), ("PCGrad", gdmam.pcgrad_weighting))
}


def benchmark(
    leaves: Sequence[int],
    shape: Sequence[int],
    losses: Sequence[int] = (2,),
    only: Sequence[str] = (),
) -> list[dict[str, Any]]:
    """Trace, compile and run one step of each optimizer, for every number of leaves and losses.

    Args:
      leaves: how many.
      shape: of each.
      losses: how many, the prediction's included. The released form is left out if there are
        more than two.
      only: the optimizers besides the baseline; all if none is given.

    Returns:
      One row for each; the ratio is of the seconds to the end of the first step. Compilation
      cannot be repeated in one process, so there is one measurement, and no spread.
    """
    names = [BASELINE, *(only or [name for name in OPTIMIZERS if name != BASELINE])]
    rows: list[dict[str, Any]] = []
    bases: dict[tuple[int, int], float] = {}
    cases = list(itertools.product(leaves, losses, names))
    for count, number, name in tracked("compiling", cases):
        if name == RELEASED and number > 2:
            continue
        # A new function and a cleared cache: everything is traced and compiled anew.
        jax.clear_caches()
        row = {"optimizer": name, "leaves": count, "losses": number} | _measure(
            OPTIMIZERS[name](None, number - 1), count, tuple(shape), number
        )
        base = bases.setdefault((count, number), row["first step s"])
        rows.append(row | {f"over {BASELINE}": row["first step s"] / base})
    return rows


def _measure(
    optimizer: optax.GradientTransformation, leaves: int, shape: tuple[int, ...], losses: int
) -> dict[str, float]:
    params = {f"layer_{number}": jnp.full(shape, 1.0 + number) for number in range(leaves)}
    gradients = [jax.tree.map(lambda leaf, k=k: jnp.cos(k * leaf), params) for k in range(losses)]
    first, *others = gradients
    pairs = gdmam.pair_gradients(first, others[0] if losses == 2 else tuple(others))
    state = jax.jit(optimizer.init)(params)

    def step(params: Any, state: Any, pairs: Any) -> Any:
        updates, state = optimizer.update(pairs, state, params)
        return optax.apply_updates(params, updates), state

    start = time.perf_counter()
    traced = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, pairs)
    lowered = time.perf_counter()
    compiled = traced.compile()
    done = time.perf_counter()
    jax.block_until_ready(compiled(params, state, pairs))
    first = time.perf_counter()
    return {
        "trace s": lowered - start,
        "compile s": done - lowered,
        "first step s": first - start,
        "instructions": float(instructions(compiled.as_text())),
    }
