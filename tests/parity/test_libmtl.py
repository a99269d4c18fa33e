"""LibMTL's gradients of the representation (``rep_grad``) beside a fork, in float64.

LibMTL weighs by the products of the representation's gradients added up over the batch, a fork by
those of the whole batch's gradients: of one example these are the same. What the weights are
applied to is the same for any batch.
"""

import jax
import pytest
import torch

import gdmam_jax as gdmam
from benchmarks.kinds import pytorch
from tests.parity.test_torchjd_uses import (
    TASKS,
    X,
    Y,
    arrays,
    assert_close,
    features,
    head_losses,
    torch_gradients,
    torch_model,
)


@pytest.fixture
def libmtl():
    if not pytorch.libmtl_is_installed():
        pytest.skip("LibMTL is not installed")
    library = pytorch.libmtl()
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield library
    torch.set_default_dtype(before)


WEIGHTS = (0.5, 2.0, 0.1)


def theirs(libmtl, weighting, x, y):
    """The gradients of trunk and heads that an architecture and a weighting of theirs leave."""
    trunk, heads = torch_model()
    names = ["main", "second", "third"]

    class Model(libmtl.architecture.HPS, weighting):
        pass

    decoders = torch.nn.ModuleDict(dict(zip(names, heads, strict=True)))
    model = Model(names, lambda: trunk, decoders, True, False, torch.device("cpu"))
    model.init_param()
    out = model(torch.tensor(x))
    targets = zip(names, torch.tensor(y).T, strict=True)
    model.backward(torch.stack([((out[n][:, 0] - row) ** 2).mean() for n, row in targets]))
    return torch_gradients(trunk, heads)


def ours(weighting, x, y):
    def loss(params):
        copies = gdmam.fork(features(params, x), TASKS, weighting=weighting)
        return sum(head_losses(params["heads"], copies, y))

    return jax.jit(jax.grad(loss))(arrays()[0])


def test_imtl_of_one_example(libmtl, x64):
    expected = theirs(libmtl, libmtl.weighting.IMTL, X[:1], Y[:1])
    assert_close(ours(gdmam.imtl_g_weighting, X[:1], Y[:1]), expected)


def test_given_weights_of_a_batch(libmtl, x64):
    class Given(libmtl.weighting.AbsWeighting):
        def backward(self, losses):
            each, _ = self._get_grads(losses)
            self._backward_new_grads(torch.tensor(WEIGHTS), per_grads=each)

    assert_close(ours(gdmam.constant_weighting(*WEIGHTS), X, Y), theirs(libmtl, Given, X, Y))
