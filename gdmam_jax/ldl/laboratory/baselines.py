"""Trivial predictions, which need no features: what a method has to beat to have learned."""

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from gdmam_jax.ldl import losses
from gdmam_jax.ldl.data import Folds
from gdmam_jax.ldl.imbalance import head_labels
from gdmam_jax.ldl.measures import measure

BASELINES = {
    "trivial-uniform": "Uniform",
    "trivial-mean": "Mean of the training fold",
    "trivial-untouched": "Mean of the untouched fold",
}
"""All of them, and their labels in tables. The last one knows what the sampler left out, which no
method does: it bounds what can be reached without features."""

ATTAINABLE = ("trivial-uniform", "trivial-mean")
"""Those that know no more than a method."""


def frequency_and_head(folds: Folds) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """How often each label occurs in every training fold, and which are head labels.

    Args:
      folds: a `Folds`.

    Returns:
      Two arrays of shape (folds, labels).
    """
    labels, masks = folds.labels[folds.train], folds.train_mask
    frequency = jax.vmap(losses.class_frequency)(jnp.asarray(labels), jnp.asarray(masks))
    # A label that never occurs has a frequency of 1, for losses that divide by it.
    totals = np.sum(labels * masks[..., None], axis=1)
    return np.asarray(frequency), np.stack([head_labels(row) for row in totals])


def predictions(folds: Folds) -> dict[str, NDArray[np.float32]]:
    """The label distribution that each of `BASELINES` predicts for every row of a test fold.

    Args:
      folds: a `Folds`.

    Returns:
      By name, shape (folds, labels).

    Examples:
      >>> from gdmam_jax import ldl
      >>> labels = [[1, 0], [1, 0], [0, 1], [0, 1]]
      >>> folds = ldl.make_folds(ldl.from_arrays([[1], [2], [3], [4]], labels), folds=2,
      ...                        validation_size=1)
      >>> predictions(folds)["trivial-untouched"].tolist()
      [[1.0, 0.0], [0.0, 1.0]]
    """
    labels = folds.labels
    training = [
        labels[rows[mask]] for rows, mask in zip(folds.train, folds.train_mask, strict=True)
    ]
    untouched = [
        np.delete(labels, rows[mask], 0)
        for rows, mask in zip(folds.test, folds.test_mask, strict=True)
    ]
    uniform = np.full((len(folds.test), labels.shape[1]), 1 / labels.shape[1], np.float32)
    means = (np.stack([part.mean(0) for part in parts]) for parts in (training, untouched))
    return dict(zip(BASELINES, (uniform, *means), strict=True))


def score(folds: Folds) -> dict[str, dict[str, NDArray[np.float32]]]:
    """Test every baseline on every fold.

    Args:
      folds: a `Folds`.

    Returns:
      By name and measure (see `measures.measure`), shape (folds,).
    """
    _, heads = frequency_and_head(folds)
    compiled = jax.jit(measure)
    found = {}
    for name, predicted in predictions(folds).items():
        tested = []
        for row, rows, mask, head in zip(
            predicted, folds.test, folds.test_mask, heads, strict=True
        ):
            target = folds.labels[rows]
            tested.append(compiled(np.broadcast_to(row, target.shape), target, mask, head=head))
        found[name] = jax.tree.map(lambda *values: np.array(values), *tested)
    return found
