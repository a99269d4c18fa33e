"""A whole training step, and a whole experiment, of RDA with GDMAM: against the same in PyTorch."""

import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from flax import nnx
from jax.experimental.compilation_cache import compilation_cache
from numpy.typing import ArrayLike

import gdmam_jax as gdmam
from benchmarks import rda_torch
from benchmarks.timing import Case, Ratio, measure_in_turn, ratio, tracked
from gdmam_jax.ldl import data, imbalance, losses
from gdmam_jax.ldl.laboratory import methods, program, training
from gdmam_jax.ldl.laboratory.protocol import Configuration
from gdmam_jax.ldl.models import RDA, draw_noise, rda_losses

SHAPES = {"movie": (7755, 1869, 5), "emotion6": (1980, 168, 7), "scut_fbp": (1500, 300, 5)}
"""Rows, features and labels of the public data sets."""

FILES = {"movie": "Movie", "emotion6": "emotion6", "scut_fbp": "SCUT_FBP"}


def load(name: str) -> tuple[data.Dataset, str]:
    """The data set next to the checkout, or one made up in its shape, and which of the two."""
    folder = Path(__file__).parents[2] / "shared" / "data" / "ldl"
    if (folder / f"{FILES[name]}.mat").is_file():
        return data.load(folder / f"{FILES[name]}.mat"), "real"
    rows, features, labels = SHAPES[name]
    generator = np.random.default_rng(0)
    return data.from_arrays(
        generator.random((rows, features)),
        generator.dirichlet(np.ones(labels), rows),
        name=name,
        sampler=imbalance.RELEASED_THRESHOLDS[FILES[name]],
    ), "synthetic"


def step(names: Sequence[str], steps: int, rounds: int) -> list[dict[str, Any]]:
    """One step in float32, batch 50: the released form in both, then this library's own form.

    Args:
      names: of the data sets.
      steps: how many there are in a measurement.
      rounds: how many times each case runs.

    Returns:
      One row for each data set and way to run it.
    """
    torch.set_num_threads(training.processors())
    rows = []
    for name in names:
        dataset, origin = load(name)
        x, y = dataset.features[:50], dataset.labels[:50]
        frequency = dataset.labels.sum(0)
        released = gdmam.gdmam_released()
        base = _torch_case(x, y, frequency, len(dataset.labels), steps)
        cases = [
            base,
            _jax_case("JAX, a call for each step", released, x, y, frequency, steps, False),
            _jax_case("JAX, steps in lax.scan", released, x, y, frequency, steps, True),
            _jax_case("JAX, gdmam, in lax.scan", gdmam.gdmam(1e-3), x, y, frequency, steps, True),
        ]
        measure_in_turn(cases, rounds)
        for case in cases:
            row = {"data": name, "origin": origin, "way": case.name}
            row |= {"milliseconds a step": case.milliseconds / steps}
            rows.append(row | {"times as fast": ratio(base, case), "first call s": case.first})
    return rows


def _torch_case(x: Any, y: Any, frequency: Any, samples: int, steps: int) -> Case:
    model = rda_torch.RDA(x.shape[1], y.shape[1])
    trainer = rda_torch.Trainer(model, torch.from_numpy(frequency), samples)
    tensors = torch.from_numpy(x), torch.from_numpy(y)

    def run() -> None:
        for _ in range(steps):
            trainer.step(*tensors)

    return Case("PyTorch, as released", run)


