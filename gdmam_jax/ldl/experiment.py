"""Experiments: every fold and seed of a method by one compiled program.

A *run* is one model: a fold, a seed and a learning rate. Every device, on a CPU every processor,
trains one run at a time, a chunk of epochs at a time, so that progress shows and a killed
experiment resumes at the last checkpoint with the same numbers, since random draws depend only on
seed, fold and epoch. (On a CPU `jax.vmap` over the folds is up to a half slower where the model is
large, since a run's state then no longer stays in the cache, and as fast where it is small; a
program sharded over processors that are devices is a sixth slower, since XLA compiles it worse.)
"""

import contextlib
import dataclasses
import functools
import hashlib
import importlib.metadata
import itertools
import json
import os
import platform
import shutil
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from numpy.typing import NDArray

import gdmam_jax as gdmam
from gdmam_jax.ldl import baselines, losses, storage
from gdmam_jax.ldl.data import Dataset, Folds, make_folds
from gdmam_jax.ldl.imbalance import imbalance_statistics
from gdmam_jax.ldl.measures import measure
from gdmam_jax.ldl.methods import Method
from gdmam_jax.ldl.models import RDA, draw_noise, rda_losses

SELECTIONS = {
    "validation": "the epoch with the best validation KLD (the papers')",
    "reweighted": "the epoch with the best validation KLD, rows weighted by their labels' rarity",
    "natural": "the epoch with the best KLD on as many rows that the imbalance sampler left out",
    "last": "the last epoch",
    "average": "the mean of the parameters over the second half of the epochs",
}
"""Which parameters of a run are tested, by name."""


