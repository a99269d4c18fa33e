"""The cost of an optimizer step alone, with the losses' gradients given."""

import itertools
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
RELEASED = "gdmam_released"
"""Takes one alignment loss only."""

OPTIMIZERS = {
    BASELINE: lambda dtype, others=1: gdmam.summed(optax.adamw(1e-3, mu_dtype=dtype)),
    "gdmam": lambda dtype, others=1: gdmam.gdmam(1e-3, mu_dtype=dtype, alignment_losses=others),
    "gdmam(not_finite=skip)": lambda dtype, others=1: gdmam.gdmam(
        1e-3, mu_dtype=dtype, alignment_losses=others, not_finite="skip"
    ),
    "gdmam(not_finite=skip_loss)": lambda dtype, others=1: gdmam.gdmam(
        1e-3, mu_dtype=dtype, alignment_losses=others, not_finite="skip_loss"
    ),
    "gdmam(present=)": lambda dtype, others=1: _all_present(
        gdmam.gdmam(1e-3, mu_dtype=dtype, alignment_losses=others), others
    ),
    "adamw behind allocate": lambda dtype, others=1: optax.chain(
        gdmam.allocate(alignment_losses=others), optax.adamw(1e-3, mu_dtype=dtype)
    ),
    "scale_by_gdmam": lambda dtype, others=1: optax.chain(
        gdmam.scale_by_gdmam(mu_dtype=dtype, alignment_losses=others),
        optax.scale_by_learning_rate(1e-3),
    ),
    RELEASED: lambda dtype, others=1: gdmam.gdmam_released(1e-3),
    "UPGrad(adamw)": lambda dtype, others=1: gdmam.weighed(
        optax.adamw(1e-3, mu_dtype=dtype), gdmam.upgrad_weighting, alignment_losses=others
    ),
}
"""Functions of the momentum's dtype and of the number of alignment losses."""

TORCH_BASELINE = "PyTorch summed(AdamW)"
TORCH = (TORCH_BASELINE, "TorchJD UPGrad(AdamW)")


def benchmark(
    parameters: int,
    leaves: Sequence[int],
    dtype: str,
    mu_dtype: str | None,
    rounds: int,
    only: Sequence[str] = (),
    steps: int = 1,
    losses: Sequence[int] = (2,),
    torch: bool = False,
) -> list[dict[str, Any]]:
    """GDMAM's forms, compared with `summed(optax.adamw)` and with a copy of as many bytes.

    Args:
      parameters: how many, in all.
      leaves: into how many leaves of equal size to cut them; each number is a set of cases.
      dtype: of parameters and gradients.
      mu_dtype: of GDMAM's momenta and of AdamW's first moment; None: as the parameters.
      rounds: how many times each case runs.
      only: the optimizers besides the baseline; all if none is given.
      steps: in one call. A call hands every array over, which with thousands of them takes as
        long as their update. Several steps, in `jax.lax.scan`, share that time.
      losses: how many, the prediction's included; each number is a set of cases. The released
        form is left out if there are more than two.
      torch: whether TorchJD's way is measured, too, over AdamW on the sum in PyTorch.

    Returns:
      One row for each case: milliseconds of one step; time over the summed loss's and over the
      copy's; bytes moved for each parameter, as compiled and at least; and memory over the summed
      loss's, of parameters, state, gradients and what else the step needs.
    """
    names = [BASELINE, *(only or [name for name in OPTIMIZERS if name != BASELINE])]
    cases: dict[tuple[int, int, str], Case] = {}
    copies: dict[tuple[int, int, str], Case] = {}
    moved, memory, needed, sizes = {}, {}, {}, {}
    for number, count in itertools.product(losses, leaves):
        gradients = [_random(1 + k, parameters, count, dtype) for k in range(number)]
        sizes[count] = sum(leaf.size for leaf in jax.tree.leaves(gradients[0]))
        for name in [*names, *(TORCH if torch else ())]:
            if name == RELEASED and number > 2:
                continue
            key = (number, count, name)
            if name in TORCH:
                cases[key], held, memory[key] = _torch_case(name, gradients, dtype, steps)
                moved[key] = float("nan")
            else:
                cases[key], held, memory[key], moved[key] = _case(name, gradients, mu_dtype, steps)
            # Gradients are read; parameters and state are read and written. Where there are
            # weights, the inner products come first, over all leaves.
            reads = 1 if name in (BASELINE, TORCH_BASELINE) else 2
            needed[key] = reads * _bytes(gradients) + 2 * held
            copies[key] = _copy(needed[key], steps)
    measure_in_turn([case for key in cases for case in (cases[key], copies[key])], rounds)
    rows = []
    for (number, count, name), case in cases.items():
        key = (number, count, name)
        base = (number, count, TORCH_BASELINE if name in TORCH else BASELINE)
        row = {
            "optimizer": name,
            "losses": number,
            "leaves": count,
            "ms": case.milliseconds / steps,
            "over summed": ratio(case, cases[base]),
            "over copy": ratio(case, copies[key]),
            "moved": moved[key] / sizes[count],
            "must move": needed[key] / sizes[count],
            "memory": memory[key] / memory[base],
        }
        if len(leaves) > 1:
            row[f"over {leaves[0]} leaves"] = ratio(case, cases[number, leaves[0], name])
        rows.append(row | {"compile s": case.first})
    return rows


