"""Weightings against TorchJD's aggregators, run side by side on made-up Jacobians, in float64.

TorchJD's quadratic programmes are regularised by 1e-4 by default: here by 1e-12. Its MGDA stops
after so many steps of Frank and Wolfe, and its CAGrad asks a solver with a tolerance of its own:
with those, what is minimised is compared. Its PCGrad draws the order of the tasks, which for two
does not matter.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import gdmam_jax as gdmam

torchjd = pytest.importorskip("torchjd.aggregation")
pytest.importorskip("quadprog")
from torchjd._linalg._dual_cone import QuadprogProjector  # noqa: E402

EXACT = QuadprogProjector(norm_eps=0.0, reg_eps=1e-12)
CLOSED = {
    "mean": (gdmam.mean_weighting, torchjd.Mean),
    "sum": (gdmam.sum_weighting, torchjd.Sum),
    "IMTL-G": (gdmam.imtl_g_weighting, torchjd.IMTLG),
    "Aligned-MTL": (gdmam.aligned_mtl_weighting, torchjd.AlignedMTL),
    "ConFIG": (gdmam.config_weighting, torchjd.ConFIG),
}
PROJECTED = {
    "UPGrad": (gdmam.upgrad_weighting, functools.partial(torchjd.UPGrad, projector=EXACT)),
    "DualProj": (gdmam.dual_proj_weighting, functools.partial(torchjd.DualProj, projector=EXACT)),
}
KINDS = ("random", "conflicting", "rank-deficient", "badly scaled")
COUNTS = (2, 3, 5, 8)


def jacobian(kind, count):
    random = np.random.default_rng(count)
    if kind == "rank-deficient":
        return random.normal(size=(count, 2)) @ random.normal(size=(2, 10))
    rows = random.normal(size=(count, 10 if count < 10 else count + 10))
    if kind == "conflicting":
        rows = rows - 1.2 * rows.mean(axis=0)
    if kind == "badly scaled":
        rows = rows * 10 ** random.uniform(-3, 3, size=(count, 1))
    return rows


@functools.cache
def compiled(weighting, **settings):
    return jax.jit(lambda gramian: weighting(gramian, None, **settings))


def ours(weighting, rows, **settings):
    return np.asarray(compiled(weighting, **settings)(rows @ rows.T)) @ rows


def theirs(aggregator, rows):
    return aggregator(torch.tensor(rows)).numpy()


def deviation(name, kind, count):
    """Difference of the two results, over the length of the longest gradient."""
    weighting, make = (CLOSED | PROJECTED)[name]
    rows = jacobian(kind, count)
    with jax.enable_x64(True):
        found, expected = ours(weighting, rows), theirs(make(), rows)
    return float(np.linalg.norm(found - expected) / np.linalg.norm(rows, axis=1).max())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CLOSED)
def test_closed_forms(name, kind):
    assert max(deviation(name, kind, count) for count in COUNTS) < 1e-10


@pytest.mark.parametrize("name", ["Aligned-MTL", "ConFIG", *PROJECTED])
def test_preferences_are_theirs_over_the_predictions(name, x64):
    for count in (2, 5):
        rows = jacobian("conflicting", count)
        wanted = np.random.default_rng(count).uniform(0.5, 2, size=count)
        weighting, make = (CLOSED | PROJECTED)[name]
        aggregator = make(pref_vector=torch.tensor(wanted / wanted.sum()))
        found = ours(weighting, rows, preference=tuple(wanted[1:] / wanted[0]))
        np.testing.assert_allclose(found, theirs(aggregator, rows), rtol=0, atol=1e-7)


@pytest.mark.parametrize("kind", KINDS[:3])
@pytest.mark.parametrize("name", PROJECTED)
def test_projections_on_the_dual_cone(name, kind):
    assert max(deviation(name, kind, count) for count in COUNTS) < 1e-8


@pytest.mark.parametrize("kind", KINDS[:2])
@pytest.mark.parametrize("name", [*CLOSED, *PROJECTED])
def test_fifty_losses(name, kind):
    assert deviation(name, kind, 50) < 1e-6


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", PROJECTED)
def test_projections_conflict_with_no_gradient(name, kind, x64):
    for count in COUNTS:
        rows = jacobian(kind, count)
        direction = ours(PROJECTED[name][0], rows)
        units = rows / np.linalg.norm(rows, axis=1, keepdims=True)
        assert np.min(units @ direction) > -1e-5 * np.linalg.norm(rows, axis=1).max()


@pytest.mark.parametrize("kind", KINDS)
def test_mgda_finds_no_longer_a_vector(kind, x64):
    for count in COUNTS:
        rows = jacobian(kind, count)
        weights = np.asarray(compiled(gdmam.mgda_weighting)(rows @ rows.T))
        np.testing.assert_allclose(weights.sum(), 1, rtol=1e-9)
        assert weights.min() >= 0
        scale = np.linalg.norm(rows, axis=1).max()
        found = np.linalg.norm(weights @ rows)
        expected = np.linalg.norm(theirs(torchjd.MGDA(epsilon=1e-12, max_iters=2000), rows))
        assert found <= expected + 1e-7 * scale
        assert found >= expected - 1e-2 * scale


def worst_improvement(direction, rows):
    return np.min(rows @ direction)


@pytest.mark.parametrize("c", [0.2, 0.8])
@pytest.mark.parametrize("kind", KINDS)
def test_cagrad_improves_the_worst_loss_at_least_as_much(kind, c, x64):
    pytest.importorskip("cvxpy")
    for count in COUNTS:
        rows = jacobian(kind, count)
        direction = ours(gdmam.cagrad_weighting, rows, c=c)
        mean = rows.mean(axis=0)
        assert np.linalg.norm(direction - mean) <= c * np.linalg.norm(mean) * (1 + 1e-6)
        expected = theirs(torchjd.CAGrad(c=c, norm_eps=0.0), rows)
        scale = np.linalg.norm(rows, axis=1).max() * np.linalg.norm(direction)
        found = worst_improvement(direction, rows)
        assert found >= worst_improvement(expected, rows) - 1e-6 * scale


@pytest.mark.parametrize("kind", ["random", "conflicting", "badly scaled"])
def test_nash_mtl_solves_its_equation(kind, x64):
    for count in COUNTS[:3]:
        gramian = (rows := jacobian(kind, count)) @ rows.T
        weights = np.asarray(compiled(gdmam.nash_mtl_weighting)(gramian))
        np.testing.assert_allclose(weights * (gramian @ weights), 1, rtol=1e-6)
        assert (weights > 0).all()


@pytest.mark.filterwarnings("ignore")  # cvxpy's, of a problem it has to compile anew
@pytest.mark.parametrize("kind", ["random", "conflicting"])
def test_nash_mtl_is_torchjds(kind, x64):
    """Badly scaled, TorchJD's approximation is off by half and more; ours solves the equation."""
    pytest.importorskip("ecos")
    for count in COUNTS:
        rows = jacobian(kind, count)
        aggregator = torchjd.NashMTL(
            n_tasks=count, max_norm=0, update_weights_every=1, optim_niter=100
        )
        expected = theirs(aggregator, rows)
        difference = np.linalg.norm(ours(gdmam.nash_mtl_weighting, rows) - expected)
        assert difference < 1e-6 * np.linalg.norm(expected)


