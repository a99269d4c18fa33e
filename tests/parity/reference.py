"""Both forms of GDMAM in plain PyTorch, for comparison: written for clearness, never for speed.

Everything takes and gives dictionaries of tensors by parameter name. The dtype of the parameters is
the dtype of all arithmetic, as it is for a PyTorch user who does not mix precisions.
"""

import collections
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

EPS = 1e-12

Tensors = dict[str, Tensor]


def flat(tensors: Tensors) -> Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors.values()])


def unflat(vector: Tensor, like: Tensors) -> Tensors:
    sizes = [tensor.numel() for tensor in like.values()]
    parts = zip(like.items(), torch.split(vector, sizes), strict=True)
    return {name: part.reshape(tensor.shape) for (name, tensor), part in parts}


class Geometry:
    """Norms, cosine and components of two gradient vectors."""

    def __init__(self, prediction: Tensor, alignment: Tensor) -> None:
        self.n_p = torch.linalg.vector_norm(prediction) + EPS
        self.n_a = torch.linalg.vector_norm(alignment) + EPS
        product = torch.dot(alignment, prediction)
        nothing = self.n_p <= EPS
        c = torch.zeros_like(product) if nothing else product / self.n_p**2
        self.prediction = prediction
        self.parallel = c * prediction
        self.orthogonal = alignment - self.parallel
        self.n_par = torch.linalg.vector_norm(self.parallel) + EPS
        self.n_orth = torch.linalg.vector_norm(self.orthogonal) + EPS
        self.cosine = torch.clamp(product / (self.n_a * self.n_p), -1, 1)


class Statistics:
    """Running statistics of three norms, and the momentum coefficients that follow them."""

    def __init__(self, rule: str = "ratcheted", initial: float = 0.95) -> None:
        self.rule = rule
        self.initial = initial
        self.beta: Any = initial
        self.mean: Any = 0.0
        self.square: Any = 0.0
        self.sigma: Any = None
        self.seen: list[Tensor] = []

    def update(
        self, norms: tuple[Tensor, ...], minimum: float = 0.7, maximum: float = 0.999
    ) -> tuple[Tensor, Tensor, Tensor]:
        norms = torch.stack(norms)
        self.mean = 0.9 * self.mean + 0.1 * norms
        self.square = 0.9 * self.square + 0.1 * norms**2
        self.seen.append(norms)
        self.sigma = torch.sqrt(torch.clamp(self.square - self.mean**2, min=0))
        kappa = torch.tensor([0.05, 0.1, 0.1], dtype=norms.dtype)
        if self.rule == "ratcheted":
            beta = self.beta - kappa * self.sigma
        elif self.rule == "anchored":
            beta = self.initial - kappa * self.sigma
        elif self.rule == "constant":
            beta = torch.full_like(norms, self.initial)
        else:
            # Bias-corrected statistics are weighted averages over the norms seen so far.
            ages = torch.arange(len(self.seen) - 1, -1, -1, dtype=norms.dtype)
            weights = (0.9**ages / torch.sum(0.9**ages))[:, None]
            mean = torch.sum(weights * torch.stack(self.seen), 0)
            variance = torch.sum(weights * (torch.stack(self.seen) - mean) ** 2, 0)
            mean = torch.where(mean > 0, mean, EPS)
            beta = self.initial - 0.25 * torch.sqrt(variance) / mean
        self.beta = torch.clamp(beta, minimum, maximum)
        return tuple(self.beta)


class RecentNormClipping:
    def __init__(self, factor: float = 5.0, window: int = 5) -> None:
        self.factor = factor
        self.queue: Any = collections.deque([float("inf")], maxlen=window)
        self.clipped: list[bool] = []
        self.limits: list[float] = []

    def __call__(self, gradient: Tensor) -> Tensor:
        largest = max(self.queue)
        norm = torch.linalg.vector_norm(gradient).item()
        scale = min(1.0, self.factor * largest / (norm + 1e-6))
        self.queue.append(min(norm, 2 * largest, 1.0))
        self.clipped.append(scale < 1)
        self.limits.append(self.factor * largest)
        return gradient * scale