@dataclass(frozen=True)
class Configuration:
    """What all methods of an experiment have in common.

    Attributes:
        folds: of the cross-validation.
        seeds: repetitions of every fold: initial parameters, order of the batches, noise.
        epochs: of every run.
        batch_size: the last batch of an epoch is short.
        validation_size: rows held out of every imbalanced training fold.
        hidden: width of the model.
        alignment_weight: the three lambdas of the alignment loss.
        log_variance_bound: of the model; None is the released architecture.
        learning_rates: the tuning grid. The one with the lowest KLD on held-out rows, mean over
            epochs and tuning runs, is used: the best epoch's would favour large rates, since it is
            the least of many noisy values, and says nothing of the last epoch's.
        tuning: the rows that decide: ``validation`` (the papers') or ``natural`` ones, which the
            imbalance sampler left out.
        tuning_seeds: of how many seeds the tuning runs are.
        chunk: epochs between two evaluations on the test folds, which only draw curves.
    """

    folds: int = 10
    seeds: int = 5
    epochs: int = 300
    batch_size: int = 50
    validation_size: int = 20
    hidden: int = 100
    alignment_weight: float = 0.1
    log_variance_bound: float | None = 2.0
    learning_rates: tuple[float, ...] = (1e-3,)
    tuning: Literal["validation", "natural"] = "validation"
    tuning_seeds: int = 1
    chunk: int = 25

    def __post_init__(self) -> None:
        if self.folds < 2:
            raise ValueError(f"folds must be at least 2, got {self.folds}")
        for name in ("seeds", "epochs", "batch_size", "validation_size", "hidden", "chunk"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.learning_rates or min(self.learning_rates) <= 0:
            raise ValueError(f"learning_rates must be positive, got {self.learning_rates}")
        if self.tuning not in ("validation", "natural"):
            raise ValueError(f"tuning must be validation or natural, got {self.tuning!r}")
        if not 1 <= self.tuning_seeds <= self.seeds:
            raise ValueError(
                f"tuning_seeds must be between 1 and seeds = {self.seeds}, got {self.tuning_seeds}"
            )


class Run(NamedTuple):
    """What distinguishes a run from others, all scalars."""

    fold: jax.Array
    seed: jax.Array
    learning_rate: jax.Array


HELD_OUT = ("validation", "reweighted", "natural")
"""The selections that choose an epoch, by a KLD on rows held out."""


class Checkpoints(NamedTuple):
    """The best parameters so far by each score of `HELD_OUT`, stacked, with scores and epochs."""

    params: nnx.State
    score: jax.Array
    epoch: jax.Array


class RunState(NamedTuple):
    """What a run carries from epoch to epoch."""

    params: nnx.State
    opt_state: optax.OptState
    average: nnx.State
    best: Checkpoints


class Program(NamedTuple):
    """A method on a data set, compiled: functions of one run.

    Attributes:
        prepare: `number_of_epochs -> None`: compiles the other three side by side, instead of one
            after the other at their first calls; for the default device.
        init: `run -> state`.
        advance: `(state, run, first_epoch, number_of_epochs) -> (state, history)`.
        finish: `(state, run) -> results` by selection.
    """

    prepare: Callable[[int], None]
    init: Callable[[Run], RunState]
    advance: Callable[[RunState, Run, jax.Array, int], tuple[RunState, dict[str, jax.Array]]]
    finish: Callable[[RunState, Run], dict[str, Any]]


class _Arrays(NamedTuple):
    """`Folds` on the device, and what is derived from the training rows."""

    features: jax.Array
    labels: jax.Array
    train: jax.Array
    train_mask: jax.Array
    validation: jax.Array
    natural: jax.Array
    test: jax.Array
    test_mask: jax.Array
    frequency: jax.Array
    head: jax.Array


def _arrays(folds: Folds) -> _Arrays:
    frequency, head = baselines.frequency_and_head(folds)
    values = {f.name: getattr(folds, f.name) for f in dataclasses.fields(folds)}
    return _Arrays(**jax.tree.map(jnp.asarray, values | {"frequency": frequency, "head": head}))


def build(method: Method, folds: Folds, configuration: Configuration) -> Program:
    """Compile a method on a data set's folds, lazily: at the first call of each function.

    Args:
        method: a `Method`.
        folds: from `data.make_folds`.
        configuration: a `Configuration`.

    Returns:
        A `Program`.
    """
    arrays = _arrays(folds)
    num_features, num_labels = folds.features.shape[1], folds.labels.shape[1]
    counts = folds.train_mask.sum(1)
    batch_size = min(configuration.batch_size, int(counts.max()))
    num_batches = -(-int(counts.max()) // batch_size)

    def make_model(key: jax.Array) -> RDA:
        return RDA(
            num_features,
            num_labels,
            configuration.hidden,
            rngs=nnx.Rngs(key),
            log_variance_bound=configuration.log_variance_bound,
        )

    graph = nnx.graphdef(nnx.eval_shape(lambda: make_model(jax.random.key(0))))

    def run_key(run: Run) -> jax.Array:
        return jax.random.fold_in(jax.random.key(run.seed), run.fold)

    def predict(params: nnx.State, rows: jax.Array, arrays: _Arrays) -> jax.Array:
        return jax.nn.softmax(nnx.merge(graph, params)(arrays.features[rows]))

    @jax.jit
    def init(run: Run) -> RunState:
        params = nnx.state(make_model(jax.random.fold_in(run_key(run), configuration.epochs)))
        scores = len(HELD_OUT)
        return RunState(
            params=params,
            opt_state=method.optimizer(run.learning_rate).init(params),
            average=jax.tree.map(jnp.zeros_like, params),
            best=Checkpoints(
                params=jax.tree.map(lambda leaf: jnp.stack([leaf] * scores), params),
                score=jnp.full(scores, jnp.inf, jnp.float32),
                epoch=jnp.zeros(scores, jnp.int32),
            ),
        )

    # Compiled, so that it is traced once, for its shapes and for the loop.
    @jax.jit
    def train_step(
        state: tuple[nnx.State, optax.OptState],
        batch: tuple[jax.Array, jax.Array, jax.Array],
        run: Run,
        arrays: _Arrays,
    ) -> tuple[tuple[nnx.State, optax.OptState], dict[str, jax.Array]]:
        params, opt_state = state
        rows, mask, noise = batch
        x, y, weights = arrays.features[rows], arrays.labels[rows], mask.astype(jnp.float32)
        prediction_loss = partial(_in_order, method.prediction_loss, arrays, run.fold)
        recovery, target, similarity = (
            configuration.alignment_weight * factor for factor in method.alignment_weights
        )

        def objective(
            params: nnx.State,
        ) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]:
            model = nnx.merge(graph, params)
            if method.alignment:
                pair = rda_losses(
                    model,
                    x,
                    y,
                    noise,
                    prediction_loss,
                    weights,
                    recovery_weight=recovery,
                    target_weight=target,
                    similarity_weight=similarity,
                    similarity=method.similarity,
                )
            else:
                pair = prediction_loss(model(x), y, weights), jnp.zeros(())
            return method.rescale(*pair), pair

        (_, pair), pairs = gdmam.value_and_paired_grad(objective, has_aux=True)(params)
        updates, opt_state = method.optimizer(run.learning_rate).update(pairs, opt_state, params)
        history = dict(zip(("prediction_loss", "alignment_loss"), pair, strict=True))
        history |= _diagnostics(opt_state)
        return (optax.apply_updates(params, updates), opt_state), history

    def epoch_step(
        state: RunState, epoch: jax.Array, run: Run, arrays: _Arrays
    ) -> tuple[RunState, dict[str, jax.Array]]:
        order_key, noise_key = jax.random.split(jax.random.fold_in(run_key(run), epoch))
        present = arrays.train_mask[run.fold]
        order = jnp.argsort(jnp.where(present, jax.random.uniform(order_key, present.shape), 2.0))
        order = jnp.pad(order, (0, num_batches * batch_size - len(order)))
        rows = arrays.train[run.fold][order].reshape(num_batches, batch_size)
        mask = (jnp.arange(num_batches * batch_size) < present.sum()).reshape(rows.shape)

        # Drawn out here: inside of `step`, XLA draws it again wherever it is used.
        draw = partial(draw_noise, num_samples=batch_size, hidden=configuration.hidden)
        batches = rows, mask, jax.lax.map(draw, jax.random.split(noise_key, num_batches))

        def step(number: jax.Array, carry: Any) -> Any:
            state, total = carry
            batch = jax.tree.map(lambda leaf: leaf[number], batches)
            state, history = train_step(state, batch, run, arrays)
            return state, jax.tree.map(jnp.add, total, history)

        start = (state.params, state.opt_state)
        like = jax.eval_shape(
            lambda: train_step(start, jax.tree.map(lambda x: x[0], batches), run, arrays)[1]
        )
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), like)
        # Folds differ in size: each has as many batches as it needs.
        needed = -(-present.sum() // batch_size)
        (params, opt_state), total = jax.lax.fori_loop(0, needed, step, (start, zeros))
        history = jax.tree.map(lambda leaf: leaf / needed, total)

        held_out = jnp.stack([arrays.validation[run.fold], arrays.natural[run.fold]])
        target, natural_target = arrays.labels[held_out]
        prediction, natural_prediction = predict(params, held_out, arrays)
        rarity = (target / arrays.frequency[run.fold]).sum(1)
        scores = {
            "validation": losses.kullback_leibler(prediction, target),
            "reweighted": losses.kullback_leibler(prediction, target, rarity),
            "natural": losses.kullback_leibler(natural_prediction, natural_target),
        }
        history |= {f"{name}_kld": scores[name] for name in HELD_OUT}
        newest = Checkpoints(params, jnp.stack([scores[name] for name in HELD_OUT]), epoch + 1)
        better = newest.score < state.best.score

        def keep_better(new: jax.Array, old: jax.Array) -> jax.Array:
            return jnp.where(better.reshape(-1, *[1] * (old.ndim - 1)), new, old)

        first = configuration.epochs // 2
        share = jnp.where(epoch < first, 0.0, 1 / jnp.maximum(epoch - first + 1, 1))
        state = RunState(
            params=params,
            opt_state=opt_state,
            average=jax.tree.map(lambda a, p: a + share * (p - a), state.average, params),
            best=jax.tree.map(keep_better, newest, state.best),
        )
        return state, history

    def test(
        params: nnx.State, run: Run, arrays: _Arrays
    ) -> tuple[dict[str, jax.Array], jax.Array]:
        rows, mask = arrays.test[run.fold], arrays.test_mask[run.fold]
        prediction = predict(params, rows, arrays)
        values = measure(prediction, arrays.labels[rows], mask, head=arrays.head[run.fold])
        return values, prediction[:_SHOWN]

    @partial(jax.jit, donate_argnums=0, static_argnums=3)
    def advance(
        state: RunState, run: Run, first_epoch: jax.Array, length: int, arrays: _Arrays
    ) -> tuple[RunState, dict[str, jax.Array]]:
        epochs = first_epoch + jnp.arange(length)
        state, history = jax.lax.scan(partial(epoch_step, run=run, arrays=arrays), state, epochs)
        return state, history | {"test_kld": test(state.params, run, arrays)[0]["kld"]}

    @jax.jit
    def finish(state: RunState, run: Run, arrays: _Arrays) -> dict[str, Any]:
        others = jax.tree.map(lambda *leaves: jnp.stack(leaves), state.params, state.average)
        params, epoch = jax.tree.map(
            lambda *leaves: jnp.concatenate(leaves),
            (state.best.params, state.best.epoch),
            (others, jnp.full(2, configuration.epochs)),
        )
        # Mapped, so that testing is compiled once and not for every selection.
        measures, shown = jax.lax.map(lambda params: test(params, run, arrays), params)
        return {
            selection: jax.tree.map(
                lambda leaf, i=i: leaf[i],
                {"epoch": epoch, "measures": measures, "shown": shown},
            )
            for i, selection in enumerate((*HELD_OUT, "last", "average"))
        }

    @functools.cache
    def prepare(length: int) -> None:
        run = _run_of(0, 0, 0.0)
        state = jax.eval_shape(init, run)
        jobs = (
            lambda: advance.lower(state, run, jnp.int32(0), length, arrays).compile(),
            lambda: init.lower(run).compile(),
            lambda: finish.lower(state, run, arrays).compile(),
        )
        with ThreadPoolExecutor() as pool:
            for done in [pool.submit(job) for job in jobs]:
                done.result()

    return Program(
        prepare=prepare,
        init=init,
        advance=lambda state, run, first, length: advance(state, run, first, length, arrays),
        finish=lambda state, run: finish(state, run, arrays),
    )


_SHOWN = 6
"""How many predictions of a test fold are kept for the picture."""


def _diagnostics(opt_state: optax.OptState) -> dict[str, jax.Array]:
    """What `gdmam_jax.diagnostics` finds, mean over the scopes where there are several."""
    try:
        found = gdmam.diagnostics(opt_state)
    except ValueError:  # the method is no GDMAM: it has none
        return {}
    names = dict.fromkeys(key.rsplit("/", 1)[-1] for key in found)
    return {
        name: jnp.mean(jnp.stack([v for key, v in found.items() if key.rsplit("/", 1)[-1] == name]))
        for name in names
    }


def _in_order(
    loss: Callable[..., jax.Array],
    arrays: _Arrays,
    fold: jax.Array,
    logits: jax.Array,
    target: jax.Array,
    weights: jax.Array | None,
) -> jax.Array:
    return loss(logits, target, arrays.frequency[fold], arrays.train_mask[fold].sum(), weights)


Progress = Callable[[str, int, int], None]
"""Told `(method's label, epochs done, epochs in all)` after every chunk, and of what was done."""


class Trained(NamedTuple):
    """What came of some runs.

    Attributes:
        history: by name, shape (runs, epochs), but (runs, chunks) for `test_kld`, the KLD on the
            test fold at each chunk's end.
        results: by selection, see `SELECTIONS`: `epoch`, shape (runs,), `measures` by name, shape
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
    folder: Path | None = None,
    checkpoint_seconds: float = 60.0,
    progress: Callable[[int], None] | None = None,
) -> Trained:
    """Train and test the runs of all folds, from the last checkpoint if there is one.

    Folds are trained in threads, which do not see JAX's settings by context manager, such as `with
    jax.default_matmul_precision(...)`; those by `jax.config.update` they do.

    Args:
        program: from `build`.
        seed: of the runs.
        learning_rate: of the runs.
        configuration: the same as `build`'s.
        folder: for checkpoints, after every quarter of the epochs; None keeps none.
        checkpoint_seconds: most time between two checkpoints, up to a chunk.
        progress: told the number of epochs done after every chunk, and at a checkpoint restored.

    Returns:
        A `Trained` of as many runs as there are folds.
    """
    program.prepare(min(configuration.chunk, configuration.epochs))
    runs = [_run_of(fold, seed, learning_rate) for fold in range(configuration.folds)]
    restored = storage.restore(folder) if folder else None
    if restored is None:
        epoch, states, chunks = 0, _at_once(program.init, runs), []
    else:
        epoch, leaves, history = restored
        states, chunks = _unstack(leaves, jax.eval_shape(program.init, runs[0]), folder), [history]
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


def _run_of(fold: int, seed: int, learning_rate: float) -> Run:
    return Run(jnp.int32(fold), jnp.int32(seed), jnp.float32(learning_rate))


def processors() -> int:
    """How many processors this process may use."""
    available = getattr(os, "sched_getaffinity", None)
    return len(available(0)) if available else os.cpu_count() or 1


def _workers() -> list[Any]:
    """The devices that train a run each, None for the default one: a CPU's, once a processor."""
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
    return jax.tree.map(lambda *leaves: np.stack(leaves), *runs)


def _unstack(leaves: Sequence[NDArray[Any]], like: RunState, folder: Path | None) -> list[RunState]:
    expected, structure = jax.tree.flatten(like)
    if [leaf.shape[1:] for leaf in leaves] != [leaf.shape for leaf in expected]:
        raise ValueError(f"{folder} holds a checkpoint of another method or version: remove it")
    # A dtype that NumPy does not know, such as bfloat16, is stored as plain bytes.
    typed = [leaf.view(to.dtype) for leaf, to in zip(leaves, expected, strict=True)]
    return [
        jax.tree.unflatten(structure, [jnp.array(leaf[run]) for leaf in typed])
        for run in range(len(leaves[0]))
    ]


def _join(chunks: Sequence[dict[str, NDArray[Any]]]) -> dict[str, NDArray[Any]]:
    return {name: np.concatenate([chunk[name] for chunk in chunks], 1) for name in chunks[0]}


def _train_once(
    program: Program,
    seed: int,
    learning_rate: float,
    configuration: Configuration,
    *,
    folder: Path | None,
    progress: Callable[[int], None] | None,
    **kwargs: Any,
) -> Trained:
    """`train`, unless its outcome lies beside `folder` already."""
    kwargs |= {"folder": folder, "progress": progress}
    if folder is None:
        return train(program, seed, learning_rate, configuration, **kwargs)
    outcome = folder.with_name(f"{folder.name}.npz")
    if outcome.is_file():
        if progress:
            progress(configuration.epochs)
        with np.load(outcome, allow_pickle=False) as stored:
            return Trained(**flax.traverse_util.unflatten_dict(dict(stored), sep="/"))
    trained = train(program, seed, learning_rate, configuration, **kwargs)
    flat = flax.traverse_util.flatten_dict(trained._asdict(), sep="/")
    storage.write_npz(outcome, flat)
    shutil.rmtree(folder, ignore_errors=True)
    return trained


def run(
    dataset: Dataset,
    methods: Sequence[Method],
    configuration: Configuration,
    *,
    folder: str | os.PathLike[str] | None = None,
    checkpoint_seconds: float = 60.0,
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """Run an experiment: tune, train and test every method on a data set's folds.

    Folds are trained in threads, see `train`.

    Args:
        dataset: a `Dataset`.
        methods: which, see `methods.METHODS`.
        configuration: what they have in common.
        folder: for results, `METHOD.json` and `METHOD.npz` (curves; `tuning_validation_kld` and
            `tuning_natural_kld` of every learning rate tried), and checkpoints. A method whose
            results are there is not run again; one that was broken off goes on at its last
            checkpoint, with the same numbers. A method is known by its name: one whose optimizer
            or losses you have changed needs another name, or another folder. Beside them
            lie the trivial predictions of `baselines.BASELINES`. None writes nothing.
        checkpoint_seconds: see `train`.
        progress: see `Progress`.

    Returns:
        For every method what `METHOD.json` holds: `method`, `label`, `data`, `configuration`,
        `versions`, `tuning` (by learning rate the KLD on `validation` and `natural` rows, mean over
        the epochs), `learning_rate`, `seconds`, and `runs`: a list of `fold`, `seed`, and by
        selection `epoch` and the measures.

    Raises:
        ValueError: the folder holds results or checkpoints of another configuration or data set.
        OSError: the folder cannot be written, or another run writes to it.

    Warns:
        UserWarning: the training folds are not made imbalanced.
    """
    prepared = make_folds(
        dataset, folds=configuration.folds, validation_size=configuration.validation_size
    )
    if np.array_equal(prepared.natural, prepared.validation):
        warnings.warn(
            f"{dataset.name} is not made imbalanced: training folds keep all rows, or nearly all, "
            "and natural rows are the validation rows; give it a sampler",
            stacklevel=2,
        )
    facts = _facts(dataset, prepared, configuration)
    common = prepared, configuration, facts
    if folder is None:
        return [
            _run_method(method, *common, None, checkpoint_seconds, progress) for method in methods
        ]
    home = Path(folder)
    with storage.locked(home):
        done = _finished(home, facts)
        for name, values in baselines.score(prepared).items():
            storage.write_json(home / f"{name}.json", _baseline_record(name, values, facts))
        if progress:
            for method in methods:
                if method.name in done:
                    progress(method.label, work(configuration), work(configuration))
        return [
            done.get(method.name)
            or _run_method(method, *common, home, checkpoint_seconds, progress)
            for method in methods
        ]


def work(configuration: Configuration) -> int:
    """Epochs that a method trains for in all, those that tune included.

    >>> work(Configuration(epochs=300, seeds=5))
    1500
    """
    rates = len(set(configuration.learning_rates))
    return (configuration.seeds + (rates - 1) * configuration.tuning_seeds) * configuration.epochs


def _facts(dataset: Dataset, folds: Folds, configuration: Configuration) -> dict[str, Any]:
    """What all methods of an experiment have in common."""
    training = [rows[mask] for rows, mask in zip(folds.train, folds.train_mask, strict=True)]
    factors = [imbalance_statistics(folds.labels[rows]).factor for rows in training]
    facts = {
        "data": {
            "name": dataset.name,
            "samples": len(dataset.features),
            "features": dataset.features.shape[1],
            "labels": list(dataset.label_names),
            "training_rows": [len(rows) for rows in training],
            "imbalance_factor": float(np.mean(factors)),
            "checksum": _checksum(folds),
        },
        "configuration": dataclasses.asdict(configuration),
    }
    return json.loads(json.dumps(facts))  # tuples become the lists that are read from a file


def _finished(home: Path, facts: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The records in a folder by method, all of which must have the same facts."""
    done = {}
    for path in sorted([*home.glob("*.json"), *home.glob("*.work/facts.json")]):
        found = json.loads(path.read_text())
        for key in ("configuration", "data"):
            if found.get(key, facts[key]) != facts[key]:
                raise ValueError(
                    f"{path} holds results of another {key}: {found[key]}, "
                    f"now {facts[key]}; give another folder, or remove it"
                )
        if "runs" in found:
            done[found["method"]] = found
    return done


def _baseline_record(
    name: str, values: dict[str, NDArray[np.float32]], facts: dict[str, Any]
) -> dict[str, Any]:
    measured = [
        {measure: float(value[fold]) for measure, value in values.items()}
        for fold in range(len(values["kld"]))
    ]
    return {
        "method": name,
        "label": baselines.BASELINES[name],
        "trivial": True,
        **facts,
        "runs": [
            {"fold": i, "seed": 0, "selections": {s: {"epoch": 0} | found for s in SELECTIONS}}
            for i, found in enumerate(measured)
        ],
    }


def _checksum(folds: Folds) -> str:
    """Of every number that a run sees of the data, and of the rows that each fold has."""
    digest = hashlib.sha256()
    for field in dataclasses.fields(folds):
        digest.update(np.ascontiguousarray(getattr(folds, field.name)).tobytes())
    return digest.hexdigest()


def _run_method(
    method: Method,
    folds: Folds,
    configuration: Configuration,
    facts: dict[str, Any],
    home: Path | None,
    checkpoint_seconds: float,
    progress: Progress | None,
) -> dict[str, Any]:
    started = time.monotonic()
    program = build(method, folds, configuration)
    work = None if home is None else home / f"{method.name}.work"
    if work is not None:
        work.mkdir(exist_ok=True)
        storage.write_json(work / "facts.json", facts)
    rates, seeds = configuration.learning_rates, range(configuration.seeds)
    tuned = [(r, s) for r in rates for s in seeds[: configuration.tuning_seeds] if len(rates) > 1]
    groups: dict[tuple[float, int], Trained] = {}

    def train_groups(keys: Sequence[tuple[float, int]]) -> list[Trained]:
        for rate, seed in keys:
            if (rate, seed) in groups:
                continue
            groups[rate, seed] = _train_once(
                program,
                seed,
                rate,
                configuration,
                folder=work and work / f"{rate:g}-{seed}",
                checkpoint_seconds=checkpoint_seconds,
                progress=progress
                and partial(_advanced, progress, method.label, len(groups), configuration),
            )
        return [groups[key] for key in keys]

    train_groups(tuned)
    curves = {
        rows: {
            r: _tuning_curves(rows, [groups[k] for k in tuned if k[0] == r]) for r in dict(tuned)
        }
        for rows in ("validation", "natural")
    }
    tuning = {
        r: {rows: float(found[r].mean()) for rows, found in curves.items()} for r in dict(tuned)
    }
    rate = min(tuning, key=lambda rate: tuning[rate][configuration.tuning], default=rates[0])
    trained = train_groups([(rate, seed) for seed in seeds])
    history, results = jax.tree.map(lambda *leaves: np.concatenate(leaves), *trained)
    record = {
        "method": method.name,
        "label": method.label,
        **facts,
        "versions": versions(),
        "tuning": {f"{rate:g}": scores for rate, scores in tuning.items()},
        "learning_rate": rate,
        "seconds": time.monotonic() - started,
        "runs": [
            {
                "fold": i % configuration.folds,
                "seed": i // configuration.folds,
                "selections": {
                    selection: {"epoch": int(values["epoch"][i])}
                    | {name: float(value[i]) for name, value in values["measures"].items()}
                    for selection, values in results.items()
                },
            }
            for i in range(configuration.folds * configuration.seeds)
        ],
    }
    if home is not None and work is not None:
        shown = {f"shown_{name}": values["shown"] for name, values in results.items()}
        tried = {
            f"tuning_{rows}_kld": np.stack(list(found.values()))
            for rows, found in curves.items()
            if found
        }
        true = np.tile(folds.labels[folds.test[:, :_SHOWN]], (configuration.seeds, 1, 1))
        storage.write_npz(
            home / f"{method.name}.npz", history | shown | tried | {"shown_true": true}
        )
        storage.write_json(home / f"{method.name}.json", record)
        shutil.rmtree(work, ignore_errors=True)
    return record


def _tuning_curves(rows: str, groups: Sequence[Trained]) -> NDArray[Any]:
    """KLD at one learning rate, shape (runs, epochs)."""
    found = np.concatenate([group.history[f"{rows}_kld"] for group in groups])
    return np.nan_to_num(found, nan=np.inf)  # a run that diverges counts as infinitely bad


def _advanced(
    progress: Progress,
    label: str,
    groups: int,
    configuration: Configuration,
    epoch: int,
) -> None:
    progress(label, groups * configuration.epochs + epoch, work(configuration))


def versions() -> dict[str, str]:
    """The versions a result was made with: Python, the package's and those it rests on.

    >>> sorted(versions())
    ['flax', 'gdmam-jax', 'jax', 'numpy', 'optax', 'python']
    """
    found = {"python": platform.python_version()}
    for name in ("gdmam-jax", "jax", "flax", "optax", "numpy"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:  # run from the source folder
            found[name] = "source"
    return found
