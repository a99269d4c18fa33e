"""Weightings with a memory or with values against TorchJD, run side by side, in float64.

TorchJD's own small constants are set to 0 where it lets them be. Where it has no such method, or
draws an order, the oracle is the paper's formula in NumPy, written apart.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import gdmam_jax as gdmam
from tests.parity.test_torchjd import KINDS, compiled, jacobian

aggregation = pytest.importorskip("torchjd.aggregation")
scalarization = pytest.importorskip("torchjd.scalarization")

STEPS = 8


def jacobians(kind, count):
    """Of some steps: each a perturbation of one, and of another length."""
    random = np.random.default_rng(count)
    first = jacobian(kind, count)
    for _ in range(STEPS):
        noise = 0.3 * random.normal(size=first.shape) * np.linalg.norm(first, axis=1).mean() / 3
        yield (first + noise) * random.uniform(0.5, 2, size=(count, 1))


def values(count):
    """Of some steps: losses that fall at different speeds, noisily."""
    random = np.random.default_rng(count)
    falls = np.linspace(0.6, 1.1, count)
    return [
        10.0 ** np.linspace(-1, 1, count) * falls**step * random.uniform(0.8, 1.2, count)
        for step in range(STEPS)
    ]


def ours(weighting, count, rows=None, losses=None):
    """Weights of every step."""
    memory, update = weighting.init(jnp.zeros(count)), jax.jit(weighting.update)
    found = []
    for step in range(STEPS):
        gramian = None if rows is None else rows[step] @ rows[step].T
        known = None if losses is None else losses[step]
        weights, memory = update(gramian, None, memory, gdmam.Losses(values=known))
        found.append(np.asarray(weights))
    return found


def assert_same(found, expected, rtol=1e-9):
    for step, (one, other) in enumerate(zip(found, expected, strict=True)):
        scale = np.abs(other).max()
        np.testing.assert_allclose(one, other, rtol=rtol, atol=rtol * scale, err_msg=f"step {step}")


def theirs(weighting, rows):
    return [weighting(torch.tensor(g @ g.T)).numpy() for g in rows]


def slopes(scalarizer, losses, after=None):
    """The gradient of a scalarizer in the losses at every step."""
    found = []
    for step, each in enumerate(losses):
        leaf = torch.tensor(each, requires_grad=True)
        scalarizer(leaf).backward()
        found.append(leaf.grad.numpy())
        if after is not None:
            after(step)
    return found


@pytest.mark.parametrize("kind", KINDS[:2])
@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("tau", [0.02, 0.5, 1.0])
def test_pcd(tau, count, kind, x64):
    rows = list(jacobians(kind, count))
    expected = theirs(aggregation.PCDWeighting(tau=tau, beta=0.9, eps=0.0), rows)
    found = ours(gdmam.pcd_weighting(tau=tau, decay=0.9), count, rows)
    for g, one, other in zip(rows, found, expected, strict=True):
        difference = np.linalg.norm((one - other) @ g)
        assert difference < 1e-5 * np.linalg.norm(g[0])


def test_pcd_with_a_share_for_each(x64):
    rows = list(jacobians("random", 3))
    expected = theirs(aggregation.PCDWeighting(tau=torch.tensor([0.1, 0.9]), eps=0.0), rows)
    assert_same(ours(gdmam.pcd_weighting(tau=(0.1, 0.9)), 3, rows), expected, rtol=1e-5)


@pytest.mark.parametrize(
    "rows",
    [
        np.array([[0.0, 0.0], [1.0, 2.0]]),
        np.array([[1.0, 1.0], [1.0, 0.0], [-1.0, 0.0]]),
        np.array([[-1.0, 0.0], [0.0, 1.0], [0.0, 0.0]]),
    ],
    ids=["no prediction gradient", "conditions exclude each other", "no alignment gradient"],
)
def test_pcd_in_special_cases(rows, x64):
    expected = theirs(aggregation.PCDWeighting(tau=0.5, eps=1e-30), [rows])
    weighting = gdmam.pcd_weighting(tau=0.5)
    found, _ = jax.jit(
        lambda gramian: weighting.update(
            gramian, None, weighting.init(jnp.zeros(len(rows))), gdmam.Losses()
        )
    )(rows @ rows.T)
    np.testing.assert_allclose(found @ rows, expected[0] @ rows, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_gradvac_of_two(kind, x64):
    """TorchJD draws the order, which of two does not matter."""
    rows = list(jacobians(kind, 2))
    expected = theirs(aggregation.GradVacWeighting(beta=0.3, eps=0.0), rows)
    assert_same(ours(gdmam.gradvac_weighting(decay=0.7), 2, rows), expected)


def vaccinated(rows, means, beta, orders):
    result = np.zeros(rows.shape[1])
    for i in range(len(rows)):
        g = rows[i].copy()
        for j in orders[i]:
            if i == j:
                continue
            n, m = np.linalg.norm(g), np.linalg.norm(rows[j])
            cosine, aim = g @ rows[j] / (n * m), means[i, j]
            if cosine < aim:
                root = np.sqrt(1 - aim**2)
                g += n * (aim * np.sqrt(1 - cosine**2) - cosine * root) / (m * root) * rows[j]
            means[i, j] = (1 - beta) * aim + beta * cosine
        result += g
    return result


@pytest.mark.parametrize("key", [None, 3])
def test_gradvac_of_several_in_fixed_and_in_drawn_order(key, x64):
    rows, means = list(jacobians("conflicting", 4)), np.zeros((4, 4))
    given = None if key is None else jax.random.key(key)
    found = ours(gdmam.gradvac_weighting(decay=0.7, key=given), 4, rows)
    plain = jnp.broadcast_to(jnp.arange(4), (4, 4))
    for step, (g, weights) in enumerate(zip(rows, found, strict=True)):
        orders = np.asarray(plain)
        if key is not None:
            drawn = jax.random.fold_in(given, step)
            orders = np.asarray(jax.random.permutation(drawn, plain, axis=1, independent=True))
        np.testing.assert_allclose(weights @ g, vaccinated(g, means, 0.3, orders), rtol=1e-8)


@pytest.mark.parametrize("kind", KINDS[:3])
def test_running_weights_are_cr_mogms(kind, x64):
    rows = list(jacobians(kind, 3))
    inner = aggregation.AlignedMTLWeighting()
    expected = theirs(aggregation.CRMOGMWeighting(inner, alpha=0.7), rows)
    found = ours(gdmam.running_weighting(gdmam.aligned_mtl_weighting, decay=0.7), 3, rows)
    assert_same(found, expected, rtol=1e-7)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0, 5.0])
def test_fairgrad_solves_its_equation(alpha, kind, x64):
    for count in (2, 3, 5, 8):
        gramian = (rows := jacobian(kind, count)) @ rows.T
        if kind == "rank-deficient" and count > 2:
            continue  # There need be no solution.
        weights = np.asarray(compiled(gdmam.fairgrad_weighting, alpha=alpha)(gramian))
        assert (weights > 0).all()
        np.testing.assert_allclose(weights ** (1 / alpha) * (gramian @ weights), 1, rtol=1e-6)


@pytest.mark.parametrize("alpha", [1.0, 2.0])
def test_fairgrad_is_torchjds(alpha, x64):
    pytest.importorskip("scipy")
    for count in (2, 3, 5):
        rows = jacobian("random", count)
        expected = theirs(aggregation.FairGradWeighting(alpha), [rows])[0]
        found = np.asarray(compiled(gdmam.fairgrad_weighting, alpha=alpha)(rows @ rows.T))
        # Theirs stops where a sum of squares no longer falls.
        np.testing.assert_allclose(found @ rows, expected @ rows, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("direction", ["center", "projection", "average"])
@pytest.mark.parametrize("kind", KINDS)
def test_dcgd(kind, direction, x64):
    for seed in range(20):
        rows = jacobian(kind, 2) + np.random.default_rng(seed).normal(size=(2, 10))
        total, units = rows.sum(axis=0), rows / np.linalg.norm(rows, axis=1, keepdims=True)
        middle = units.sum(axis=0)
        least = units[np.argmin(units @ total)]
        across = [total - u * (u @ total) for u in units]
        against = least @ total < 0
        expected = {
            "center": middle * (middle @ total) / (middle @ middle),
            "projection": total - least * (least @ total) if against else total,
            "average": np.mean(across, axis=0) if against else total,
        }[direction]
        weights = compiled(gdmam.dcgd_weighting, direction=direction)(rows @ rows.T)
        scale = np.linalg.norm(rows, axis=1).max()
        np.testing.assert_allclose(weights @ rows, expected, rtol=0, atol=1e-8 * scale)


def test_gradient_norm_weights(x64):
    rows, weights = list(jacobians("badly scaled", 3)), np.ones(3)
    expected = []
    for step, g in enumerate(rows):
        norms = np.linalg.norm(g, axis=1)
        if step % 3 == 0:
            weights = 0.8 * weights + 0.2 * norms.mean() / (norms + 1e-5 * norms.mean())
        expected.append(weights)
    assert_same(ours(gdmam.gradient_norm_weighting(decay=0.8, every=3), 3, rows), expected)


def test_gradnorm_is_learned_as_by_torch(x64):
    """Its loss differentiated by PyTorch, its weights moved by PyTorch's Adam."""
    rows, losses = list(jacobians("random", 3)), values(3)
    weights = torch.ones(3, dtype=torch.float64, requires_grad=True)
    optimizer, expected = torch.optim.Adam([weights], lr=0.05), []
    for g, each in zip(rows, losses, strict=True):
        expected.append(weights.detach().numpy().copy())
        lengths = weights * torch.tensor(np.linalg.norm(g, axis=1))
        speed = torch.tensor(each / losses[0] / (each / losses[0]).mean())
        loss = (lengths - (lengths.mean() * speed**1.5).detach()).abs().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            weights.mul_(3 / weights.sum())
    assert_same(ours(gdmam.gradnorm_weighting(learning_rate=0.05), 3, rows, losses), expected)


