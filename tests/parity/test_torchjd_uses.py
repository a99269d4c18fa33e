"""What TorchJD is used for, beside the same here: one model, one batch, float64, UPGrad.

A shared trunk with a head for each task (`mtl_backward`), the same with the conflict settled at the
features, a loss for each example (IWRM) by both of TorchJD's engines, and weights from the Gramian
of some parameters only (partial Jacobian descent).
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from torch import nn

import gdmam_jax as gdmam

autojac = pytest.importorskip("torchjd.autojac")
pytest.importorskip("quadprog")
from torchjd import aggregation  # noqa: E402
from torchjd._linalg._dual_cone import QuadprogProjector  # noqa: E402
from torchjd.autogram import Engine  # noqa: E402

EXACT = QuadprogProjector(norm_eps=0.0, reg_eps=1e-12)
TASKS = 3
random = np.random.default_rng(0)
X = random.normal(size=(9, 5))
Y = random.normal(size=(9, TASKS)) * 10.0 ** np.arange(TASKS)
PARAMS = {
    "trunk": {"0.weight": random.normal(size=(6, 5)), "0.bias": random.normal(size=6)},
    "heads": [
        {"weight": random.normal(size=(1, 6)), "bias": random.normal(size=1)} for _ in range(TASKS)
    ],
}


def features(params, x):
    return jnp.tanh(x @ params["trunk"]["0.weight"].T + params["trunk"]["0.bias"])


def head_losses(heads, copies, y):
    return [
        jnp.mean((copy @ head["weight"][0] + head["bias"][0] - target) ** 2)
        for head, copy, target in zip(heads, copies, y.T, strict=True)
    ]


def task_losses(params, x, y):
    first, *others = head_losses(params["heads"], [features(params, x)] * TASKS, y)
    return first, tuple(others)


def example_losses(params, x, y):
    return (features(params, x) @ params["heads"][0]["weight"][0] - y[:, 0]) ** 2


def torch_model():
    trunk = nn.Sequential(nn.Linear(5, 6), nn.Tanh()).double()
    heads = [nn.Linear(6, 1).double() for _ in range(TASKS)]
    trunk.load_state_dict({name: torch.tensor(leaf) for name, leaf in PARAMS["trunk"].items()})
    for head, leaves in zip(heads, PARAMS["heads"], strict=True):
        head.load_state_dict({name: torch.tensor(leaf) for name, leaf in leaves.items()})
    return trunk, heads


def torch_losses(heads, z):
    targets = torch.tensor(Y).T
    return [((head(z)[:, 0] - y) ** 2).mean() for head, y in zip(heads, targets, strict=True)]


def torch_gradients(trunk, heads):
    def of(module):
        return {name: param.grad.numpy() for name, param in module.named_parameters()}

    return {"trunk": of(trunk), "heads": [of(head) for head in heads]}


def arrays():
    return jax.tree.map(jnp.asarray, PARAMS), jnp.asarray(X), jnp.asarray(Y)


def assert_close(found, expected):
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        scale = np.abs(theirs).max()
        np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-6 * scale)


def test_multi_task_learning_with_a_shared_trunk(x64):
    """`mtl_backward`: the trunk's gradients are aggregated, each head gets its own loss's."""
    trunk, heads = torch_model()
    z = trunk(torch.tensor(X))
    autojac.mtl_backward(torch_losses(heads, z), features=z)
    autojac.jac_to_grad(trunk.parameters(), aggregation.UPGrad(projector=EXACT))

    params, *batch = arrays()
    labels = {"trunk": "shared", "heads": "own"}
    optimizer = optax.partition(
        {
            "shared": gdmam.weighed(
                optax.identity(), gdmam.upgrad_weighting, alignment_losses=TASKS - 1
            ),
            "own": gdmam.summed(optax.identity()),
        },
        labels,
    )

    @jax.jit
    def gradient(params):
        _, pairs = gdmam.value_and_paired_grad(task_losses)(params, *batch)
        return optimizer.update(pairs, optimizer.init(params), params)[0]

    assert_close(gradient(params), torch_gradients(trunk, heads))


def test_the_conflict_settled_at_the_features(x64):
    """The rows of the Jacobian are gradients by the features; one backward pass of the trunk."""
    trunk, heads = torch_model()
    z = trunk(torch.tensor(X))
    leaf = z.detach().requires_grad_()
    autojac.backward(torch_losses(heads, leaf), inputs=[leaf])
    autojac.jac_to_grad([leaf], aggregation.UPGrad(projector=EXACT))
    z.backward(leaf.grad)
    sum(torch_losses(heads, z.detach())).backward()

    params, x, y = arrays()

    def loss(params):
        copies = gdmam.fork(features(params, x), TASKS, weighting=gdmam.upgrad_weighting)
        return sum(head_losses(params["heads"], copies, y))

    assert_close(jax.jit(jax.grad(loss))(params), torch_gradients(trunk, heads))


def one_loss_an_example(trunk, heads):
    return (heads[0](trunk(torch.tensor(X)))[:, 0] - torch.tensor(Y[:, 0])) ** 2


def without_bias(gradient):
    gradient = {"trunk": gradient["trunk"], "heads": gradient["heads"][:1]}
    return {**gradient, "heads": [{"weight": gradient["heads"][0]["weight"]}]}


@pytest.mark.parametrize("chunk", [None, 4])
@pytest.mark.parametrize("engine", ["autojac", "autogram"])
def test_one_loss_for_each_example(engine, chunk, x64):
    trunk, heads = torch_model()
    nn.init.zeros_(heads[0].bias)
    heads[0].bias.requires_grad_(False)
    trained = [*trunk.parameters(), heads[0].weight]
    weighting = aggregation.UPGradWeighting(projector=EXACT)
    if engine == "autojac":
        autojac.backward(one_loss_an_example(trunk, heads), inputs=trained)
        autojac.jac_to_grad(trained, aggregation.UPGrad(projector=EXACT))
        gramian = None
    else:
        model = Engine(trunk, heads[0], batch_dim=0)
        losses = one_loss_an_example(trunk, heads)
        gramian = model.compute_gramian(losses)
        losses.backward(weighting(gramian))
    theirs = {
        "trunk": {name: param.grad.numpy() for name, param in trunk.named_parameters()},
        "heads": [{"weight": heads[0].weight.grad.numpy()}],
    }

    params, x, y = arrays()
    params = without_bias(params)
    step = gdmam.value_and_weighed_grad(example_losses, gdmam.upgrad_weighting, chunk=chunk)
    _, gradient, weighing = jax.jit(step)(params, x, y)
    assert_close(gradient, theirs)
    if gramian is not None:
        np.testing.assert_allclose(weighing.gramian, gramian.numpy(), rtol=1e-9)


def test_weights_from_some_parameters_only(x64):
    """Partial Jacobian descent: the head's Gramian weighs the losses for the trunk as well."""
    trunk, heads = torch_model()
    heads[0].bias.requires_grad_(False)
    nn.init.zeros_(heads[0].bias)
    engine = Engine(heads[0], batch_dim=0)
    losses = one_loss_an_example(trunk, heads)
    losses.backward(aggregation.UPGradWeighting(projector=EXACT)(engine.compute_gramian(losses)))
    theirs = [*(param.grad.numpy() for param in trunk.parameters()), heads[0].weight.grad.numpy()]

    params, x, y = arrays()
    params = without_bias(params)

    def losses_of(head, trunk):
        return example_losses({"trunk": trunk, "heads": head}, x, y)

    step = gdmam.value_and_weighed_grad(losses_of, gdmam.upgrad_weighting)

    @jax.jit
    def weighed(params):
        _, _, weighing = step(params["heads"], params["trunk"])
        return jax.grad(lambda params: weighing.weights @ example_losses(params, x, y))(params)

    gradient = weighed(params)
    ours = [gradient["trunk"]["0.weight"], gradient["trunk"]["0.bias"]]
    assert_close([*ours, gradient["heads"][0]["weight"]], theirs)
