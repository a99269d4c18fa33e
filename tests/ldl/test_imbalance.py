"""Samplers and statistics."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gdmam_jax.ldl import (
    Factor,
    FoundThresholds,
    Thresholds,
    head_labels,
    imbalance_statistics,
)


def test_thresholds_keep_what_they_say():
    labels = np.random.default_rng(0).dirichlet(np.ones(4), 300)
    kept = Thresholds(1, 1.2, scarce=2, plenty=0)(labels)
    largest = set(labels.argmax(0))
    for row in range(300):
        wanted = (labels[row, 2] < 1 / 4 and labels[row, 0] > 1.2 / 4) or row in largest
        assert wanted == (row in kept)
    assert len(set(kept)) == len(kept)


def test_found_thresholds_are_the_papers_rule():
    """What is kept is what `Thresholds` keeps with the limits of the rows kept."""
    labels = np.random.default_rng(0).dirichlet([4, 1, 2, 3], 400)
    kept = FoundThresholds(60)(labels)
    assert len(set(kept)) == 60
    ruled = labels[np.setdiff1d(kept, labels.argmax(0))]
    scarce, plenty = labels.sum(0).argmax(), labels.sum(0).argmin()
    limits = 4 * ruled[:, scarce].max() + 1e-9, 4 * ruled[:, plenty].min() - 1e-9
    np.testing.assert_array_equal(Thresholds(*limits, scarce, plenty)(labels), kept)
    assert set(labels.argmax(0)) <= set(kept)


def test_found_thresholds_keep_as_many_as_asked_for_where_rows_are_alike():
    labels = np.repeat(np.eye(3), [50, 30, 20], 0)
    kept = FoundThresholds(25)(labels, 7)
    assert len(set(kept)) == 25
    assert set(labels[kept].sum(0) > 0) == {True}
    assert set(kept) != set(FoundThresholds(25)(labels, 8))
    with pytest.raises(ValueError, match="cannot keep 101 of 100 rows: ask for 1 to 100"):
        FoundThresholds(101)(labels)


@settings(max_examples=20)
@given(
    seed=st.integers(0, 2**32 - 1),
    factor=st.floats(2, 12),
    labels=st.integers(3, 6),
    size=st.integers(60, 200),
)
def test_the_imbalance_factor_asked_for_is_met(seed, factor, labels, size):
    data = np.random.default_rng(seed).dirichlet(np.full(labels, 0.4), 3000)
    kept = Factor(factor, size, tolerance=0.1)(data, seed)
    assert len(set(kept)) == size
    assert imbalance_statistics(data[kept]).factor == pytest.approx(factor, rel=0.1)


def test_an_impossible_factor_is_refused():
    data = np.random.default_rng(0).dirichlet(np.full(3, 50.0), 400)
    with pytest.raises(ValueError, match=r"factor of 100 were found: the nearest is \d"):
        Factor(100, 50)(data)
    with pytest.raises(ValueError, match="cannot keep 500 of 400 rows"):
        Factor(2, 500)(data)


def test_statistics():
    balanced = imbalance_statistics(np.full((3, 4), 0.25))
    assert balanced.factor == 1
    assert balanced.entropy == pytest.approx(1)
    assert balanced.gini == pytest.approx(0)
    single = imbalance_statistics([[1.0, 0.0]])
    assert single.factor == np.inf
    assert single.entropy == pytest.approx(0)
    assert single.gini == pytest.approx(0.5)


def test_head_is_the_more_frequent_half():
    assert head_labels([1, 4, 2, 3]).tolist() == [False, True, False, True]
    assert head_labels([1, 4, 2]).tolist() == [False, True, False]