def _all_present(
    optimizer: optax.GradientTransformationExtraArgs, others: int
) -> optax.GradientTransformationExtraArgs:
    """The optimizer with all losses present, which only the running program knows."""

    def update(pairs: Any, state: Any, params: Any = None) -> Any:
        here = state[0].count >= 0
        return optimizer.update(pairs, state, params, present=(here, (here,) * others))

    return optax.GradientTransformationExtraArgs(optimizer.init, update)


def _random(seed: int, parameters: int, leaves: int, dtype: str) -> dict[str, jax.Array]:
    # Two nearly equal dimensions: a leaf of a real model is a matrix.
    size = parameters // leaves
    side = int(size**0.5)
    shape = (side, size // side) if side > 1 else (size,)
    make = jax.jit(partial(jax.random.normal, shape=shape, dtype=dtype))
    keys = jax.random.split(jax.random.key(seed), leaves)
    return {f"layer_{number}": make(key) for number, key in enumerate(keys)}


def _case(
    name: str, gradients: list[Any], mu_dtype: str | None, steps: int
) -> tuple[Case, int, int, int]:
    """A case, the bytes of parameters and state, those of all that is held, and those moved."""
    first, *others = gradients
    optimizer = OPTIMIZERS[name](mu_dtype, len(others))
    pairs = gdmam.pair_gradients(first, others[0] if len(others) == 1 else tuple(others))
    params = optax.tree.scale(0.1, first)
    held = [params, jax.jit(optimizer.init)(params)]

    def step(params: Any, state: Any, pairs: Any) -> Any:
        updates, state = optimizer.update(pairs, state, params)
        return optax.apply_updates(params, updates), state

    def several(params: Any, state: Any, pairs: Any) -> Any:
        def body(carry: Any, _: None) -> Any:
            # New gradients at every step, as far as XLA knows. Else it would take what depends on
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

    analysis = one.memory_analysis()
    # What is donated is in the arguments and in the outputs.
    new = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    memory = analysis.argument_size_in_bytes + analysis.temp_size_in_bytes + new
    return Case(name, run, seconds), _bytes(held), memory, bytes_moved(one.as_text())


def _torch_case(name: str, gradients: list[Any], dtype: str, steps: int) -> tuple[Case, int, int]:
    """A case, the bytes of parameters and state, and those of all that is held."""
    # Imported here, so that the rest runs without PyTorch.
    import torch

    from benchmarks.pair import jacobian_to_gradient, peak_bytes
    from gdmam_jax.ldl.laboratory import training

    torch.set_num_threads(training.processors())
    shapes = [leaf.shape for leaf in jax.tree.leaves(gradients[0])]
    kind = getattr(torch, dtype)
    jacobians = [torch.randn((len(gradients), *shape)).to(kind) for shape in shapes]
    params = [torch.nn.Parameter(0.1 * jacobian[0]) for jacobian in jacobians]
    optimizer = torch.optim.AdamW(params, 1e-3, weight_decay=1e-4, fused=True)

    def run() -> None:
        for _ in range(steps):
            for param, jacobian in zip(params, jacobians, strict=True):
                if name == TORCH_BASELINE:
                    param.grad = jacobian.sum(0)
                else:
                    param.jac = jacobian
            if name != TORCH_BASELINE:
                jacobian_to_gradient(params)
            optimizer.step()
            optimizer.zero_grad()

    peak = peak_bytes(run)
    state = [value for entry in optimizer.state.values() for value in entry.values()]
    held = sum(tensor.nbytes for tensor in [*params, *state])
    return Case(name, run), held, held + sum(each.nbytes for each in jacobians) + peak


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
