"""The cost of an optimizer step alone, gradients given."""

import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

import gdmam_jax as gdmam
from benchmarks.hlo import bytes_moved
from benchmarks.timing import Case, measure_in_turn, ratio

BASELINE = "summed(adamw)"

OPTIMIZERS = {
    BASELINE: lambda dtype: gdmam.summed(optax.adamw(1e-3, mu_dtype=dtype)),
    "gdmam": lambda dtype: gdmam.gdmam(1e-3, momentum_dtype=dtype),
    "scale_by_gdmam": lambda dtype: optax.chain(
        gdmam.scale_by_gdmam(momentum_dtype=dtype), optax.scale_by_learning_rate(1e-3)
    ),
    "gdmam_released": lambda dtype: gdmam.gdmam_released(1e-3),
}
"""Functions of the momentum's dtype."""


def benchmark(
    parameters: int,
    leaves: Sequence[int],
    dtype: str,
    momentum_dtype: str | None,
    rounds: int,
    only: Sequence[str] = (),
    steps: int = 1,
) -> list[dict[str, Any]]:
    """GDMAM's forms beside `summed(optax.adamw)` and beside a copy of as many bytes.

    Args:
        parameters: how many, in all.
        leaves: into how many leaves of equal size to cut them; each number is a set of cases.
        dtype: of parameters and gradients.
        momentum_dtype: of GDMAM's momenta and of AdamW's first moment; None: as the parameters.
        rounds: how often each case runs.
        only: the optimizers beside the baseline; none given, all.
        steps: in one call. A call hands every array over, which with thousands of them takes as
            long as their update; several steps, in `jax.lax.scan`, share that.

    Returns:
        One row for each case; milliseconds are of one step.
    """
    names = [BASELINE, *(only or [name for name in OPTIMIZERS if name != BASELINE])]
    cases: dict[tuple[int, str], Case] = {}
    copies: dict[tuple[int, str], Case] = {}
    moved, needed, sizes = {}, {}, {}
    for count in leaves:
        pairs = jax.tree.map(
            gdmam.GradientPair,
            _random(1, parameters, count, dtype),
            _random(2, parameters, count, dtype),
        )
        sizes[count] = sum(leaf.size for leaf in jax.tree.leaves(pairs)) // 2
        for name in names:
            key = (count, name)
            cases[key], moved[key], needed[key] = _case(
                name, pairs, count, dtype, momentum_dtype, steps
            )
            copies[key] = _copy(needed[key], steps)
    measure_in_turn([case for key in cases for case in (cases[key], copies[key])], rounds)
    rows = []
    for (count, name), case in cases.items():
        row = {
            "optimizer": name,
            "leaves": count,
            "milliseconds": case.milliseconds / steps,
            f"over {BASELINE}": ratio(case, cases[count, BASELINE]),
            "over copy": ratio(case, copies[count, name]),
            "bytes/parameter": moved[count, name] / sizes[count],
            "must move": needed[count, name] / sizes[count],
        }
        if len(leaves) > 1:
            row[f"over {leaves[0]} leaves"] = ratio(case, cases[leaves[0], name])
        rows.append(row | {"compilation s": case.first})
    return rows


def _random(seed: int, parameters: int, leaves: int, dtype: str) -> dict[str, jax.Array]:
    # Two equal dimensions where that comes out even: a leaf of a real model is a matrix.
    size = parameters // leaves
    side = int(size**0.5)
    shape = (side, size // side) if side > 1 else (size,)
    make = jax.jit(partial(jax.random.normal, shape=shape, dtype=dtype))
    keys = jax.random.split(jax.random.key(seed), leaves)
    return {f"layer_{number}": make(key) for number, key in enumerate(keys)}


def _case(
    name: str, pairs: Any, leaves: int, dtype: str, momentum_dtype: str | None, steps: int
) -> tuple[Case, int, int]:
    optimizer = OPTIMIZERS[name](momentum_dtype)
    params = optax.tree.scale(0.1, gdmam.unpair_gradients(pairs)[0])
    held = [params, jax.jit(optimizer.init)(params)]

    def step(params: Any, state: Any, pairs: Any) -> Any:
        updates, state = optimizer.update(pairs, state, params)
        return optax.apply_updates(params, updates), state

    def several(params: Any, state: Any, pairs: Any) -> Any:
        def body(carry: Any, _: None) -> Any:
            # New gradients at every step, for all that XLA knows: else it takes what depends on
            # them alone, the inner products, out of the loop.
            carry, new_pairs = jax.lax.optimization_barrier((carry, pairs))
            return step(*carry, new_pairs), None

        return jax.lax.scan(body, (params, state), length=steps)[0]

    # Parameters and state are donated, as a training loop donates them.
    def compile_(function: Any) -> Any:
        return jax.jit(function, donate_argnums=(0, 1)).lower(*held, pairs).compile()

    start = time.perf_counter()
    one = compile_(step)
    seconds = time.perf_counter() - start
    compiled = one if steps == 1 else compile_(several)

    def run() -> None:
        held[:] = compiled(*held, pairs)
        jax.block_until_ready(held)

    # Gradients are read; parameters and state are read and written.
    must = _bytes(pairs) + 2 * _bytes(held)
    if name != BASELINE:
        must += _bytes(pairs)  # The inner products come first, over all leaves.
    return Case(name, run, seconds), bytes_moved(one.as_text()), must


def _copy(size: int, times: int) -> Case:
    # Half is read and half is written, in place, as an update does.
    held = [jax.random.normal(jax.random.key(0), (size // 8,))]
    negate = jax.jit(jnp.negative, donate_argnums=0)

    def run() -> None:
        for _ in range(times):
            held[0] = negate(held[0])
        jax.block_until_ready(held)

    return Case("copy", run)


def _bytes(tree: Any) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