class Released:
    """One `torch.optim.AdamW` with AMSGrad, its first decay set anew before each step."""

    def __init__(self, parameters: Tensors, learning_rate: float, weight_decay: float) -> None:
        self.parameters = parameters
        weights = [p for name, p in parameters.items() if "bias" not in name.split(".")[-1]]
        biases = [p for name, p in parameters.items() if "bias" in name.split(".")[-1]]
        self.optimizer = torch.optim.AdamW(
            [{"params": weights, "weight_decay": weight_decay}, {"params": biases}],
            lr=learning_rate,
            amsgrad=True,
        )
        self.statistics = Statistics()
        self.clipping = RecentNormClipping()

    def step(self, prediction: Tensors, alignment: Tensors) -> dict[str, float]:
        g_p, g_a = flat(prediction), flat(alignment)
        geometry = Geometry(g_p, g_a)
        w_p = geometry.n_p / (geometry.n_p + geometry.n_a)
        w_a = geometry.n_a / (geometry.n_p + geometry.n_a)
        gate = torch.clamp(geometry.cosine, 0, 1)
        norms = (geometry.n_p, geometry.n_par, geometry.n_orth)
        beta_p, beta_par, beta_orth = self.statistics.update(norms)
        b1 = torch.clamp(w_p * beta_p + gate * beta_par + (1 - gate) * beta_orth, 0.7, 0.999)
        gradient = w_p * g_p + w_a * g_a
        norm = torch.linalg.vector_norm(gradient).item()
        clipped = unflat(self.clipping(gradient), self.parameters)
        for name, parameter in self.parameters.items():
            parameter.grad = clipped[name]
        for group in self.optimizer.param_groups:
            group["betas"] = (b1.item(), 0.999)
        self.optimizer.step()
        return {
            "cosine": geometry.cosine.item(),
            "b1": b1.item(),
            "clipped": float(self.clipping.clipped[-1]),
            "norm": norm,
        }


class Allocated:
    """Weigh, gate, remember; then decoupled weight decay and the learning rate.

    `clip` is the largest norm that both gradients together may have; `groups` maps a parameter's
    name to the scope it is decomposed in.
    """

    def __init__(
        self,
        parameters: Tensors,
        learning_rate: float,
        weight_decay: float,
        *,
        weighting: str | tuple[float, float] = "unit",
        gate: str = "priority",
        momentum: str = "constant",
        momenta: str = "steered",
        b2: float | None = 0.999,
        amsgrad: bool = False,
        clip: float | None = None,
        scope: Callable[[str], str] = lambda name: "all",
    ) -> None:
        self.learning_rate, self.weight_decay, self.clip = learning_rate, weight_decay, clip
        self.scopes: dict[str, _Scope] = {}
        for label in dict.fromkeys(map(scope, parameters)):
            members = {name: p for name, p in parameters.items() if scope(name) == label}
            self.scopes[label] = _Scope(members, weighting, gate, momentum, momenta, b2, amsgrad)

    def step(self, prediction: Tensors, alignment: Tensors) -> dict[str, float]:
        g_p, g_a = flat(prediction), flat(alignment)
        norm = torch.sqrt(torch.sum(g_p**2) + torch.sum(g_a**2))
        clipped = self.clip is not None and bool(norm >= self.clip)
        factor = self.clip / norm if clipped else torch.ones_like(norm)
        prediction = {name: factor * gradient for name, gradient in prediction.items()}
        alignment = {name: factor * gradient for name, gradient in alignment.items()}
        for scope in self.scopes.values():
            cosine = scope.step(prediction, alignment, self.learning_rate, self.weight_decay)
        return {"cosine": cosine, "clipped": float(clipped), "norm": norm.item()}