def test_uncertainty_weights(x64):
    losses, scalarizer = values(3), scalarization.UW(3).double()
    optimizer = torch.optim.Adam(scalarizer.parameters(), lr=0.1)

    def after(step):
        optimizer.step()
        optimizer.zero_grad()

    expected = slopes(scalarizer, losses, after)
    assert_same(ours(gdmam.uncertainty_weighting(learning_rate=0.1), 3, losses=losses), expected)


def test_famo(x64):
    """On one batch, of which the next step's values are those after the step."""
    losses, lowest = values(3), np.array([1e-4, 0.0, 0.02])
    scalarizer = scalarization.FAMO(3, torch.tensor(lowest), lr=0.1, weight_decay=0.01).double()

    def after(step):
        if step + 1 < STEPS:
            scalarizer.update(torch.tensor(losses[step + 1]))

    expected = slopes(scalarizer, losses, after)
    weighting = gdmam.famo_weighting(learning_rate=0.1, weight_decay=0.01, lowest=tuple(lowest))
    assert_same(ours(weighting, 3, losses=losses), expected, rtol=1e-4)


@pytest.mark.parametrize("every", [1, 2])
def test_dwa(every, x64):
    losses, scalarizer = values(3), scalarization.DWA(temperature=1.5)
    after = lambda step: scalarizer.step() if (step + 1) % every == 0 else None  # noqa: E731
    expected = slopes(scalarizer, losses, after)
    found = ours(gdmam.dwa_weighting(temperature=1.5, every=every), 3, losses=losses)
    assert_same(found, expected)