def _jax_case(
    name: str,
    optimizer: optax.GradientTransformation,
    x: Any,
    y: Any,
    frequency: Any,
    steps: int,
    scan: bool,
) -> Case:
    graph, params = nnx.split(RDA(x.shape[1], y.shape[1], rngs=nnx.Rngs(0)))
    prediction_loss = partial(
        _in_order, frequency=jnp.asarray(frequency), samples=jnp.asarray(len(x) * 100)
    )

    def train(params: Any, state: Any, noise: Any, x: Any, y: Any) -> Any:
        def objective(params: Any) -> Any:
            model = nnx.merge(graph, params)
            return rda_losses(model, x, y, noise, prediction_loss, similarity="sum")

        _, pairs = gdmam.value_and_paired_grad(objective)(params)
        updates, state = optimizer.update(pairs, state, params)
        return optax.apply_updates(params, updates), state

    @partial(jax.jit, donate_argnums=(0, 1, 2))
    def train_once(params: Any, state: Any, key: Any, x: Any, y: Any) -> Any:
        key, used = jax.random.split(key)
        return *train(params, state, draw_noise(used, len(x), 100), x, y), key

    @partial(jax.jit, donate_argnums=(0, 1, 2))
    def train_often(params: Any, state: Any, key: Any, x: Any, y: Any) -> Any:
        def body(carry: Any, noise: Any) -> Any:
            # A new batch at every step, as far as XLA knows.
            carry, batch = jax.lax.optimization_barrier((carry, (x, y)))
            return train(*carry, noise, *batch), None

        # Drawn ahead, as in `gdmam_jax.ldl`: in the loop XLA would draw it wherever it is used.
        key, used = jax.random.split(key)
        noise = jax.vmap(lambda key: draw_noise(key, len(x), 100))(jax.random.split(used, steps))
        return *jax.lax.scan(body, (params, state), noise)[0], key

    held = [params, jax.jit(optimizer.init)(params), jax.random.key(0)]
    batch = jnp.asarray(x), jnp.asarray(y)

    def run() -> None:
        if scan:
            held[:] = train_often(*held, *batch)
        else:
            for _ in range(steps):
                held[:] = train_once(*held, *batch)
        jax.block_until_ready(held[0])

    return Case(name, run)


def _in_order(
    logits: jax.Array, y: jax.Array, weights: Any, *, frequency: jax.Array, samples: jax.Array
) -> jax.Array:
    return losses.distribution_balanced(logits, y, frequency, samples, weights)


def whole(
    name: str,
    method_name: str,
    folds: int,
    epochs: int,
    rounds: int,
    log_variance_bound: float | None,
) -> list[dict[str, Any]]:
    """An experiment from start to end in both: train, select, test.

    Args:
      name: of the data set.
      method_name: one of `rda_torch.TRAINERS`.
      folds: of the cross-validation.
      epochs: of every fold.
      rounds: how many, each with a seed of its own. JAX runs twice in each: it compiles, and
        then finds its programs in a cache on disk, as a second experiment does.
      log_variance_bound: of the model; None is the released architecture.

    Returns:
      One row for each.
    """
    torch.set_num_threads(training.processors())
    dataset, origin = load(name)
    configuration = Configuration(
        folds=folds, seeds=1, epochs=epochs, chunk=epochs, log_variance_bound=log_variance_bound
    )
    prepared = data.make_folds(dataset, folds=folds, validation_size=20)
    method = methods.find(method_name)
    setting = next(iter(method.settings.values()), 0.0)

    def in_torch(seed: int) -> ArrayLike:
        return rda_torch.train_folds(prepared, epochs, seed, method_name, log_variance_bound)

    def in_jax(seed: int) -> ArrayLike:
        jax.clear_caches()
        built = program.build(method, prepared, configuration)
        trained = training.train(built, seed, 1e-3, configuration, setting=setting)
        return trained.results["validation"]["measures"]["kld"]

    ways = {"PyTorch": in_torch, "JAX, compiles": in_jax, "JAX, has compiled": in_jax}
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    klds: dict[str, list[ArrayLike]] = {way: [] for way in ways}
    options = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {option: getattr(jax.config, option) for option in options}
    try:
        for seed in tracked("experiments", range(rounds)):
            with tempfile.TemporaryDirectory() as cache:
                for option, value in zip(options, (cache, 0.0), strict=True):
                    jax.config.update(option, value)
                compilation_cache.reset_cache()
                for way, run in ways.items():
                    start = time.perf_counter()
                    klds[way].append(run(seed))
                    seconds[way].append(time.perf_counter() - start)
    finally:
        for option, value in before.items():
            jax.config.update(option, value)
        compilation_cache.reset_cache()
    rows = []
    for way in ways:
        quotients = np.divide(seconds["PyTorch"], seconds[way])
        low, median, high = np.percentile(quotients, (25, 50, 75))
        found = np.asarray(klds[way], np.float64)  # (rounds, folds)
        rows.append(
            {
                "data": name,
                "origin": origin,
                "way": way,
                "seconds": float(np.median(seconds[way])),
                "times as fast": Ratio(median, low, high),
                "test KLD": float(found.mean()),
                "over folds": float(found.mean(0).std(ddof=1)),
                "over seeds": float(found.mean(1).std(ddof=1)) if rounds > 1 else float("nan"),
            }
        )
    return rows