class _Scope:
    def __init__(
        self,
        parameters: Tensors,
        weighting: str | tuple[float, float],
        gate: str,
        momentum: str,
        momenta: str,
        b2: float | None,
        amsgrad: bool,
    ) -> None:
        self.parameters = parameters
        self.weighting, self.gate, self.b2, self.amsgrad = weighting, gate, b2, amsgrad
        self.statistics, self.momenta = Statistics(momentum), momenta
        zeros = torch.zeros_like(flat(parameters))
        self.m = [zeros.clone() for _ in range(3)]
        self.product = torch.ones(3, dtype=zeros.dtype)
        self.v, self.v_max, self.steps = zeros.clone(), zeros.clone(), 0
        self.lengths: list[Tensor] = []

    def weights(self, prediction: Tensor, alignment: Tensor) -> tuple[Any, Any]:
        length_p = torch.linalg.vector_norm(prediction)
        length_a = torch.linalg.vector_norm(alignment)
        self.lengths.append(torch.stack([length_p, length_a]))
        if isinstance(self.weighting, tuple):
            return self.weighting
        if self.weighting == "norm":
            total = length_p + length_a + 2 * EPS
            return (length_p + EPS) / total, (length_a + EPS) / total
        if self.weighting == "balanced":
            return length_a / (length_p + length_a), length_p / (length_p + length_a)
        if self.weighting == "pcgrad":
            product = torch.dot(prediction, alignment).clamp(max=0)
            return 1 - product / length_p**2, 1 - product / length_a**2
        ages = torch.arange(len(self.lengths) - 1, -1, -1, dtype=length_p.dtype)
        decayed = 0.9**ages / torch.sum(0.9**ages)
        means = torch.sum(decayed[:, None] * torch.stack(self.lengths), 0)
        return 1 / torch.maximum(means[0], length_p), 1 / torch.maximum(means[1], length_a)

    def gates(self, cosine: Tensor, ratio: Tensor) -> tuple[Any, Any]:
        if self.gate == "cosine":
            return torch.clamp(cosine, 0, 1), 1 - torch.clamp(cosine, 0, 1)
        if self.gate == "conflict":
            return float(cosine > 0), 1.0
        if self.gate == "priority" and cosine < 0:
            k = -cosine
            return torch.clamp((k / ratio + k**2 - 1) / k**2, 0, 1), 1.0
        return 1.0, 1.0

    def step(
        self, prediction: Tensors, alignment: Tensors, learning_rate: float, weight_decay: float
    ) -> float:
        g_p, g_a = (flat({k: g[k] for k in self.parameters}) for g in (prediction, alignment))
        geometry = Geometry(g_p, g_a)
        w_p, w_a = self.weights(g_p, g_a)
        v_par, v_orth = self.gates(geometry.cosine, w_a * geometry.n_a / (w_p * geometry.n_p))
        factors = (w_p, w_a * v_par, w_a * v_orth)
        norms = (geometry.n_p, geometry.n_par, geometry.n_orth)
        sizes = tuple(torch.as_tensor(f * n) for f, n in zip(factors, norms, strict=True))
        beta = self.statistics.update(sizes)
        components = [
            factor * part
            for factor, part in zip(
                factors, (geometry.prediction, geometry.parallel, geometry.orthogonal), strict=True
            )
        ]
        if self.momenta == "steered":
            steered = sum(b * n for b, n in zip(beta, sizes, strict=True)) / sum(sizes)
            beta = (steered, steered, steered)
        self.product = self.product * torch.stack(beta)
        u = torch.zeros_like(self.v)
        for k in range(3):
            self.m[k] = beta[k] * self.m[k] + (1 - beta[k]) * components[k]
            u = u + self.m[k] / (1 - self.product[k])
        if self.b2 is not None:
            self.steps += 1
            self.v = self.b2 * self.v + (1 - self.b2) * sum(components) ** 2
            self.v_max = torch.maximum(self.v_max, self.v)
            v = self.v_max if self.amsgrad else self.v
            u = u / (torch.sqrt(v) / (1 - self.b2**self.steps) ** 0.5 + 1e-8)
        with torch.no_grad():
            for name, update in unflat(u, self.parameters).items():
                parameter = self.parameters[name]
                parameter -= learning_rate * (update + weight_decay * parameter)
        return geometry.cosine.item()