@pytest.mark.parametrize("scaled", [True, False])
def test_softadapt(scaled, x64):
    """Against the paper's formula; TorchJD has no such method."""
    losses = values(3)
    expected = [np.ones(3)]
    for change in np.diff(losses, axis=0):
        each = np.exp(1.5 * (change / np.abs(change).sum() if scaled else change))
        expected.append(3 * each / each.sum())
    assert_same(
        ours(gdmam.softadapt_weighting(beta=1.5, scaled=scaled), 3, losses=losses), expected
    )


def test_stch(x64):
    losses, lowest = values(3), np.array([0.05, 0.1, 0.2])
    wanted = np.array([0.2, 0.3, 0.5])
    expected = slopes(scalarization.STCH(0.5, torch.tensor(wanted), torch.tensor(lowest)), losses)
    weighting = gdmam.stch_weighting(mu=0.5, preference=(1.5, 2.5), lowest=tuple(lowest))
    assert_same(ours(weighting, 3, losses=losses), expected)


def test_geometric_mean(x64):
    losses = values(4)
    expected = slopes(scalarization.GeometricMean(), losses)
    assert_same(ours(gdmam.geometric_mean_weighting(), 4, losses=losses), expected)


def test_relobralo(x64):
    losses, key = values(3), jax.random.key(5)
    decay, temperature, lookback = 0.7, 0.4, 0.5

    def balanced(now, then):
        each = np.exp(now / then / temperature)
        return 3 * each / each.sum()

    weights, expected, draws = np.ones(3), [], []
    for step, now in enumerate(losses):
        draws.append(bool(jax.random.bernoulli(jax.random.fold_in(key, step), lookback)))
        if step:
            past = weights if draws[-1] else balanced(now, losses[0])
            weights = decay * past + (1 - decay) * balanced(now, losses[step - 1])
        expected.append(weights)
    assert {*draws[1:]} == {True, False}
    weighting = gdmam.relobralo_weighting(
        temperature=temperature, decay=decay, lookback=lookback, key=key
    )
    assert_same(ours(weighting, 3, losses=losses), expected)


def test_random_weights_have_the_published_distribution():
    """The softmax of normal numbers: means and deviations of many draws, beside TorchJD's."""
    weighting, count = gdmam.random_weighting(key=jax.random.key(1)), 3

    def step(memory, _):
        weights, memory = weighting.update(None, None, memory, gdmam.Losses())
        return memory, weights

    found = np.asarray(jax.lax.scan(step, weighting.init(jnp.zeros(count)), length=4000)[1])
    torch.manual_seed(0)
    reference = aggregation.RandomWeighting()
    expected = np.stack([reference(torch.ones(count, 2)).numpy() for _ in range(4000)])
    np.testing.assert_allclose(found.sum(axis=1), 1, rtol=1e-5)
    for statistic in (np.mean, np.std):
        one, other = statistic(found, axis=0), statistic(expected, axis=0)
        np.testing.assert_allclose(one, other, atol=0.02)


@pytest.mark.parametrize("weighting", [gdmam.pcgrad_weighting, gdmam.mgda_weighting])
def test_normalise_then_weigh(weighting, x64):
    rows = jacobian("badly scaled", 3)
    units = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    expected = np.asarray(compiled(weighting)(units @ units.T)) @ units
    normalised = gdmam.normalised_weighting(weighting)
    found, _ = jax.jit(lambda gramian: normalised.update(gramian, None, None, gdmam.Losses()))(
        rows @ rows.T
    )
    np.testing.assert_allclose(np.asarray(found) @ rows, expected, rtol=1e-9)
