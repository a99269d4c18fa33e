"""Making training sets imbalanced, and saying how imbalanced they are. Needs only NumPy."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Indices = NDArray[np.intp]


@dataclass(frozen=True)
class Thresholds:
    """The imbalanced label distribution papers' rule for which training rows to keep.

    With c labels, a row stays if its label `scarce` is below `scarce_limit / c` and its label
    `plenty` is above `plenty_limit / c`; for every label the one row in which it is largest
    stays too. A label that equals a limit is on either side of it, as its rounding to float32
    has it: so are two rows of Movie's first fold.

    Attributes:
      scarce_limit: a of the papers' (a, b, A, B).
      plenty_limit: b.
      scarce: A, a label's column.
      plenty: B, a label's column.
    """

    scarce_limit: float
    plenty_limit: float
    scarce: int
    plenty: int

    def __call__(self, labels: ArrayLike, seed: int = 0) -> Indices:
        """Rows to keep, ascending.

        Args:
          labels: shape (samples, labels), rows sum to 1.
          seed: unused, since the rule draws nothing; samplers share this signature.

        Returns:
          Row numbers, each once.

        Examples:
          >>> Thresholds(1, 2, scarce=1, plenty=0)([[0.9, 0.1], [1.0, 0.0], [0.2, 0.8]]).tolist()
          [1, 2]
        """
        labels = np.asarray(labels)
        count = labels.shape[1]
        keep = (labels[:, self.scarce] < self.scarce_limit / count) & (
            labels[:, self.plenty] > self.plenty_limit / count
        )
        return np.union1d(np.flatnonzero(keep), labels.argmax(0))


RELEASED_THRESHOLDS = {
    "Movie": Thresholds(1, 2, 2, 0),
    "SCUT_FBP": Thresholds(2, 0.1, 2, 4),
    "emotion6": Thresholds(0.8, 1, 3, 0),
    "Flickr": Thresholds(0.8, 1, 2, 4),
    "RAF_ML": Thresholds(5, 3.5, 2, 1),
    "Natural_Scene": Thresholds(5, 2, 0, 4),
}
"""The released code's thresholds by data set."""

ROWS = 100
"""Rows to keep by default: near the 105 to 166 that the released thresholds keep."""


@dataclass(frozen=True)
class FoundThresholds:
    r"""The papers' rule, with thresholds found in the data.

    As in the released thresholds, the most frequent label is to be scarce and the least frequent
    one plentiful. The thresholds $y_A < a$ and $y_B > b$ are chosen so that equally many rows pass
    each of them, and `size` rows pass both. The rows in which a label is largest are among these
    `size`, unless there are more labels.

    Attributes:
      size: rows to keep.
    """

    size: int

    def __call__(self, labels: ArrayLike, seed: int = 0) -> Indices:
        """Rows to keep, ascending.

        Args:
          labels: shape (samples, labels), rows sum to 1.
          seed: of the random order of rows that are equal in a label.

        Returns:
          `size` row numbers, each once.

        Raises:
          ValueError: if there are fewer rows than `size`.

        Examples:
          >>> FoundThresholds(3)([[0.9, 0.1], [0.8, 0.2], [0.7, 0.3], [0.6, 0.4]]).tolist()
          [0, 2, 3]
        """
        labels = np.asarray(labels, np.float64)
        _check_size(self.size, labels)
        frequency = labels.sum(0)
        chance = np.random.default_rng(seed).random(len(labels))
        scarce = np.lexsort((chance, labels[:, frequency.argmax()]))
        plenty = np.lexsort((chance, -labels[:, frequency.argmin()]))
        place = np.maximum(scarce.argsort(), plenty.argsort())
        place[labels.argmax(0)] = -1
        return np.sort(np.argsort(place, kind="stable")[: self.size])


def _check_size(size: int, labels: NDArray[np.float64]) -> None:
    if not 1 <= size <= len(labels):
        raise ValueError(f"cannot keep {size} of {len(labels)} rows: ask for 1 to {len(labels)}")


