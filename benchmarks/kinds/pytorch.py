"""A trunk and heads in PyTorch, under the methods of TorchJD and LibMTL."""

import functools
import importlib
import importlib.util
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import jax
import numpy as np
import torch
from torchjd import aggregation, autojac

EPOCH = 25
"""Steps after which LibMTL's methods look at the losses of the epoch, as our DWA does."""


class Layers(torch.nn.Module):
    """A linear layer of given arrays, or several with a hyperbolic tangent after each."""

    def __init__(self, layers: Any, tangents: bool) -> None:
        super().__init__()
        arrays = (torch.tensor(np.asarray(array)) for array in jax.tree.leaves(layers))
        self.arrays = torch.nn.ParameterList(arrays)
        self.tangents = tangents

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for number in range(0, len(self.arrays), 2):
            x = x @ self.arrays[number] + self.arrays[number + 1]
            x = torch.tanh(x) if self.tangents else x
        return x


def _modules(params: dict[str, Any]) -> tuple[torch.nn.Module, torch.nn.ModuleDict]:
    """The trunk, and the heads by name."""
    heads = {name: Layers(layers, False) for name, layers in params.items() if name != "trunk"}
    return Layers(params["trunk"], True), torch.nn.ModuleDict(heads)


class UnderTorchJD(torch.nn.Module):
    """A trunk whose gradients an aggregator combines; each head keeps its own."""

    def __init__(self, params: dict[str, Any], aggregator: Callable[[], Any]) -> None:
        super().__init__()
        self.encoder, self.decoders = _modules(params)
        self.aggregator = aggregator()

    def forward(self, inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        self.features = self.encoder(inputs)
        return {name: head(self.features) for name, head in self.decoders.items()}

    def backward(self, losses: list[torch.Tensor]) -> None:
        """The gradients of all parameters."""
        autojac.mtl_backward(losses, features=self.features)
        autojac.jac_to_grad(list(self.encoder.parameters()), self.aggregator)


def libmtl_is_installed() -> bool:
    """Whether it can be imported by `libmtl`."""
    return importlib.util.find_spec("LibMTL") is not None


@contextmanager
def _torchvision_of_then() -> Iterator[None]:
    """What LibMTL's residual networks, unused here, import and torchvision no longer has."""
    absent = ModuleType("torchvision.models.utils")
    absent.load_state_dict_from_url = None
    names = ("torchvision", "torchvision.models", absent.__name__)
    before = {name: sys.modules[name] for name in names if name in sys.modules}
    sys.modules.update({name: ModuleType(name) for name in names} | {absent.__name__: absent})
    try:
        yield
    finally:
        for name in names:
            del sys.modules[name]
        sys.modules.update(before)


def libmtl() -> ModuleType:
    """LibMTL, version 1.1.5.

    Raises:
      ModuleNotFoundError: it is not installed.
    """
    with _torchvision_of_then():
        return importlib.import_module("LibMTL")


def under_libmtl(
    params: dict[str, Any], weighting: str, at_features: bool = False, **settings: Any
) -> torch.nn.Module:
    """A trunk and heads under a weighting, put together as LibMTL's trainer does on a GPU.

    Args:
      params: of the trunk and, by name, of the heads.
      weighting: the name of its class.
      at_features: whether it takes the gradients of the features instead of the trunk's.
      **settings: LibMTL's own defaults.
    """
    library = libmtl()

    class Model(library.architecture.HPS, getattr(library.weighting, weighting)):
        def zero_grad_share_params(self) -> None:
            # LibMTL writes into these gradients, so they have to be there.
            self.encoder.zero_grad(set_to_none=False)

        def backward(self, losses: list[torch.Tensor]) -> None:
            values = torch.stack(losses)
            self.epoch, step = divmod(self.steps, EPOCH)
            if step == 0:
                self.train_loss_buffer = np.pad(self.train_loss_buffer, ((0, 0), (0, 1)))
            self.train_loss_buffer[:, self.epoch] += values.detach().numpy() / EPOCH
            self.steps += 1
            super().backward(values, **settings)

    trunk, heads = _modules(params)
    model = Model(list(heads), lambda: trunk, heads, at_features, False, torch.device("cpu"))
    model.init_param()
    model.steps, model.train_loss_buffer = 0, np.zeros((len(heads), 0))
    return model


TORCHJD: dict[str, Callable[[dict[str, Any]], torch.nn.Module]] = {
    name: functools.partial(UnderTorchJD, aggregator=aggregator)
    for name, aggregator in {
        "equal weights": aggregation.Sum,
        "PCGrad": aggregation.PCGrad,
        "UPGrad": aggregation.UPGrad,
        "MGDA": aggregation.MGDA,
        "IMTL-G": aggregation.IMTLG,
        "CAGrad": functools.partial(aggregation.CAGrad, 0.5),
        "Aligned-MTL": aggregation.AlignedMTL,
        "ConFIG": aggregation.ConFIG,
        "DualProj": aggregation.DualProj,
        "GradDrop": aggregation.GradDrop,
        "GradVac": aggregation.GradVac,
        "Random": aggregation.Random,
    }.items()
}
LIBMTL: dict[str, Callable[[dict[str, Any]], torch.nn.Module]] = {
    name: functools.partial(under_libmtl, **settings)
    for name, settings in {
        "equal weights": {"weighting": "EW"},
        "PCGrad": {"weighting": "PCGrad"},
        "MGDA": {"weighting": "MGDA", "mgda_gn": "none"},
        "IMTL": {"weighting": "IMTL"},
        "uncertainty": {"weighting": "UW"},
        "DWA": {"weighting": "DWA", "T": 2.0},
        "GradDrop": {"weighting": "GradDrop", "leak": 0.0, "at_features": True},
        "GradVac": {"weighting": "GradVac", "beta": 0.5},
        "GradNorm": {"weighting": "GradNorm", "alpha": 1.5},
        "geometric mean": {"weighting": "GLS"},
        "Random": {"weighting": "RLW", "dist": "Normal"},
    }.items()
}
"""All that LibMTL has except CAGrad, which it has for three tasks only."""


def train(
    model: Any,
    batches: Sequence[Sequence[int]],
    data: tuple[Any, Any],
    classes: int,
    rate: float,
) -> dict[str, Any]:
    """A model's parameters after a training by Adam.

    Args:
      model: whose ``backward`` sets all gradients.
      batches: rows of the data, step by step.
      data: inputs, and targets of all tasks.
      classes: how many a task's targets have; 0 where they are numbers.
      rate: of Adam, at the start; it falls along half a cosine.
    """
    inputs, targets = (torch.tensor(np.asarray(array)) for array in data)
    loss = torch.nn.functional.cross_entropy if classes else torch.nn.functional.mse_loss
    adam = torch.optim.Adam(model.parameters(), rate)
    falling = torch.optim.lr_scheduler.CosineAnnealingLR(adam, len(batches))
    for rows in np.array(batches):
        wanted = targets[rows].long() if classes else targets[rows]
        outputs = [out if classes else out[:, 0] for out in model(inputs[rows]).values()]
        losses = [loss(out, wanted[:, k]) for k, out in enumerate(outputs)]
        adam.zero_grad()
        model.backward(losses)
        adam.step()
        falling.step()
    parts = {"trunk": model.encoder, **model.decoders}
    return {name: _arrays(layers) for name, layers in parts.items()}


def _arrays(layers: Layers) -> list[tuple[Any, Any]]:
    """Kernels and biases."""
    arrays = [array.detach().numpy() for array in layers.arrays]
    return list(zip(arrays[::2], arrays[1::2], strict=True))


def seed(number: int) -> None:
    """Seeds what some methods draw."""
    torch.manual_seed(number)
    random.seed(number)
