"""Several tasks on a shared trunk, by how far each method is from one network for each task.

Multi-task learning reports the *relative change* to single-task training in percent, the mean over
tasks t and their measures m,

    delta m = 100 / (T M) sum (-1)^(more is better) (M - M_single) / M_single,

so that below 0 is better than single tasks.
The methods of this library, of TorchJD and, if it is installed, of LibMTL get the same data,
first parameters and batches. ``pip install --no-deps LibMTL`` is enough: it needs torch and SciPy.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_breast_cancer

import gdmam_jax as gdmam
from benchmarks import timing
from benchmarks.kinds import images, networks, pytorch

BATCH, WIDTH = 64, 64
SINGLE = "single tasks"


class Tasks(NamedTuple):
    """Tasks that share their inputs, each with one measure.

    Attributes:
      title: in words.
      names: of the tasks.
      classes: how many a task's targets have; 0 where they are numbers.
      training: inputs, shape ``(n, d)``, and targets, ``(n, tasks)``.
      test: likewise.
    """

    title: str
    names: tuple[str, ...]
    classes: int
    training: tuple[jax.Array, jax.Array]
    test: tuple[jax.Array, jax.Array]


def two_digits() -> Tasks:
    """Multi-MNIST's construction from scikit-learn's digits: one laid over another, both read."""
    training, (_, test) = images.digits()
    parts = []
    for number, (part, count) in enumerate(((training, 4000), (test, 2000))):
        pixels, *labels = images.pairs(part, jax.random.key(number), count)
        parts.append((pixels, jnp.stack(labels, axis=1)))
    return Tasks("two digits", ("upper left", "lower right"), 10, *parts)


def tumours() -> Tasks:
    """Ten properties at once, as with QM9's molecules: here of the largest cells of 569 tumours.

    They are predicted from means and errors over all of a tumour's cells, in standard deviations.
    """
    data = load_breast_cancer()
    order = np.random.default_rng(0).permutation(len(data.data))
    cut = 400
    values = data.data[order]
    values = jnp.asarray((values - values[:cut].mean(0)) / values[:cut].std(0), jnp.float32)
    parts = [(part[:, :20], part[:, 20:]) for part in (values[:cut], values[cut:])]
    return Tasks("ten properties", tuple(map(str, data.feature_names[20:])), 0, *parts)


PROBLEMS: dict[str, Callable[[], Tasks]] = {"two-digits": two_digits, "tumours": tumours}


def init(tasks: Tasks, seed: int) -> dict[str, networks.Layers]:
    """A trunk and, by number, a head for each task."""
    heads = {f"head{k}": (WIDTH, tasks.classes or 1) for k in range(len(tasks.names))}
    inputs = tasks.training[0].shape[1]
    return networks.several(jax.random.key(seed), trunk=(inputs, WIDTH, WIDTH), **heads)


def batches(tasks: Tasks, seed: int, steps: int) -> jax.Array:
    """Rows of the training data, shape ``(steps, BATCH)``."""
    rows = len(tasks.training[0])
    return jax.random.randint(jax.random.key(1000 + seed), (steps, BATCH), 0, rows)


def outputs(params: Any, inputs: jax.Array, copies: Any = None) -> list[jax.Array]:
    """The outputs of all heads; ``copies`` makes a copy of the features for each head."""
    count = len(params) - 1
    features = networks.apply(params["trunk"], inputs, last=True)
    each = [features] * count if copies is None else copies(features, count)
    return [networks.apply(params[f"head{k}"], found) for k, found in enumerate(each)]


def losses(tasks: Tasks, params: Any, inputs: Any, targets: Any, copies: Any = None) -> Any:
    """Cross-entropy or squared error of each task, as prediction and alignment losses."""
    found = []
    for k, output in enumerate(outputs(params, inputs, copies)):
        if tasks.classes:
            found.append(networks.cross_entropy(output, targets[:, k]))
        else:
            found.append(jnp.mean((output[:, 0] - targets[:, k]) ** 2))
    return found[0], tuple(found[1:])


def measures(tasks: Tasks, params: Any) -> jax.Array:
    """Each task's accuracy or mean absolute error on test data."""
    inputs, targets = tasks.test
    found = jnp.stack(outputs(params, inputs), axis=1)
    if tasks.classes:
        return jnp.mean(jnp.argmax(found, axis=-1) == targets, axis=0)
    return jnp.mean(jnp.abs(found[..., 0] - targets), axis=0)


def delta_m(found: np.ndarray, single: np.ndarray, higher: bool) -> np.ndarray:
    """The relative change to single tasks in percent, see above; the last axis is the tasks'."""
    change = 100 * (found - single) / single
    return np.mean(-change if higher else change, axis=-1)


def _weighed(weighting: Any) -> Callable[[Any, int], Any]:
    """Adam behind a weighting of the trunk's gradients, as the field does; heads keep their own.

    A weighting that looks at the losses' values weighs the losses, for trunk and heads. MGDA cannot
    be used: in the scope of a head the other losses' gradients are 0, and so is the shortest
    combination.
    """
    whole = isinstance(weighting, gdmam.RememberingWeighting)
    scope = None if whole else lambda path: path.split("/")[0]

    def make(rate: Any, others: int) -> Any:
        adam = optax.adam(rate)
        return gdmam.weighed(adam, weighting, alignment_losses=others, scope=scope)

    return make


