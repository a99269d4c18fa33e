"""A method on a data set's folds, compiled.

A *run* is one model: a fold, a seed, a learning rate and a setting, all of them traced, so that
one compiled program trains every run of a method, and of methods that differ by a setting only.
"""

import dataclasses
import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.flatten_util import ravel_pytree

import gdmam_jax as gdmam
from gdmam_jax.ldl import losses
from gdmam_jax.ldl.data import Folds
from gdmam_jax.ldl.laboratory import baselines
from gdmam_jax.ldl.laboratory.methods import Method
from gdmam_jax.ldl.laboratory.protocol import HELD_OUT, Configuration
from gdmam_jax.ldl.measures import measure
from gdmam_jax.ldl.models import RDA, draw_noise, rda_losses

SHOWN = 6
"""How many predictions of a test fold are kept for the picture."""


class Run(NamedTuple):
    """What distinguishes a run from others, all scalars."""

    fold: jax.Array
    seed: jax.Array
    learning_rate: jax.Array
    setting: jax.Array


class Checkpoints(NamedTuple):
    """The best parameters so far by each score of `HELD_OUT`, stacked, with scores and epochs."""

    params: jax.Array
    score: jax.Array
    epoch: jax.Array


class RunState(NamedTuple):
    """What a run carries from epoch to epoch; parameters are one vector."""

    params: jax.Array
    opt_state: optax.OptState
    average: jax.Array
    best: Checkpoints


class Program(NamedTuple):
    """A method on a data set, compiled: functions of one run.

    Attributes:
      prepare: `number_of_epochs -> None`: compiles the others side by side, instead of one
        after the other at their first calls; for the default device.
      init: `run -> state`.
      advance: `(state, run, first_epoch, number_of_epochs) -> (state, history)`.
      finish: `(state, run) -> results` by selection.
    """

    prepare: Callable[[int], None]
    init: Callable[[Run], RunState]
    advance: Callable[[RunState, Run, jax.Array, int], tuple[RunState, dict[str, jax.Array]]]
    finish: Callable[[RunState, Run], dict[str, Any]]


class Arrays(NamedTuple):
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


def arrays_of(folds: Folds) -> Arrays:
    """`Folds` on the device."""
    frequency, head = baselines.frequency_and_head(folds)
    values = {f.name: getattr(folds, f.name) for f in dataclasses.fields(folds)}
    return Arrays(**jax.tree.map(jnp.asarray, values | {"frequency": frequency, "head": head}))


def run_of(fold: int, seed: int, learning_rate: float, setting: float = 0.0) -> Run:
    """A `Run` from Python numbers."""
    numbers = jnp.float32(learning_rate), jnp.float32(setting)
    return Run(jnp.int32(fold), jnp.int32(seed), *numbers)


def _run_key(run: Run) -> jax.Array:
    return jax.random.fold_in(jax.random.key(run.seed), run.fold)


@dataclasses.dataclass(frozen=True)
class _Model:
    """RDA on data of these widths: what does not depend on the method, compiled once for all."""

    num_features: int
    num_labels: int
    configuration: Configuration

    def make(self, key: jax.Array) -> RDA:
        return RDA(
            self.num_features,
            self.num_labels,
            self.configuration.hidden,
            rngs=nnx.Rngs(key),
            log_variance_bound=self.configuration.log_variance_bound,
        )

    @functools.cached_property
    def split(self) -> tuple[nnx.GraphDef[RDA], Callable[[jax.Array], nnx.State]]:
        """The model without its parameters, and a function from a vector to them."""
        graph, state = nnx.split(nnx.eval_shape(lambda: self.make(jax.random.key(0))))
        zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), state)
        return graph, ravel_pytree(zeros)[1]

    def tree(self, params: jax.Array) -> nnx.State:
        return self.split[1](params)

    def merge(self, params: jax.Array) -> RDA:
        return nnx.merge(self.split[0], self.tree(params))

    @partial(jax.jit, static_argnums=0)
    def init(self, run: Run) -> jax.Array:
        key = jax.random.fold_in(_run_key(run), self.configuration.epochs)
        return ravel_pytree(nnx.state(self.make(key)))[0]

    def predict(self, params: jax.Array, rows: jax.Array, arrays: Arrays) -> jax.Array:
        return jax.nn.softmax(self.merge(params)(arrays.features[rows]))

    def held_out(self, params: jax.Array, run: Run, arrays: Arrays) -> jax.Array:
        """The KLDs of `HELD_OUT`, in order."""
        rows = jnp.stack([arrays.validation[run.fold], arrays.natural[run.fold]])
        target, natural_target = arrays.labels[rows]
        prediction, natural_prediction = self.predict(params, rows, arrays)
        rarity = (target / arrays.frequency[run.fold]).sum(1)
        return jnp.stack(
            [
                losses.kullback_leibler(prediction, target),
                losses.kullback_leibler(prediction, target, rarity),
                losses.kullback_leibler(natural_prediction, natural_target),
            ]
        )

    def test(
        self, params: jax.Array, run: Run, arrays: Arrays
    ) -> tuple[dict[str, jax.Array], jax.Array]:
        rows, mask = arrays.test[run.fold], arrays.test_mask[run.fold]
        prediction = self.predict(params, rows, arrays)
        values = measure(prediction, arrays.labels[rows], mask, head=arrays.head[run.fold])
        return values, prediction[:SHOWN]

    @partial(jax.jit, static_argnums=0)
    def finish(
        self,
        params: jax.Array,
        average: jax.Array,
        best: Checkpoints,
        run: Run,
        arrays: Arrays,
    ) -> dict[str, Any]:
        last = jnp.full(2, self.configuration.epochs)
        tested = jnp.concatenate([best.params, params[None], average[None]])

        # Mapped, so that testing is compiled once and not for every selection.
        scores, (measures, shown) = jax.lax.map(
            lambda params: (self.held_out(params, run, arrays), self.test(params, run, arrays)),
            tested,
        )
        found = {
            "epoch": jnp.concatenate([best.epoch, last]),
            "held_out": {name: scores[:, i] for i, name in enumerate(HELD_OUT)},
            "measures": measures,
            "shown": shown,
        }
        return {
            selection: jax.tree.map(lambda leaf, i=i: leaf[i], found)
            for i, selection in enumerate((*HELD_OUT, "last", "average"))
        }