@dataclass(frozen=True)
class Factor:
    r"""A continuous sampler: it draws a subset that has the imbalance factor asked for.

    With the labels ordered by their mass in the whole set, a row's score is
    $s_i = \sum_j y_{ij} t_j$, where t falls evenly from 1 (the most frequent label) to -1. The
    `size` rows with the largest $\theta s_i + G_i$ stay, where $G_i$ is Gumbel noise. This is a
    draw without replacement with odds $e^{\theta s_i}$, uniform at $\theta = 0$. Bisection finds
    the $\theta$ at which the subset's imbalance factor, the largest label mass over the smallest,
    is the one asked for.

    Attributes:
      factor: the imbalance factor, at least 1.
      size: rows to keep.
      tolerance: how far off the factor may be, as a fraction of it.
    """

    factor: float
    size: int
    tolerance: float = 0.05

    def __call__(self, labels: ArrayLike, seed: int = 0) -> Indices:
        """Rows to keep, ascending.

        Args:
          labels: shape (samples, labels), rows sum to 1.
          seed: of the Gumbel noise.

        Returns:
          `size` row numbers, each once.

        Raises:
          ValueError: if there are fewer rows than `size`, or the factor cannot be met; the
            message says which factors can.

        Examples:
          >>> import numpy as np
          >>> labels = np.random.default_rng(0).dirichlet([1, 2, 3], 2000)
          >>> kept = Factor(10.0, 200)(labels)
          >>> abs(imbalance_statistics(labels[kept]).factor / 10 - 1) < 0.05
          True
        """
        labels = np.asarray(labels, np.float64)
        _check_size(self.size, labels)
        order = np.argsort(-labels.sum(0), kind="stable")
        profile = np.empty(labels.shape[1])
        profile[order] = np.linspace(1, -1, labels.shape[1])
        score = labels @ profile
        score = (score - score.mean()) / max(float(score.std()), 1e-12)
        gumbel = np.random.default_rng(seed).gumbel(size=len(labels))

        def draw(strength: float) -> Indices:
            return np.sort(np.argsort(-(strength * score + gumbel), kind="stable")[: self.size])

        def factor(strength: float) -> float:
            return imbalance_statistics(labels[draw(strength)]).factor

        tried = np.linspace(-8, 64, 145)
        factors = np.array([factor(strength) for strength in tried])
        # The factor is 1 at least where two labels trade places, and rises from there.
        lowest = int(factors.argmin())
        above = np.flatnonzero(factors[lowest:] >= self.factor)
        if factors[lowest] <= self.factor and len(above):
            high = tried[lowest + above[0]]
            low = tried[max(lowest + above[0] - 1, lowest)]
            for _ in range(40):
                middle = (low + high) / 2
                low, high = (middle, high) if factor(middle) < self.factor else (low, middle)
            strength = min((low, high), key=lambda value: abs(factor(value) / self.factor - 1))
        else:
            strength = tried[np.abs(factors / self.factor - 1).argmin()]
        nearest = factor(strength)
        if abs(nearest / self.factor - 1) > self.tolerance:
            raise ValueError(
                f"no {self.size} rows with an imbalance factor of {self.factor:g} were found: "
                f"the nearest is {nearest:.3g}, of those from {factors.min():.3g} to "
                f"{factors.max():.3g}; ask for that, or another number of rows"
            )
        return draw(strength)


@dataclass(frozen=True)
class ImbalanceStatistics:
    """How a set of label distributions spreads over its labels.

    Attributes:
      frequency: sum of each label over the rows, shape (labels,).
      factor: largest frequency over smallest; infinite if a label never occurs.
      entropy: of the normalised frequencies, over its maximum log(labels): 1 is balanced.
      gini: Gini coefficient of the frequencies, 0 is balanced.
    """

    frequency: NDArray[np.float64]
    factor: float
    entropy: float
    gini: float


def imbalance_statistics(labels: ArrayLike) -> ImbalanceStatistics:
    """Imbalance statistics of label distributions.

    Args:
      labels: shape (samples, labels), rows sum to 1.

    Returns:
      An `ImbalanceStatistics`.

    Examples:
      >>> imbalance_statistics([[0.75, 0.25], [0.75, 0.25]]).factor
      3.0
    """
    frequency = np.asarray(labels, np.float64).sum(0)
    share = frequency / frequency.sum()
    count = len(share)
    smallest = float(frequency.min())
    positive = share[share > 0]
    return ImbalanceStatistics(
        frequency=frequency,
        factor=float(frequency.max()) / smallest if smallest > 0 else float("inf"),
        entropy=float(-(positive * np.log(positive)).sum() / np.log(count)),
        gini=float(np.abs(share[:, None] - share[None, :]).sum() / (2 * count)),
    )


def head_labels(frequency: ArrayLike) -> NDArray[np.bool_]:
    """Which labels are head labels: the more frequent half in training, rounded down.

    Args:
      frequency: how much of each label the training rows hold, shape (labels,).

    Returns:
      Shape (labels,), True for the `labels // 2` most frequent ones; the rest is the tail.

    Examples:
      >>> head_labels([5.0, 1.0, 3.0, 2.0, 4.0]).tolist()
      [True, False, False, False, True]
    """
    frequency = np.asarray(frequency)
    head = np.zeros(len(frequency), bool)
    head[np.argsort(-frequency, kind="stable")[: len(frequency) // 2]] = True
    return head
