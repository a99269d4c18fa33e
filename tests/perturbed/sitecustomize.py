"""Random draws, and with them initial parameters, changed by up to 1e-6 of themselves.

Python imports this file first in every process that the tests start.
"""

import functools
import os

import jax
import numpy as np
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


class Generator(np.random.Generator):
    """NumPy's, with normal and uniform numbers changed in the same way."""

    def _changed(self, numbers):
        change = np.random.Generator(np.random.PCG64(SEED)).random(np.shape(numbers))
        return numbers * (1 - 1e-6 * change)

    def normal(self, *args, **kwargs):
        return self._changed(super().normal(*args, **kwargs))

    def uniform(self, *args, **kwargs):
        return self._changed(super().uniform(*args, **kwargs))


def default_rng(seed=None):
    """A generator of `numpy.random.default_rng`, whose draws are changed."""
    return Generator(original(seed).bit_generator)


original = np.random.default_rng
np.random.default_rng = default_rng
