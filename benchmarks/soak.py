"""A long training: what rounding, memory and counters do over a million steps."""

import resource
import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import gdmam_jax as gdmam
from benchmarks.timing import tracked

B2 = 0.999
OPTIMIZERS = {
    "gdmam": lambda: gdmam.gdmam(1e-3, b2=B2),
    "separate": lambda: gdmam.gdmam(
        1e-3,
        weighting=gdmam.balanced_weighting,
        gate=gdmam.cosine_gate,
        momentum=gdmam.relative_momentum,
        momenta="separate",
        b2=B2,
        amsgrad=True,
    ),
    "gdmam_released": lambda: gdmam.gdmam_released(1e-3, b2=B2),
}
"""The default, a form with every other buffer, and the released form."""

CALLS = 100
"""Into how many calls of the compiled program a run is cut."""

MEBIBYTE = 2**20


def benchmark(steps: int, dtypes: Sequence[str], only: Sequence[str]) -> list[dict[str, Any]]:
    """Trains a small noisy problem whose two losses fight, and compares with float64.

    Alongside the optimizer runs one in float64, with the same gradients: where they part, only the
    optimizer's rounding has parted them. A third one trains by itself in float64.

    Args:
      steps: of every run; a multiple of `CALLS`.
      dtypes: of the parameters, a run for each.
      only: the optimizers; all if none is given.

    Returns:
      One row for each optimizer, dtype and quantity: the largest value in the second tenth of
      the run, in the last tenth and at any time, the most it may be, and whether it held.
    """
    runs = [(name, dtype) for name in only or OPTIMIZERS for dtype in dtypes]
    with jax.enable_x64(True):
        return [
            {"optimizer": name, "dtype": dtype} | row
            for name, dtype in runs
            for row in run(OPTIMIZERS[name](), dtype, steps, f"{name}, {dtype}")
        ]


