"""The methods, beside ConFIG's own package and TorchJD, on gradients recorded in a training."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gdmam_jax as gdmam
from benchmarks.physics.equations import EQUATIONS
from benchmarks.physics.methods import (
    FRONTS,
    METHODS,
    OPTIMIZERS,
    SLOWER,
    behind,
    common_descent_gate,
    gradients,
    momentum_config,
)
from benchmarks.physics.training import SMALL, init, network, objective

torch = pytest.importorskip("torch")
BURGERS = EQUATIONS["burgers"]
SMALLEST = SMALL._replace(width=6, depth=2, residual_points=20, data_points=10)


@pytest.fixture(scope="module")
def recorded():
    """Gradients of three losses of Burgers' equation along 40 steps of Adam on their sum."""
    losses = objective(BURGERS, "summed", SMALLEST, 3)
    optimizer = optax.adam(1e-2)
    start = init(jax.random.key(0), [2, 6, 6, 1])

    def step(carry, key):
        params, state = carry
        sample = BURGERS.sample(key, 20, 10)
        _, pairs = gdmam.value_and_paired_grad(losses)(params, sample)
        rows = gradients(pairs)
        total = jax.tree.structure(params).unflatten(sum(each) for each in zip(*rows, strict=True))
        updates, state = optimizer.update(total, state)
        return (optax.apply_updates(params, updates), state), jnp.stack(
            [jnp.concatenate([leaf.ravel() for leaf in row]) for row in rows]
        )

    keys = jax.random.split(jax.random.key(1), 40)
    return np.asarray(
        jax.jit(lambda: jax.lax.scan(step, (start, optimizer.init(start)), keys)[1])()
    )


