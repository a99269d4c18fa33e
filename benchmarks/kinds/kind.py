"""What a kind of problem is made of."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax


class Opponent(NamedTuple):
    """A network trained alongside the model on a loss of its own, such as a discriminator.

    Attributes:
      init: ``key -> params``.
      loss: ``(opponent's params, model's params, batch) -> loss``.
    """

    init: Callable[[jax.Array], Any]
    loss: Callable[[Any, Any, Any], jax.Array]


class Kind(NamedTuple):
    """Two losses, data and what the field measures.

    Attributes:
      title: in words.
      losses: what the prediction and the alignment loss are, in words.
      measure: what `score` is, in words.
      higher: whether a higher score is better.
      init: ``key -> params``.
      sample: ``(params, key) -> batch``, of the training data or of what a policy does.
      features: ``(params, batch) -> features``, what both losses share.
      prediction: ``(params, features, batch) -> loss``.
      alignment: likewise.
      score: ``(params, key, part) -> score`` on held-out data; ``part`` is 0, by which rates and
        factors are chosen, or 1, which is reported.
      steps: how many batches.
      rates: of Adam, to choose from.
      trunk: whether the features are those of a shared trunk with a head for each loss.
      epochs: updates on one batch.
      last: ``params -> array``, the last layer that both losses reach, for the norm ratio there.
      opponent: if there is one, features, prediction and alignment get its parameters along with
        the batch: ``(batch, opponent's params)``.
    """

    title: str
    losses: tuple[str, str]
    measure: str
    higher: bool
    init: Callable[[jax.Array], Any]
    sample: Callable[[Any, jax.Array], Any]
    features: Callable[[Any, Any], Any]
    prediction: Callable[[Any, Any, Any], jax.Array]
    alignment: Callable[[Any, Any, Any], jax.Array]
    score: Callable[[Any, jax.Array, int], jax.Array]
    steps: int = 1000
    rates: tuple[float, ...] = (1e-3, 1e-2)
    trunk: bool = False
    epochs: int = 1
    last: Callable[[Any], Any] | None = None
    opponent: Opponent | None = None
