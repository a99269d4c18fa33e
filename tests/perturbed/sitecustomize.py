"""Random draws, and with them initial parameters, changed by up to 1e-6 of themselves.

Python imports this file first in every process that the tests start.
"""

import functools
import os

import jax
from jax._src import random

SEED = int(os.environ["GDMAM_TEST_PERTURBATION"])


def perturbed(draw):
    @functools.wraps(draw)
    def drawn(key, *args, **kwargs):
        numbers = draw(key, *args, **kwargs)
        change = uniform(jax.random.fold_in(key, SEED), numbers.shape, numbers.dtype)
        # Towards zero, so that numbers stay in their range.
        return numbers * (1 - 1e-6 * change)

    return drawn


uniform = random.uniform
for name in ("normal", "truncated_normal", "uniform"):
    changed = perturbed(getattr(random, name))
    # Initialisers of JAX call the private module, everybody else the public one.
    setattr(random, name, changed)
    setattr(jax.random, name, changed)
