"""Training the runs of all folds: a thread for every worker, checkpoints.

Every device, on a CPU every processor, trains one run at a time, a chunk of epochs at a time, so
that progress shows. A killed experiment resumes at the last checkpoint with the same numbers, since
random draws depend only on seed, fold and epoch.

On a CPU, `jax.vmap` over the folds is up to a half slower if the model is large, since a run's
state then no longer stays in the cache. If the model is small, it is as fast. A program sharded
over processors as devices is a sixth slower, since XLA compiles it worse.
"""

import contextlib
import itertools
import os
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from gdmam_jax.ldl.laboratory import storage
from gdmam_jax.ldl.laboratory.program import Program, RunState, run_of
from gdmam_jax.ldl.laboratory.protocol import Configuration


class Trained(NamedTuple):
    """The results of some runs.

    Attributes:
      history: by name, shape (runs, epochs), but (runs, chunks) for `test_kld`, the KLD on the
        test fold at each chunk's end.
      results: by selection, see `protocol.SELECTIONS`: `epoch`, shape (runs,), `held_out`, KLDs
        by `protocol.HELD_OUT`, shape (runs,), `measures` on the test fold by name, shape
        (runs,), and `shown`, the first predictions of the test fold.
    """

    history: dict[str, NDArray[Any]]
    results: dict[str, Any]


def train(
    program: Program,
    seed: int,
    learning_rate: float,
    configuration: Configuration,
    *,
    setting: float = 0.0,
    folder: Path | None = None,
    checkpoint_seconds: float = 60.0,
    progress: Callable[[int], None] | None = None,
) -> Trained:
    """Train and test the runs of all folds, from the last checkpoint if there is one.

    Folds are trained in threads. These see the settings of JAX that `jax.config.update` makes, but
    not those of a context manager, such as `with jax.default_matmul_precision(...)`.

    Args:
      program: from `build`.
      seed: of the runs.
      learning_rate: of the runs.
      configuration: the same as `build`'s.
      setting: of the method, see `methods.Method`.
      folder: for checkpoints, after every quarter of the epochs; None keeps none.
      checkpoint_seconds: most time between two checkpoints, up to a chunk.
      progress: told the number of epochs done after every chunk, and when one is restored.

    Returns:
      A `Trained` of as many runs as there are folds.
    """
    program.prepare(min(configuration.chunk, configuration.epochs))
    runs = [run_of(fold, seed, learning_rate, setting) for fold in range(configuration.folds)]
    restored = storage.restore(folder) if folder else None
    if restored is None:
        epoch, states, chunks = 0, _at_once(program.init, runs), []
    else:
        epoch, leaves, history = restored
        states, chunks = _unstack(leaves, program.init(runs[0]), folder), [history]
        if progress:
            progress(epoch)
    saved, saved_epoch = time.monotonic(), epoch
    while epoch < configuration.epochs:
        length = min(configuration.chunk, configuration.epochs - epoch)
        common = itertools.repeat(jnp.int32(epoch)), itertools.repeat(length)
        advanced = _at_once(program.advance, states, runs, *common)
        states = [state for state, _ in advanced]
        chunk = _stack([history for _, history in advanced])
        chunks.append({name: values.reshape(len(runs), -1) for name, values in chunk.items()})
        epoch += length
        due = epoch - saved_epoch >= configuration.epochs / 4
        due |= time.monotonic() - saved >= checkpoint_seconds
        if folder and due and epoch < configuration.epochs:
            storage.save(folder, epoch, jax.tree.leaves(_stack(states)), _join(chunks))
            saved, saved_epoch = time.monotonic(), epoch
        if progress:
            progress(epoch)
    return Trained(_join(chunks), _stack(_at_once(program.finish, states, runs)))


def processors() -> int:
    """How many processors this process may use."""
    available = getattr(os, "sched_getaffinity", None)
    return len(available(0)) if available else os.cpu_count() or 1


def _workers() -> list[Any]:
    """The devices that train a run each, None for the default one; a CPU's once per processor."""
    devices = jax.local_devices()
    if devices[0].platform != "cpu":
        return [None, *devices[1:]]
    return [None] * processors()


def _at_once(function: Callable[..., Any], *columns: Iterable[Any]) -> list[Any]:
    """`map`, in as many threads as there are workers."""
    workers = _workers()

    def call(device: Any, *args: Any) -> Any:
        with jax.default_device(device) if device else contextlib.nullcontext():
            return jax.block_until_ready(function(*args))

    with ThreadPoolExecutor(len(workers)) as pool:
        return list(pool.map(call, itertools.cycle(workers), *columns))


def _stack(runs: Sequence[Any]) -> Any:
    """The arrays of all runs in one, on the host."""
    return jax.tree.map(lambda *leaves: np.stack([_numbers(leaf) for leaf in leaves]), *runs)


def _is_key(leaf: jax.Array) -> bool:
    return bool(jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key))


def _numbers(leaf: jax.Array) -> jax.Array:
    """A random key as the numbers it is made of, which NumPy can hold."""
    return jax.random.key_data(leaf) if _is_key(leaf) else leaf


def _unstack(leaves: Sequence[NDArray[Any]], like: RunState, folder: Path | None) -> list[RunState]:
    expected, structure = jax.tree.flatten(like)
    numbers = [_numbers(leaf) for leaf in expected]
    if [leaf.shape[1:] for leaf in leaves] != [leaf.shape for leaf in numbers]:
        raise ValueError(f"{folder} holds a checkpoint of another method or version: remove it")
    # A dtype that NumPy does not know, such as bfloat16, is stored as plain bytes.
    typed = [leaf.view(to.dtype) for leaf, to in zip(leaves, numbers, strict=True)]

    def restored(leaf: NDArray[Any], to: jax.Array) -> jax.Array:
        array = jnp.array(leaf)
        if not _is_key(to):
            return array
        return jax.random.wrap_key_data(array, impl=jax.random.key_impl(to))

    return [
        jax.tree.unflatten(
            structure, [restored(leaf[run], to) for leaf, to in zip(typed, expected, strict=True)]
        )
        for run in range(len(leaves[0]))
    ]


def _join(chunks: Sequence[dict[str, NDArray[Any]]]) -> dict[str, NDArray[Any]]:
    return {name: np.concatenate([chunk[name] for chunk in chunks], 1) for name in chunks[0]}