VALUED = {
    "FAMO": gdmam.famo_weighting(),
    "uncertainty": gdmam.uncertainty_weighting(),
    "DWA": gdmam.dwa_weighting(every=25),
}
"""Weightings that look at the losses' values."""
METHODS: dict[str, Callable[[Any, int], Any]] = {
    "equal weights": _weighed(gdmam.sum_weighting),
    "gdmam": lambda rate, others: gdmam.gdmam(rate, alignment_losses=others, weight_decay=0.0),
    "fork": lambda rate, others: optax.adam(rate),
    "PCGrad": _weighed(gdmam.pcgrad_weighting),
    "UPGrad": _weighed(gdmam.upgrad_weighting),
    "IMTL-G": _weighed(gdmam.imtl_g_weighting),
    "Nash-MTL": _weighed(gdmam.nash_mtl_weighting),
    "CAGrad": _weighed(gdmam.cagrad_weighting),
    "Aligned-MTL": _weighed(gdmam.aligned_mtl_weighting),
    **{name: _weighed(weighting) for name, weighting in VALUED.items()},
}


def train(name: str, tasks: Tasks, seeds: int, steps: int, rate: float) -> np.ndarray:
    """The measures of a method of `METHODS`, or of one network a task; ``(seeds, tasks)``."""
    count = len(tasks.names)
    start = jax.tree.map(lambda *each: jnp.stack(each), *(init(tasks, s) for s in range(seeds)))
    rows = jnp.stack([batches(tasks, seed, steps) for seed in range(seeds)])
    falling = optax.cosine_decay_schedule(rate, steps)

    def run(params: Any, rows: jax.Array, weights: jax.Array) -> jax.Array:
        if name == SINGLE:
            optimizer = _weighed(gdmam.constant_weighting(*weights))(falling, count - 1)
        else:
            optimizer = METHODS[name](falling, count - 1)

        def step(carry: Any, chosen: jax.Array) -> tuple[Any, None]:
            params, state = carry
            batch = tuple(array[chosen] for array in tasks.training)
            if name == "fork":
                gradient = jax.grad(lambda p: sum(jax.tree.leaves(forked(p, *batch))))(params)
                updates, state = optimizer.update(gradient, state, params)
            else:
                of_params = functools.partial(losses, tasks)
                values, pairs = gdmam.value_and_paired_grad(of_params)(params, *batch)
                given = {"value": values} if name in VALUED else {}
                updates, state = optimizer.update(pairs, state, params, **given)
            return (optax.apply_updates(params, updates), state), None

        (params, _), _ = jax.lax.scan(step, (params, optimizer.init(params)), rows)
        return measures(tasks, params)

    forked = functools.partial(losses, tasks, copies=gdmam.fork)
    over_seeds = jax.vmap(run, in_axes=(0, 0, None))
    if name != SINGLE:
        return np.asarray(jax.jit(over_seeds)(start, rows, jnp.ones(count)))
    found = jax.jit(jax.vmap(over_seeds, in_axes=(None, None, 0)))(start, rows, jnp.eye(count))
    return np.asarray(jnp.diagonal(found, axis1=0, axis2=2))


def train_torch(
    make: Callable[[Any], Any], tasks: Tasks, seeds: int, steps: int, rate: float
) -> np.ndarray:
    """The same by a method of `pytorch.TORCHJD` or `pytorch.LIBMTL`."""
    found = []
    for seed in range(seeds):
        pytorch.seed(seed)
        rows = batches(tasks, seed, steps)
        trained = pytorch.train(make(init(tasks, seed)), rows, tasks.training, tasks.classes, rate)
        found.append(measures(tasks, trained))
    return np.stack(found)


def ways() -> list[tuple[str, str, Callable[..., np.ndarray]]]:
    """Library, method and what trains by it, single tasks first."""
    found = [("gdmam_jax", name, functools.partial(train, name)) for name in (SINGLE, *METHODS)]
    others = {"TorchJD": pytorch.TORCHJD, "LibMTL": pytorch.LIBMTL}
    if not pytorch.libmtl_is_installed():
        del others["LibMTL"]
    for library, methods in others.items():
        found += [
            (library, name, functools.partial(train_torch, make)) for name, make in methods.items()
        ]
    return found


def benchmark(problems: Sequence[str], seeds: int, steps: int, rate: float) -> list[dict[str, Any]]:
    """A row for each problem and method: delta m over the seeds, and the tasks' mean measure.

    Args:
      problems: some of `PROBLEMS`.
      seeds: of parameters and batches.
      steps: of each training.
      rate: of Adam for all, at the start; it falls along half a cosine.
    """
    rows = []
    for problem, (library, name, trainer) in timing.tracked(
        "trainings", list(itertools.product(problems, ways()))
    ):
        tasks = PROBLEMS[problem]()
        found = trainer(tasks, seeds, steps, rate)
        if name == SINGLE:
            single = found.mean(axis=0)
        deltas = delta_m(found, single, higher=bool(tasks.classes))
        low, median, high = np.percentile(deltas, (0, 50, 100))
        rows.append(
            {
                "problem": tasks.title,
                "library": library,
                "method": name,
                "delta m, %": f"{median:.1f} ({low:.1f} to {high:.1f})",
                "mean measure": float(found.mean()),
            }
        )
    return rows
