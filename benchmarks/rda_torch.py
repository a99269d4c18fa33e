"""RDA trained in PyTorch, written as the released code is.

GDMAM makes two `torch.autograd.grad` calls, one for each loss, then a backward pass of the weighted
sum. RDA's own method makes one backward pass of the sum, divided by its value.
"""

import collections
import copy
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

EPS = 1e-12


class RDA(nn.Module):
    """The model of `gdmam_jax.ldl.models.RDA`."""

    def __init__(
        self,
        num_features: int,
        num_labels: int,
        hidden: int = 100,
        log_variance_bound: float | None = 2.0,
    ) -> None:
        super().__init__()
        self.log_variance_bound = log_variance_bound
        self.encoder_x = nn.Linear(num_features, hidden)
        self.encoder_x_mean = nn.Linear(hidden, hidden)
        self.encoder_x_log_variance = nn.Linear(hidden, hidden)
        self.encoder_y = nn.Linear(num_labels, hidden)
        self.encoder_y_mean = nn.Linear(hidden, hidden)
        self.encoder_y_log_variance = nn.Linear(hidden, hidden)
        self.decoder = nn.Linear(hidden, num_labels)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.kaiming_normal_(module.weight)
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(torch.relu(self.encoder_x(x)))

    def losses(
        self,
        x: Tensor,
        y: Tensor,
        frequency: Tensor,
        samples: int,
        weight: float,
        similarity: str = "sum",
    ) -> tuple[Tensor, Tensor]:
        """Prediction and alignment loss; `weight` is all three lambdas."""
        h, k = self.encoder_x(x), self.encoder_y(y)
        mean_x, log_variance_x = (
            self.encoder_x_mean(h),
            self._bounded(self.encoder_x_log_variance(h)),
        )
        mean_y, log_variance_y = (
            self.encoder_y_mean(k),
            self._bounded(self.encoder_y_log_variance(k)),
        )
        z_x = mean_x + torch.randn_like(mean_x) * torch.exp(log_variance_x / 2)
        z_y = mean_y + torch.randn_like(mean_y) * torch.exp(log_variance_y / 2)
        prediction = balanced_loss(self.decoder(torch.relu(h)), y, frequency, samples)
        recovery = functional.cross_entropy(self.decoder(z_y), y)
        v_y = log_variance_y.detach()
        divergence = v_y - log_variance_x - 1
        divergence = divergence + torch.exp(log_variance_x - v_y)
        divergence = divergence + (mean_x - mean_y.detach()) ** 2 * torch.exp(-v_y)
        target = 0.5 * divergence.sum(1).mean()
        unit_x, unit_y = functional.normalize(z_x), functional.normalize(z_y)
        difference = (unit_x @ unit_x.T - unit_y @ unit_y.T) ** 2
        arrangement = difference.sum() if similarity == "sum" else difference.mean()
        return prediction, weight * (recovery + target + arrangement)

    def _bounded(self, log_variance: Tensor) -> Tensor:
        bound = self.log_variance_bound
        return log_variance if bound is None else bound * torch.tanh(log_variance / bound)


def balanced_loss(logits: Tensor, y: Tensor, frequency: Tensor, samples: int) -> Tensor:
    rate = (1 / frequency) / (y / frequency).sum(1, keepdim=True)
    weight = torch.sigmoid(10 * (rate - 0.9)) + 0.1
    logits = logits - 0.05 * torch.log(samples / frequency - 1)
    logits = y * logits + (1 - y) * 2 * logits
    weight = y * weight + (1 - y) * weight / 2
    p = torch.softmax(logits, 1)
    ratio = torch.clamp(y / torch.clamp(p, min=1e-14), min=1e-14)
    return ((1 - p) ** 2 * weight * y * torch.log(ratio)).mean()