@pytest.fixture
def float64_in_torch():
    """ConFIG's own package makes its weights in the default dtype."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def theirs_in_turn(gradients, losses):
    operator = pytest.importorskip("conflictfree.momentum_operator").PseudoMomentumOperator(losses)
    return np.array(
        [
            operator.calculate_gradient(k, torch.tensor(step[k].astype(np.float64))).numpy()
            for step in gradients
            for k in range(losses)
        ]
    )


def ours_in_turn(gradients, losses, dtype):
    optimizer = momentum_config(losses)
    gradients = jnp.asarray(gradients[:, :losses].astype(dtype))

    def step(state, group):
        updates = []
        for k in range(losses):
            update, state = optimizer.update(group[k], state, k)
            updates.append(update)
        return state, jnp.stack(updates)

    found = jax.jit(lambda: jax.lax.scan(step, optimizer.init(gradients[0, 0]), gradients)[1])()
    return np.asarray(found).reshape(-1, gradients.shape[-1])


@pytest.mark.parametrize("losses", [2, 3])
def test_momentum_config_is_that_of_its_authors(losses, recorded, x64, float64_in_torch):
    found = ours_in_turn(recorded, losses, np.float64)
    expected = theirs_in_turn(recorded, losses)
    assert np.all(found[: losses - 1] == 0)
    assert np.min(np.max(np.abs(expected[losses - 1 :]), axis=1)) > 0.1
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-8)


def test_momentum_config_in_float32(recorded, float64_in_torch):
    found = ours_in_turn(recorded, 2, np.float32)
    expected = theirs_in_turn(recorded, 2)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-3)


WEIGHTINGS = {
    "ConFIG": gdmam.config_weighting,
    "IMTLG": gdmam.imtl_g_weighting,
    "PCGrad": gdmam.pcgrad_weighting,
}


@pytest.mark.parametrize("name", WEIGHTINGS)
def test_weightings_are_those_of_conflictfree_and_torchjd(name, recorded, x64, float64_in_torch):
    operators = pytest.importorskip("conflictfree.grad_operator")
    aggregators = pytest.importorskip("torchjd.aggregation")
    own = {"ConFIG": "ConFIGOperator", "IMTLG": "IMTLGOperator", "PCGrad": "PCGradOperator"}[name]
    weigh = jax.jit(lambda gramian: WEIGHTINGS[name](gramian, None))
    conflicts = 0
    for rows in recorded[:, :2].astype(np.float64):
        conflicts += rows[0] @ rows[1] < 0
        weights = weigh(rows @ rows.T)
        found, tensor = np.asarray(weights) @ rows, torch.tensor(rows)
        for other in (
            getattr(operators, own)().calculate_gradient(tensor),
            getattr(aggregators, name)()(tensor),
        ):
            scale = np.linalg.norm(other)
            assert np.linalg.norm(found - other.numpy()) <= 1e-8 * scale
    assert 0 < conflicts < len(recorded)


# An optimizer behind a front does not see the losses: another than AdamW takes three of them only.
BEHIND = tuple(f"{name} " for name in OPTIMIZERS if name != "adamw")


@pytest.mark.parametrize(
    ("name", "losses"),
    [
        (name, losses)
        for name in METHODS
        for losses in (2, 3)
        if not name.endswith((" data x 100", SLOWER))
        and (losses == 3 or not name.startswith(BEHIND))
    ],
)
def test_every_method_takes_pairs(name, losses):
    names = None if losses == 2 else ("boundary", "residual")
    optimizer = METHODS[name](lambda count: 0.1, names, 5000)
    params = {"kernel": np.ones((3, 2), np.float32), "bias": np.ones(2, np.float32)}
    random = np.random.default_rng(0)

    def two_steps(leaf):
        # The same gradient twice has no part in some of SOAP's directions but rounding errors,
        # which its division makes as long as it happens.
        prediction, *others = random.normal(size=(3, 2, *leaf.shape)).astype(np.float32)
        alignment = dict(zip(("boundary", "residual"), others, strict=True))
        return gdmam.GradientPair(prediction, others[0] if losses == 2 else alignment)

    @jax.jit
    def updates(params, pairs):
        def step(state, pairs):
            update, state = optimizer.update(pairs, state, params)
            return state, update

        return jax.lax.scan(step, optimizer.init(params), pairs)[1]

    for leaf in jax.tree.leaves(updates(params, jax.tree.map(two_steps, params))):
        assert 0.005 < np.max(np.abs(leaf[1])) < 0.4  # SOAP's first step only measures


def test_the_common_descent_gate_is_against_neither_loss_and_open_where_it_can_be(x64):
    random, gate = np.random.default_rng(0), jax.jit(common_descent_gate)
    clipped = 0
    for _ in range(200):
        p, a = random.normal(size=(2, 3))
        a *= 10 ** random.uniform(-1.5, 1.5)
        cosine = p @ a / np.linalg.norm(p) / np.linalg.norm(a)
        ratio = np.linalg.norm(a) / np.linalg.norm(p)
        kept, across = gate(cosine, ratio)
        along = p @ a / (p @ p) * p
        step = p + float(kept) * along + float(across) * (a - along)
        for gradient in (p, a):
            assert step @ gradient >= -1e-12 * np.linalg.norm(step) * np.linalg.norm(gradient)
        fits = min((p + a) @ p, (p + a) @ a) >= 0
        clipped += not fits
        assert not fits or kept == pytest.approx(1)
    assert 20 < clipped < 180


def test_of_several_losses_the_common_descent_gate_is_never_against_the_prediction(x64):
    random, gate = np.random.default_rng(1), jax.jit(common_descent_gate)
    for _ in range(100):
        cosine, ratio = random.uniform(-1, 1, size=4), 10 ** random.uniform(-1, 1, size=4)
        kept, _ = gate(cosine, ratio)
        assert 1 + np.sum(ratio * cosine * np.asarray(kept)) >= -1e-12


def test_gradient_norm_weights_are_renewed_at_jaxpis_share_of_the_steps():
    """Behind them SGD, whose steps show the weights."""
    front = behind(FRONTS["gradient norms"], lambda rate: optax.sgd(1.0))
    optimizer = front(lambda count: 1.0, None, 1000)
    random = np.random.default_rng(0)
    state, weights = jax.jit(optimizer.init)(np.ones(5, np.float32)), np.ones(2)
    update = jax.jit(optimizer.update)
    for number in range(12):
        rows = random.normal(size=(2, 5)) * np.array([[1.0], [50.0]])
        if number % 5 == 0:
            norms = np.linalg.norm(rows, axis=1)
            weights = 0.9 * weights + 0.1 * norms.mean() / (norms + 1e-5 * norms.mean())
        pair = gdmam.GradientPair(*rows.astype(np.float32))
        found, state = update(pair, state, np.ones(5, np.float32))
        np.testing.assert_allclose(found, -weights @ rows, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "weight", "alone"),
    [
        ("data x 10", 10, optax.adam),
        ("data x 100", 100, optax.adam),
        ("muon data x 10", 10, optax.contrib.muon),
        ("soap data x 100", 100, OPTIMIZERS["soap"]),
        ("adamw summed", 1, optax.adamw),
    ],
)
def test_fixed_weights_are_on_each_data_loss(name, weight, alone):
    """The second step: Adam's first knows signs only, SOAP's only measures."""
    gradients = np.random.default_rng(0).normal(size=(2, 3, 4)).astype(np.float32)
    optimizer, other = METHODS[name](lambda _: 0.1, ("boundary", "residual"), 9), alone(0.1)

    def step(states, losses):
        (i, b, r), (state, memory) = losses, states
        pair = gdmam.GradientPair(i, {"boundary": b, "residual": r})
        found, state = optimizer.update(pair, state, params)
        expected, memory = other.update(r + weight * (b + i), memory, params)
        return (state, memory), (found, expected)

    params = jnp.ones(4)
    run = jax.jit(
        lambda: jax.lax.scan(step, (optimizer.init(params), other.init(params)), gradients)
    )
    found, expected = (each[1] for each in run()[1])
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def start(sizes):
    """Parameters, in float64, and points."""

    @jax.jit
    def drawn():
        params = optax.tree.cast(init(jax.random.key(0), sizes), jnp.float64)
        return params, BURGERS.sample(jax.random.key(1), 20, 10)

    return drawn()


def test_three_losses_are_parts_of_two(x64):
    params, sample = start([2, 6, 6, 1])

    @jax.jit
    def found(params):
        return [
            objective(BURGERS, method, SMALLEST, losses)(params, sample)
            for method in ("gdmam", "gdmam residual first")
            for losses in (2, 3)
        ]

    (data, residual), (initial, parts), other, (first, others) = found(params)
    assert set(parts) == {"boundary", "residual"}
    assert set(others) == {"boundary", "initial"}
    np.testing.assert_allclose(parts["residual"], residual)
    np.testing.assert_allclose(initial + parts["boundary"], data, rtol=1e-12)
    np.testing.assert_allclose([*other, first], [residual, data, residual])
    np.testing.assert_allclose(
        [others["initial"], others["boundary"]], [initial, parts["boundary"]]
    )
    for equation, losses in (("kovasznay", 3), ("burgers", 4)):
        with pytest.raises(ValueError, match="losses"):
            objective(EQUATIONS[equation], "gdmam", SMALLEST, losses)


def test_causal_weights_are_those_of_the_residuals_before(x64):
    """The loss and its gradient, of a network that repeats: no boundary loss is left."""
    scale = SMALLEST._replace(chunks=4, periodic=True)
    params, sample = start([3, 6, 1])
    learned = functools.partial(network, equation=BURGERS, periodic=True)

    @jax.jit
    def expected(params, weights):
        points = sample["residual"]
        residual = BURGERS.residual(learned(params)(points, BURGERS.orders), points)[:, 0]
        chunks = (residual[jnp.argsort(points[:, 1])] ** 2).reshape(4, 5).mean(axis=1)
        return weights @ chunks / 4, chunks

    _, chunks = expected(params, np.ones(4))
    assert np.ptp(chunks) > 1e-3
    weights = [np.exp(-sum(chunks[:number])) for number in range(4)]
    (data, residual), gradient = jax.jit(
        lambda params: (
            objective(BURGERS, "gdmam", scale, 2)(params, sample),
            jax.grad(lambda params: objective(BURGERS, "gdmam", scale, 2)(params, sample)[1])(
                params
            ),
        )
    )(params)
    value, frozen = jax.value_and_grad(lambda params: expected(params, np.array(weights))[0])(
        params
    )
    np.testing.assert_allclose(residual, value, rtol=1e-10)
    for one, other in zip(jax.tree.leaves(gradient), jax.tree.leaves(frozen), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-8, atol=1e-12)
    first = sample["initial"]
    wrong = jax.jit(lambda: learned(params)(first, (0, 0))[0][0])() - BURGERS.values(first, np)
    np.testing.assert_allclose(data, np.mean(wrong**2), rtol=1e-10)


@pytest.mark.parametrize(
    ("equation", "change", "losses", "word"),
    [
        ("heat", {"periodic": True}, 2, "periodic"),
        ("burgers", {"periodic": True}, 3, "periodic"),
        ("helmholtz", {"chunks": 4}, 2, "causal"),
        ("burgers", {"chunks": 3}, 2, "causal"),
    ],
)
def test_what_an_equation_cannot_have_is_refused(equation, change, losses, word):
    with pytest.raises(ValueError, match=word):
        objective(EQUATIONS[equation], "gdmam", SMALLEST._replace(**change), losses)