def run(
    optimizer: optax.GradientTransformationExtraArgs,
    dtype: str,
    steps: int,
    name: str,
    compiler_options: dict[str, Any] | None = None,
) -> list[dict[str, Any]]:
    """The rows of one run; see `benchmark`. ``compiler_options`` as in `jax.jit`."""
    params = jnp.zeros((8, 4), dtype)
    wide = _as_float64(params)
    start = (
        (params, optimizer.init(params)),
        optimizer.init(wide),
        (wide, optimizer.init(wide)),
    )
    seen = _momenta(start[0][1]), jnp.zeros((), _state(start[0][1]).allocation.norms.dtype)
    carry = (*start, jax.tree.map(jnp.zeros_like, seen))
    many = jax.jit(
        partial(_steps, optimizer),
        static_argnums=2,
        donate_argnums=0,
        compiler_options=compiler_options,
    )
    measured, memory, arrays = [], [], []
    for call in tracked(name, range(CALLS)):
        carry, largest = many(carry, call, steps // CALLS)
        measured.append(jax.device_get(largest))
        memory.append(_peak_memory() / MEBIBYTE)
        arrays.append(len(jax.live_arrays()))
    limits = _limits(dtype, carry[0][1])
    rows = [
        _row(quantity, [call[quantity] for call in measured], limits.get(quantity))
        for quantity in measured[0]
    ]
    # The first calls keep what they allocate; after that nothing may be added.
    settled = CALLS // 10
    rows.append(_row("peak memory, MiB more", np.subtract(memory, memory[settled]), 4))
    rows.append(_row("arrays alive, more", np.subtract(arrays, arrays[settled]), 0))
    rows.append(_row("compilations", [many._cache_size()], 1))
    saturation = _saturation(optimizer, carry[0], compiler_options)
    rows.append(_row("counter at its end, off", [saturation], 0))
    return rows


def _row(quantity: str, values: Any, limit: float | None) -> dict[str, Any]:
    values = np.asarray(values, float)
    tenth = len(values) // 10
    largest = float(np.max(values))
    return {
        "quantity": quantity,
        "second tenth": float(np.max(values[tenth : 2 * tenth or None])),
        "last tenth": float(np.max(values[-tenth:])),
        "ever": largest,
        "at most": float("nan") if limit is None else float(limit),
        # NaN does not hold: it is not below any limit.
        "held": "-" if limit is None else "yes" if largest <= limit else "NO",
    }


def _limits(dtype: str, state: Any) -> dict[str, float]:
    """The most that rounding can do, however many steps there are.

    A running mean of decay d that is rounded by half an eps at every step is off by half an
    eps / (1 - d) at most; factor 2 for its input.
    """
    single, short = float(jnp.finfo("float32").eps), float(jnp.finfo(dtype).eps)
    decay = float(jnp.max(_state(state).statistics.momentum))
    statistics = single / (1 - 0.9)
    momenta, second = short / (1 - decay) + statistics, single / (1 - B2) + 2 * statistics
    return {
        "update off float64": short + momenta + second / 2,
        "momenta off float64": momenta,
        "second moment off float64": second,
        "statistics off float64": statistics,
        "momenta over largest gradient": 1 + momenta,
        "second moment over largest square": 1 + second,
        "mean norm over largest norm": 1 + statistics,
        "scalars out of range": statistics,
        "numbers not finite": 0,
    } | ({"parameters off own float64": 1e-3} if dtype == "float32" else {})


def _steps(optimizer: Any, carry: Any, call: Any, count: int) -> tuple[Any, dict[str, Any]]:
    """So many steps, and the largest value of every quantity in them."""

    def body(carry: Any, batch: Any) -> tuple[Any, Any]:
        (params, state), exact, (own, own_state), seen = carry
        pairs, updates, state = _update(optimizer, params, state, batch)
        exact_updates, exact = optimizer.update(_as_float64(pairs), exact, _as_float64(params))
        _, own_updates, own_state = _update(optimizer, own, own_state, _as_float64(batch))
        params = optax.apply_updates(params, updates)
        own = optax.apply_updates(own, own_updates)
        seen = _seen(seen, state, pairs)
        quantities = {
            "update off float64": _off(updates, exact_updates),
            "momenta off float64": _off(_momenta(state), _momenta(exact), seen[0]),
            "second moment off float64": _off(
                _state(state).second_moment, _state(exact).second_moment
            ),
            "statistics off float64": _off(_statistics(state), _statistics(exact)),
            "parameters off own float64": _off(params, own),
            "prediction loss over own float64's": _losses(_as_float64(params), batch)[0]
            / _losses(own, batch)[0],
            **_bounded(state, seen),
            "numbers not finite": sum(
                jnp.sum(~jnp.isfinite(leaf)) for leaf in jax.tree.leaves((params, state))
            )
            - _infinities(state),
        }
        return ((params, state), exact, (own, own_state), seen), quantities

    carry, quantities = jax.lax.scan(body, carry, _batches(call, count))
    return carry, jax.tree.map(jnp.max, quantities)


def _batches(call: Any, count: int) -> tuple[jax.Array, jax.Array]:
    """Inputs, and targets with noise, for so many steps: the same in every dtype."""
    key = jax.random.fold_in(jax.random.key(0), call)
    drawn = jax.random.normal(key, (count, 2, 8, 12), "float32")
    x, noise = jnp.split(drawn, [8], axis=-1)
    # The first loss sees one half of the inputs well and the other badly, the second the opposite.
    scales = jnp.linspace(0.2, 2, 8, dtype="float32")
    x = x * jnp.stack([scales, scales[::-1]])[:, None]
    return x, x @ jnp.linspace(-1, 1, 32, dtype="float32").reshape(8, 4) + 0.5 * noise


def _losses(params: Any, batch: Any) -> tuple[jax.Array, jax.Array]:
    x, y = (each.astype(params.dtype) for each in batch)
    prediction, alignment = jnp.mean((x @ params - y) ** 2, axis=(1, 2))
    return prediction, 10 * alignment


def _update(optimizer: Any, params: Any, state: Any, batch: Any) -> tuple[Any, Any, Any]:
    _, pairs = gdmam.value_and_paired_grad(_losses)(params, batch)
    return pairs, *optimizer.update(pairs, state, params)


def _as_float64(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.astype("float64"), tree)


def _off(tree: Any, exact: Any, scale: Any = None) -> jax.Array:
    """The largest difference of two leaves, over the largest element of the exact one or a scale's.

    A momentum's loss is measured by the gradients that it is a mean of.
    """
    trees = (tree, exact, exact if scale is None else scale)
    return jnp.max(
        jnp.stack(
            [
                jnp.max(jnp.abs(leaf.astype("float64") - other))
                / jnp.maximum(jnp.max(jnp.abs(size)), 1e-12)
                for leaf, other, size in zip(*map(jax.tree.leaves, trees), strict=True)
            ]
        )
    )


def _state(state: Any) -> Any:
    """GDMAM's own state, the first of the chain's."""
    return state[0]


def _momenta(state: Any) -> tuple[Any, ...]:
    state = _state(state)
    return state.momenta if isinstance(state, gdmam.GDMAMState) else (state.first_moment,)


def _statistics(state: Any) -> Any:
    statistics = _state(state).statistics
    return (_state(state).allocation.norms, statistics.mean, statistics.momentum)


def _seen(seen: Any, state: Any, pairs: Any) -> Any:
    """The largest elements so far of what the momenta are means of, and the largest norm."""
    largest, norm = seen
    allocation = _state(state).allocation
    sizes = allocation.sizes
    if not isinstance(_state(state), gdmam.GDMAMState):
        # Its statistics are those of the gradients' own components.
        geometry = allocation.geometry
        sizes = jnp.append(geometry.prediction_norm, geometry.alignment_norm)
        factors = allocation.weights[None]
    elif len(largest) == 1:
        factors = allocation.factors[None]
    else:
        factors = allocation.components

    def larger(number: int) -> Any:
        def leaf(pair: gdmam.GradientPair, old: jax.Array) -> jax.Array:
            both = jnp.stack([pair.prediction, pair.alignment]).astype(factors.dtype)
            new = jnp.abs(jnp.tensordot(factors[number], both, 1))
            return jnp.maximum(old, new.astype(old.dtype))

        return jax.tree.map(
            leaf,
            pairs,
            largest[number],
            is_leaf=lambda node: isinstance(node, gdmam.GradientPair),
        )

    largest = tuple(larger(number) for number in range(len(largest)))
    return largest, jnp.maximum(norm, jnp.max(sizes))


def _bounded(state: Any, seen: Any) -> dict[str, jax.Array]:
    """What can be at most 1, and how far any scalar is outside its range, 0 in exact arithmetic."""
    largest, norm = seen
    inner = _state(state)
    allocation = inner.allocation
    statistics = inner.statistics

    def ratio(tree: Any, bounds: Any) -> jax.Array:
        return jnp.max(
            jnp.stack(
                [
                    jnp.max(jnp.abs(leaf).astype("float64") / jnp.maximum(bound, 1e-30))
                    for leaf, bound in zip(
                        jax.tree.leaves(tree), jax.tree.leaves(bounds), strict=True
                    )
                ]
            )
        )

    total = jax.tree.map(lambda *each: sum(each[1:], each[0]).astype("float64"), *largest)
    ranges = [
        (statistics.momentum, 0, 0.999),
        (statistics.variance / norm**2, 0, 1),
        (statistics.remainder, 0, 1),
        (allocation.geometry.cosine, -1, 1),
        (allocation.gate, 0, 1),
        (allocation.weights, 0, jnp.inf),
    ]
    if isinstance(inner, gdmam.GDMAMState):
        ranges += [(inner.momentum_correction, 0, 1), (inner.second_moment_correction, 0, 1)]
    else:
        ranges += [(inner.decay, 0.7, 0.999)]
    smallest = [jnp.min(leaf) for leaf in jax.tree.leaves(inner.second_moment)]
    outside = [jnp.max(jnp.maximum(low - value, value - high)) for value, low, high in ranges]
    return {
        "momenta over largest gradient": ratio(_momenta(state), largest),
        "second moment over largest square": ratio(
            inner.second_moment, jax.tree.map(jnp.square, total)
        ),
        "mean norm over largest norm": jnp.max(statistics.mean) / norm,
        "scalars out of range": jnp.maximum(
            jnp.max(jnp.stack([value.astype("float64") for value in outside])),
            -jnp.min(jnp.stack(smallest)),
        ),
    }


def _infinities(state: Any) -> jax.Array | int:
    """How many entries of the state are infinite by design: the clipping's queue at first."""
    inner = _state(state)
    return 0 if isinstance(inner, gdmam.GDMAMState) else jnp.sum(jnp.isinf(inner.clipping.norms))


def _saturation(optimizer: Any, trained: Any, compiler_options: Any) -> float:
    """How far off three steps are when the counters reach the largest integer and stay there."""
    params, state = trained
    end = np.iinfo(np.int32).max

    def late(leaf: jax.Array) -> jax.Array:
        return jnp.stack([leaf, jnp.full_like(leaf, end - 1) if leaf.dtype == "int32" else leaf])

    def step(states: Any, batch: Any) -> tuple[Any, jax.Array]:
        update = jax.vmap(lambda state: _update(optimizer, params, state, batch)[1:])
        updates, states = update(states)
        return states, _off(updates[1], updates[0].astype("float64"))

    def steps(state: Any) -> tuple[Any, jax.Array]:
        return jax.lax.scan(step, jax.tree.map(late, state), _batches(0, 3))

    states, off = jax.jit(steps, compiler_options=compiler_options)(state)
    return float(jnp.max(off)) + abs(int(_state(states).count[1]) - end)


def _peak_memory() -> int:
    """Bytes; Linux counts in kibibytes, macOS in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
