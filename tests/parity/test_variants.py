"""Each choice of the allocated form against its reference, on recorded gradients; and PCGrad."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

import gdmam_jax as gdmam
from tests.parity import reference

STEPS, SHAPES = 25, {"encoder.weight": (3, 4), "encoder.bias": (3,), "head.weight": (2, 3)}

WEIGHTINGS = {
    "unit": gdmam.unit_weighting,
    "norm": gdmam.norm_weighting,
    "balanced": gdmam.balanced_weighting,
    "pcgrad": gdmam.pcgrad_weighting,
    (0.7, 0.4): gdmam.constant_weighting(0.7, 0.4),
}
GATES = {
    "priority": gdmam.priority_gate,
    "cosine": gdmam.cosine_gate,
    "conflict": gdmam.conflict_gate,
    "open": gdmam.open_gate,
}
MOMENTA = {
    "constant": gdmam.constant_momentum,
    "ratcheted": gdmam.ratcheted_momentum,
    "anchored": gdmam.anchored_momentum,
    "relative": gdmam.relative_momentum,
}
SCOPES = {
    "all": lambda name: "all",
    "leaf": gdmam.leaf_scope,
    "module": lambda name: name.split(".")[0],
}
VARIANTS = [
    {},
    {"b2": None},
    {"b2": 0.99},
    {"amsgrad": True},
    *({"b2": None, "weighting": each} for each in WEIGHTINGS if each != "unit"),
    *({"b2": None, "gate": each} for each in GATES if each != "priority"),
    *(
        {"b2": None, "momentum": each, "momenta": momenta}
        for each in MOMENTA
        if each != "constant"
        for momenta in ("steered", "separate")
    ),
    *({"b2": None, "scope": each} for each in SCOPES if each != "all"),
    {"weighting": "balanced", "gate": "conflict", "momentum": "relative", "scope": "module"},
    {"weighting": "norm", "gate": "cosine", "momentum": "ratcheted", "momenta": "separate"},
]


def recorded_gradients(seed=0):
    """Gradients of size (steps, ...) that change in size and angle from step to step."""
    random = np.random.default_rng(seed)
    size = 0.5 * random.lognormal(size=STEPS)
    common = random.uniform(-1.5, 1.5, size=STEPS)
    trees = {}, {}
    for name, shape in SHAPES.items():
        spread = (-1, *([1] * len(shape)))
        prediction, other = random.normal(size=(2, STEPS, *shape))
        trees[0][name] = size.reshape(spread) * prediction
        trees[1][name] = other + common.reshape(spread) * prediction
    return trees


@pytest.mark.parametrize(
    "variant", VARIANTS, ids=lambda variant: "-".join(map(str, variant.values()))
)
def test_every_choice_agrees_with_its_reference(variant, x64):
    prediction, alignment = recorded_gradients()
    initial = {name: np.ones(shape) for name, shape in SHAPES.items()}
    scope = SCOPES[variant.get("scope", "all")]

    expected = {name: torch.tensor(array) for name, array in initial.items()}
    method = reference.Allocated(expected, 0.05, 0.1, **variant | {"scope": scope})
    trajectory = []
    for step in range(STEPS):
        method.step(
            *(
                {name: torch.tensor(array[step]) for name, array in tree.items()}
                for tree in (prediction, alignment)
            )
        )
        trajectory.append(reference.flat(expected).numpy().copy())

    optimizer = gdmam.gdmam(
        0.05,
        weight_decay=0.1,
        weighting=WEIGHTINGS[variant.get("weighting", "unit")],
        gate=GATES[variant.get("gate", "priority")],
        momentum=MOMENTA[variant.get("momentum", "constant")],
        momenta=variant.get("momenta", "steered"),
        scope=scope if "scope" in variant else None,
        b2=variant.get("b2", 0.999),
        amsgrad=variant.get("amsgrad", False),
    )

    def step(carry, gradients):
        params, state = carry
        updates, state = optimizer.update(gdmam.pair_gradients(*gradients), state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), jnp.concatenate([params[name].ravel() for name in SHAPES])

    @jax.jit
    def run(params, gradients):
        return jax.lax.scan(step, (params, optimizer.init(params)), gradients)[1]

    found = run(initial, (prediction, alignment))
    np.testing.assert_allclose(found, trajectory, rtol=0, atol=1e-12 * np.max(np.abs(trajectory)))


def test_the_recorded_gradients_conflict_at_some_steps_and_move_every_momentum():
    prediction, alignment = recorded_gradients()
    products = sum(
        (prediction[name] * alignment[name]).reshape(STEPS, -1).sum(1) for name in SHAPES
    )
    assert 5 < np.sum(products < 0) < STEPS - 5


@pytest.mark.parametrize("seed", range(4))
def test_without_momentum_the_conflict_gate_is_pcgrad(seed, x64):
    """Weights (1, 1): the prediction gradient plus the alignment gradient as PCGrad projects it."""
    random = np.random.default_rng(seed)
    prediction, alignment = random.normal(size=(2, 20))
    alignment += (-1.0) ** seed * prediction
    product = alignment @ prediction
    assert (product < 0) == (seed % 2 == 1)
    projected = alignment - min(product, 0) / (prediction @ prediction) * prediction

    optimizer = gdmam.scale_by_gdmam(
        weighting=gdmam.constant_weighting(1, 1),
        gate=gdmam.conflict_gate,
        momentum=gdmam.constant_momentum(initial=0),
    )

    def tree(vector):
        return {"a": vector[:12], "b": vector[12:].reshape(2, 4)}

    pairs = gdmam.pair_gradients(tree(prediction), tree(alignment))
    state, update = jax.jit(optimizer.init)(tree(prediction)), jax.jit(optimizer.update)
    for _ in range(2):  # the second step shows that nothing is remembered
        direction, state = update(pairs, state)
        found = np.concatenate([direction["a"], direction["b"].ravel()])
        np.testing.assert_allclose(found, prediction + projected, rtol=0, atol=1e-11)
