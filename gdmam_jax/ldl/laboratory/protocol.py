"""What all methods of an experiment have in common, and the names of the selections."""

from dataclasses import dataclass

HELD_OUT = ("validation", "reweighted", "natural")
"""KLDs on rows held out of training: what an epoch, a learning rate and a setting are chosen by."""

SELECTIONS = {
    "validation": "the epoch with the best validation KLD (the papers')",
    "reweighted": "the epoch with the best validation KLD, rows weighted by their labels' rarity",
    "natural": "as validation, by equally many rows that the sampler left out, if it left some out",
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
      learning_rates: every one is trained with every setting of a method; which is reported is
        chosen afterwards, see `selection.choose`.
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
    chunk: int = 25

    def __post_init__(self) -> None:
        if self.folds < 2:
            raise ValueError(f"folds must be at least 2, got {self.folds}")
        for name in ("seeds", "epochs", "batch_size", "validation_size", "hidden", "chunk"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        rates = self.learning_rates
        if not rates or not all(0 < rate < float("inf") for rate in rates):
            raise ValueError(f"learning_rates must be positive numbers, got {rates}")
        if not 0 <= self.alignment_weight < float("inf"):
            raise ValueError(f"alignment_weight must be at least 0, got {self.alignment_weight}")
        bound = self.log_variance_bound
        if bound is not None and not 0 < bound < float("inf"):
            raise ValueError(f"log_variance_bound must be above 0, or None, got {bound}")