@dataclasses.dataclass(frozen=True, eq=False)
class _Loop:
    """The training of a `_Model` by a method."""

    model: _Model
    method: Method
    batch_size: int
    num_batches: int

    def optimizer(self, run: Run) -> optax.GradientTransformationExtraArgs:
        """The method's optimizer, for a pair of vectors."""
        setting = (run.setting,) if self.method.settings else ()
        inner = optax.with_extra_args_support(self.method.optimizer(run.learning_rate, *setting))
        tree = self.model.tree
        if self.method.flat:
            return inner

        def update(pair: gdmam.GradientPair, state: Any, params: jax.Array, **extra: Any) -> Any:
            pairs = gdmam.pair_gradients(tree(pair.prediction), tree(pair.alignment))
            updates, state = inner.update(pairs, state, tree(params), **extra)
            return ravel_pytree(updates)[0], state

        init = lambda params: inner.init(tree(params))  # noqa: E731
        return optax.GradientTransformationExtraArgs(init, update)

    @partial(jax.jit, static_argnums=0)
    def init(self, params: jax.Array, run: Run) -> RunState:
        scores = len(HELD_OUT)
        return RunState(
            params=params,
            opt_state=self.optimizer(run).init(params),
            average=jnp.zeros_like(params),
            best=Checkpoints(
                params=jnp.stack([params] * scores),
                score=jnp.full(scores, jnp.inf, jnp.float32),
                epoch=jnp.zeros(scores, jnp.int32),
            ),
        )

    def losses(
        self, params: jax.Array, batch: tuple[jax.Array, ...], run: Run, arrays: Arrays
    ) -> tuple[jax.Array, jax.Array]:
        rows, mask, noise = batch
        model, method = self.model.merge(params), self.method
        x, y, weights = arrays.features[rows], arrays.labels[rows], mask.astype(jnp.float32)

        def prediction_loss(
            logits: jax.Array, target: jax.Array, weights: jax.Array | None
        ) -> jax.Array:
            count = arrays.train_mask[run.fold].sum()
            return method.prediction_loss(
                logits, target, arrays.frequency[run.fold], count, weights
            )

        if not method.alignment:
            return prediction_loss(model(x), y, weights), jnp.zeros(())
        recovery, target, similarity = (
            self.model.configuration.alignment_weight * factor
            for factor in method.alignment_weights
        )
        return rda_losses(
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

    # Compiled, so that it is traced once, both for its shapes and for the loop.
    @partial(jax.jit, static_argnums=0)
    def step(
        self,
        state: tuple[jax.Array, optax.OptState],
        batch: tuple[jax.Array, ...],
        run: Run,
        arrays: Arrays,
    ) -> tuple[tuple[jax.Array, optax.OptState], dict[str, jax.Array]]:
        params, opt_state = state

        def objective(params: jax.Array) -> tuple[Any, Any]:
            pair = self.losses(params, batch, run, arrays)
            return self.method.rescale(*pair), pair

        (values, pair), pairs = gdmam.value_and_paired_grad(objective, has_aux=True)(params)
        updates, opt_state = self.optimizer(run).update(pairs, opt_state, params, value=values)
        history = dict(zip(("prediction_loss", "alignment_loss"), pair, strict=True))
        history |= _diagnostics(opt_state)
        return (optax.apply_updates(params, updates), opt_state), history

    def batches(self, epoch: jax.Array, run: Run, arrays: Arrays) -> tuple[jax.Array, ...]:
        """Rows, masks and noise of an epoch's batches."""
        order_key, noise_key = jax.random.split(jax.random.fold_in(_run_key(run), epoch))
        present, size = arrays.train_mask[run.fold], self.num_batches * self.batch_size
        order = jnp.argsort(jnp.where(present, jax.random.uniform(order_key, present.shape), 2.0))
        order = jnp.pad(order, (0, size - len(order)))
        rows = arrays.train[run.fold][order].reshape(self.num_batches, self.batch_size)
        mask = (jnp.arange(size) < present.sum()).reshape(rows.shape)

        # Noise is drawn here: inside `step`, XLA would draw it again wherever it is used.
        hidden = self.model.configuration.hidden
        draw = partial(draw_noise, num_samples=self.batch_size, hidden=hidden)
        return rows, mask, jax.lax.map(draw, jax.random.split(noise_key, self.num_batches))

    def epoch(
        self, state: RunState, epoch: jax.Array, run: Run, arrays: Arrays
    ) -> tuple[RunState, dict[str, jax.Array]]:
        batches = self.batches(epoch, run, arrays)

        def step(number: jax.Array, carry: Any) -> Any:
            state, total = carry
            batch = jax.tree.map(lambda leaf: leaf[number], batches)
            state, history = self.step(state, batch, run, arrays)
            return state, jax.tree.map(jnp.add, total, history)

        start = (state.params, state.opt_state)
        like = jax.eval_shape(
            lambda: self.step(start, jax.tree.map(lambda x: x[0], batches), run, arrays)[1]
        )
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), like)
        # Folds differ in size: each has as many batches as it needs.
        needed = -(-arrays.train_mask[run.fold].sum() // self.batch_size)
        (params, opt_state), total = jax.lax.fori_loop(0, needed, step, (start, zeros))
        history = jax.tree.map(lambda leaf: leaf / needed, total)
        scores = self.model.held_out(params, run, arrays)
        history |= {f"{name}_kld": scores[i] for i, name in enumerate(HELD_OUT)}
        first = self.model.configuration.epochs // 2
        share = jnp.where(epoch < first, 0.0, 1 / jnp.maximum(epoch - first + 1, 1))
        state = RunState(
            params=params,
            opt_state=opt_state,
            average=state.average + share * (params - state.average),
            best=_better(Checkpoints(params, scores, epoch + 1), state.best),
        )
        return state, history

    @partial(jax.jit, donate_argnums=1, static_argnums=(0, 4))
    def advance(
        self, state: RunState, run: Run, first_epoch: jax.Array, length: int, arrays: Arrays
    ) -> tuple[RunState, dict[str, jax.Array]]:
        epochs = first_epoch + jnp.arange(length)
        state, history = jax.lax.scan(partial(self.epoch, run=run, arrays=arrays), state, epochs)
        return state, history | {"test_kld": self.model.test(state.params, run, arrays)[0]["kld"]}


def _better(newest: Checkpoints, best: Checkpoints) -> Checkpoints:
    """The best so far by each score; the newest parameters are the same for all scores."""
    better = newest.score < best.score

    def keep(new: jax.Array, old: jax.Array) -> jax.Array:
        return jnp.where(better.reshape(-1, *[1] * (old.ndim - 1)), new, old)

    return jax.tree.map(keep, newest, best)


def build(method: Method, folds: Folds, configuration: Configuration) -> Program:
    """Compile a method on a data set's folds, lazily: at the first call of each function.

    Args:
      method: a `Method`.
      folds: from `data.make_folds`.
      configuration: a `Configuration`.

    Returns:
      A `Program`.
    """
    arrays = arrays_of(folds)
    model = _Model(folds.features.shape[1], folds.labels.shape[1], configuration)
    most = int(folds.train_mask.sum(1).max())
    batch_size = min(configuration.batch_size, most)
    loop = _Loop(model, method, batch_size, -(-most // batch_size))

    @functools.cache
    def prepare(length: int) -> None:
        run = run_of(0, 0, 0.0)
        params = jax.eval_shape(lambda: model.init(run))
        state = jax.eval_shape(lambda params: loop.init(params, run), params)
        rest = state.params, state.average, state.best
        jobs = (
            lambda: loop.advance.lower(loop, state, run, jnp.int32(0), length, arrays).compile(),
            lambda: model.init.lower(model, run).compile(),
            lambda: loop.init.lower(loop, params, run).compile(),
            lambda: model.finish.lower(model, *rest, run, arrays).compile(),
        )
        with ThreadPoolExecutor() as pool:
            for done in [pool.submit(job) for job in jobs]:
                done.result()

    return Program(
        prepare=prepare,
        init=lambda run: loop.init(model.init(run), run),
        advance=lambda state, run, first, length: loop.advance(state, run, first, length, arrays),
        finish=lambda state, run: model.finish(
            state.params, state.average, state.best, run, arrays
        ),
    )


def _diagnostics(opt_state: optax.OptState) -> dict[str, jax.Array]:
    """What `gdmam_jax.diagnostics` finds, mean over the scopes where there are several."""
    try:
        found = gdmam.diagnostics(opt_state)
    except ValueError:  # the method is not GDMAM: it has none
        return {}
    names = dict.fromkeys(key.rsplit("/", 1)[-1] for key in found)
    return {
        name: jnp.mean(jnp.stack([v for key, v in found.items() if key.rsplit("/", 1)[-1] == name]))
        for name in names
    }