class Trainer:
    """A model with its optimizer; `step` is one training step as the released code makes it."""

    def __init__(self, model: RDA, frequency: Tensor, samples: int, weight: float = 0.1) -> None:
        self.model, self.frequency, self.samples, self.weight = model, frequency, samples, weight
        biases = [p for name, p in model.named_parameters() if "bias" in name]
        weights = [p for name, p in model.named_parameters() if "bias" not in name]
        self.parameters = list(model.parameters())
        self.optimizer = torch.optim.AdamW(
            [{"params": weights, "weight_decay": 1e-4}, {"params": biases}], lr=1e-3, amsgrad=True
        )
        self.beta = torch.full((3,), 0.95)
        self.kappa = torch.tensor([0.05, 0.1, 0.1])
        self.mean, self.square = torch.zeros(3), torch.zeros(3)
        self.norms = collections.deque([float("inf")], maxlen=5)

    def step(self, x: Tensor, y: Tensor) -> None:
        prediction, alignment = self.model.losses(x, y, self.frequency, self.samples, self.weight)
        g_p, g_a = self._gradient(prediction), self._gradient(alignment)
        n_p, n_a = g_p.norm() + EPS, g_a.norm() + EPS
        product = torch.dot(g_a, g_p)
        parallel = product / n_p**2 * g_p
        norms = torch.stack([n_p, parallel.norm() + EPS, (g_a - parallel).norm() + EPS])
        gate = torch.clamp(product / (n_a * n_p), 0, 1)
        self.mean = 0.9 * self.mean + 0.1 * norms
        self.square = 0.9 * self.square + 0.1 * norms**2
        sigma = torch.sqrt(torch.clamp(self.square - self.mean**2, min=0))
        self.beta = torch.clamp(self.beta - self.kappa * sigma, 0.7, 0.999)
        w_p, w_a = n_p / (n_p + n_a), n_a / (n_p + n_a)
        b1 = w_p * self.beta[0] + gate * self.beta[1] + (1 - gate) * self.beta[2]
        for group in self.optimizer.param_groups:
            group["betas"] = (float(torch.clamp(b1, 0.7, 0.999)), 0.999)
        self._descend(w_p * prediction + w_a * alignment)

    def _descend(self, loss: Tensor) -> None:
        self.optimizer.zero_grad()
        loss.backward()
        limit = max(self.norms)
        norm = float(nn.utils.clip_grad_norm_(self.parameters, 5 * limit))
        self.norms.append(min(norm, 2 * limit, 1.0))
        self.optimizer.step()

    def _gradient(self, loss: Tensor) -> Tensor:
        gradients = torch.autograd.grad(
            loss, self.parameters, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        return torch.cat([gradient.reshape(-1) for gradient in gradients])


class SummedTrainer(Trainer):
    """The same with RDA's own method."""

    def step(self, x: Tensor, y: Tensor) -> None:
        losses = self.model.losses(x, y, self.frequency, self.samples, self.weight, "mean")
        total = sum(losses)
        self._descend(total / total.detach())


TRAINERS = {"gdmam-released": Trainer, "rda": SummedTrainer}
"""By the names that `gdmam_jax.ldl` gives the methods."""


def train_folds(
    folds: Any,
    epochs: int,
    seed: int,
    method: str,
    log_variance_bound: float | None,
    batch_size: int = 50,
) -> list[float]:
    """Train on every fold, keep the epoch with the best validation KLD, and give its test KLD."""
    torch.manual_seed(seed)
    results = []
    features, labels = torch.from_numpy(folds.features), torch.from_numpy(folds.labels)
    for rows, mask, validation, test, test_mask in zip(
        folds.train, folds.train_mask, folds.validation, folds.test, folds.test_mask, strict=True
    ):
        train = torch.from_numpy(np.asarray(rows[mask]))
        x, y = features[train], labels[train]
        frequency = y.sum(0)
        frequency = torch.where(frequency == 0, torch.ones_like(frequency), frequency)
        model = RDA(features.shape[1], labels.shape[1], log_variance_bound=log_variance_bound)
        trainer = TRAINERS[method](model, frequency, len(train))
        best, kept = float("inf"), copy.deepcopy(model.state_dict())
        for _ in range(epochs):
            for batch in torch.split(torch.randperm(len(train)), batch_size):
                trainer.step(x[batch], y[batch])
            score = _divergence(model, features[validation], labels[validation])
            if score < best:
                best, kept = score, copy.deepcopy(model.state_dict())
        model.load_state_dict(kept)
        rows = torch.from_numpy(np.asarray(test[test_mask]))
        results.append(_divergence(model, features[rows], labels[rows]))
    return results


@torch.no_grad()
def _divergence(model: RDA, x: Tensor, y: Tensor) -> float:
    p = torch.softmax(model(x), 1)
    ratio = torch.clamp(y / torch.clamp(p, min=1e-14), min=1e-14)
    return float((y * torch.log(ratio)).sum(1).mean())