@pytest.mark.parametrize("kind", KINDS)
def test_pcgrad_of_two(kind, x64):
    rows = jacobian(kind, 2)
    expected = theirs(torchjd.PCGrad(), rows)
    np.testing.assert_allclose(ours(gdmam.pcgrad_weighting, rows), expected, rtol=1e-10)


@pytest.mark.parametrize("count", [3, 5])
def test_pcgrad_of_several_in_fixed_and_in_drawn_order(count, x64):
    rows = jacobian("conflicting", count)

    def reference(orders):
        total = np.zeros(rows.shape[1])
        for own, order in enumerate(orders):
            g = rows[own].copy()
            for other in order:
                if other != own and g @ rows[other] < 0:
                    g -= g @ rows[other] / (rows[other] @ rows[other]) * rows[other]
            total += g
        return total

    fixed = [list(range(count))] * count
    np.testing.assert_allclose(
        ours(gdmam.pcgrad_weighting, rows), reference(fixed), rtol=1e-10, atol=1e-12
    )
    key = jax.random.key(3)
    orders = jnp.broadcast_to(jnp.arange(count), (count, count))
    drawn = np.asarray(jax.random.permutation(key, orders, axis=1, independent=True))
    found = ours(gdmam.pcgrad_weighting(key=key), rows)
    np.testing.assert_allclose(found, reference(drawn), rtol=1e-10, atol=1e-12)
    assert not np.allclose(found, reference(fixed)) or np.array_equal(drawn, fixed)


@pytest.mark.parametrize("kind", ["random", "conflicting"])
@pytest.mark.parametrize(
    ("name", "weighting"),
    [
        ("ConFIGOperator", gdmam.config_weighting),
        ("IMTLGOperator", gdmam.imtl_g_weighting),
        ("PCGradOperator", gdmam.pcgrad_weighting),
    ],
)
def test_configs_own_package_in_float32(name, weighting, kind):
    operators = pytest.importorskip("conflictfree.grad_operator")
    rows = jacobian(kind, 2).astype(np.float32)
    expected = getattr(operators, name)().calculate_gradient(torch.tensor(rows)).numpy()
    weights = np.asarray(compiled(weighting)(rows @ rows.T))
    scale = np.linalg.norm(expected)
    np.testing.assert_allclose(weights @ rows, expected, rtol=0, atol=2e-6 * scale)
