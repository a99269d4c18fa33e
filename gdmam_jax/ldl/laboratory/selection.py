"""Which epoch, learning rate and setting of a method count: one rule for all methods.

Every trial (a learning rate and a setting) is tested with every selection of `protocol.SELECTIONS`.
The trial that counts is the one with the lowest KLD on held-out rows, mean over folds and seeds. It
is the KLD of the very parameters that the selection tests, so that epoch, rate and setting are
chosen by one criterion.
"""

from collections.abc import Mapping

import numpy as np

from gdmam_jax.ldl.laboratory.protocol import HELD_OUT
from gdmam_jax.ldl.laboratory.training import Trained


def rows(selection: str, tuning: str | None = None) -> str:
    """The held-out rows whose KLD chooses the trial.

    Args:
      selection: one of `protocol.SELECTIONS`.
      tuning: one of `protocol.HELD_OUT`. None: those that choose the epoch, or natural rows for
        the selections that choose no epoch.

    Returns:
      One of `protocol.HELD_OUT`.

    Raises:
      ValueError: an unknown tuning.

    Examples:
      >>> rows("validation"), rows("last"), rows("last", "validation")
      ('validation', 'natural', 'validation')
    """
    if tuning is not None and tuning not in HELD_OUT:
        raise ValueError(f"tuning must be one of {', '.join(HELD_OUT)}, got {tuning!r}")
    return tuning or (selection if selection in HELD_OUT else "natural")


def score(trained: Trained, selection: str, tuning: str | None = None) -> float:
    """The KLD that a trial is chosen by; a run that diverged counts as infinitely bad."""
    found = trained.results[selection]["held_out"][rows(selection, tuning)]
    return float(np.nan_to_num(found, nan=np.inf).mean(dtype=np.float64))


def choose(found: Mapping[str, Trained], selection: str, tuning: str | None = None) -> str:
    """The trial with the lowest `score`.

    Args:
      found: trials by name, of one method.
      selection: one of `protocol.SELECTIONS`.
      tuning: see `rows`.

    Returns:
      Its name.

    Examples:
      >>> import numpy as np
      >>> def trial(kld):
      ...     return Trained({}, {"last": {"held_out": {"natural": np.array(kld)}}})
      >>> choose({"0.001": trial([0.3, 0.5]), "0.003": trial([0.3, 0.4])}, "last")
      '0.003'
    """
    return min(found, key=lambda name: score(found[name], selection, tuning))
