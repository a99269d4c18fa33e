"""Inside DeepXDE, with its JAX backend: its example on Burgers' equation, gradients by GDMAM.

`Model.compile` takes any optimizer of Optax, and leaves the compiled step in `model.train_step`.
A step that differentiates the losses one by one goes there: `allocate_losses`. Points, conditions,
network, callbacks and `Model.train` stay DeepXDE's.

Beside it what DeepXDE has for losses of different sizes, fixed weights. Same seeds, points, network
and learning rate.

    pip install deepxde flax
    python examples/with_deepxde.py

Prints the errors against the exact solution. About two minutes on two cores.
"""

import argparse
import contextlib
import io
import os
import time

import jax
import numpy as np
import optax
from burgers import VISCOSITY, exact

import gdmam_jax as gdmam

os.environ["DDE_BACKEND"] = "jax"
try:
    import deepxde as dde
except ModuleNotFoundError as error:
    raise SystemExit(f"This example needs {error.name}: pip install deepxde flax") from None

# DeepXDE's own step gives optimizers no parameters, which Muon asks for: it, too, takes pairs.
PLAIN = {
    "Adam, equal weights": (optax.adam, [1, 1, 1]),
    "Adam, data x 100": (optax.adam, [1, 100, 100]),
}
PAIRED = {
    "Muon, equal weights": lambda rate: gdmam.summed(optax.contrib.muon(rate)),
    "GDMAM": gdmam.gdmam,
    "GDMAM, Muon": lambda rate: optax.chain(gdmam.allocate(), optax.contrib.muon(rate)),
}
METHODS = [*PLAIN, *PAIRED]


def allocate_losses(model):
    """Gives the gradients of a compiled model to its optimizer in pairs."""

    def losses(params, inputs, targets):
        equation, *conditions = model.outputs_losses_train(params, inputs, targets)[1]
        return sum(conditions), equation

    @jax.jit
    def train_step(params, opt_state, inputs, targets):
        _, pairs = gdmam.value_and_paired_grad(losses)(params, inputs, targets)
        updates, opt_state = model.opt.update(pairs, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    model.train_step = train_step


def residual(points, outputs):
    """How far u(x, t) is from solving the equation."""
    (u_x, _), (u_t, _) = (dde.grad.jacobian(outputs, points, i=0, j=j) for j in (0, 1))
    u_xx, _ = dde.grad.hessian(outputs, points, i=0, j=0)
    return u_t + outputs[0] * u_x - VISCOSITY * u_xx


def make_model(seed, points_inside=2540):
    """DeepXDE's example, as it comes."""
    dde.config.set_random_seed(seed)
    domain = dde.geometry.GeometryXTime(
        dde.geometry.Interval(-1, 1), dde.geometry.TimeDomain(0, 0.99)
    )
    at_ends = dde.icbc.DirichletBC(domain, lambda x: 0, lambda _, on_boundary: on_boundary)
    at_first = dde.icbc.IC(
        domain, lambda x: -np.sin(np.pi * x[:, :1]), lambda _, on_initial: on_initial
    )
    data = dde.data.TimePDE(
        domain,
        residual,
        [at_ends, at_first],
        num_domain=points_inside,
        num_boundary=80,
        num_initial=160,
    )
    return dde.Model(data, dde.nn.FNN([2, 20, 20, 20, 1], "tanh", "Glorot normal"))


def train(method, seed, steps, learning_rate):
    """A training by `Model.train`."""
    make_optimizer, weights = PLAIN[method] if method in PLAIN else (PAIRED[method], None)
    with contextlib.redirect_stdout(io.StringIO()):
        model = make_model(seed)
        optimizer = make_optimizer(optax.cosine_decay_schedule(learning_rate, steps))
        model.compile(optimizer, loss_weights=weights)
        if method in PAIRED:
            allocate_losses(model)
        model.train(iterations=steps, display_every=steps)
    return model


def relative_error(model):
    """Against the exact solution, on a grid."""
    x, t = np.meshgrid(np.linspace(-1, 1, 101), np.linspace(0, 0.99, 101))
    points = np.stack([x.ravel(), t.ravel()], axis=1)
    expected = exact(points)
    found = model.predict(points.astype(np.float32))
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=5000, help="per training (5000)")
    parser.add_argument("--learning-rate", type=float, default=1e-2, help="at first (1e-2)")
    parser.add_argument("--seeds", type=int, default=1, help="networks per method (1)")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    arguments = parser.parse_args()
    if arguments.steps < 1 or arguments.seeds < 1:
        parser.error("--steps and --seeds must be at least 1")
    print(f"{'':20} {'error':>8} {'lowest':>8} {'highest':>8} {'seconds':>8}")
    for name in arguments.methods:
        began = time.monotonic()
        errors = [
            relative_error(train(name, seed, arguments.steps, arguments.learning_rate))
            for seed in range(arguments.seeds)
        ]
        took = (time.monotonic() - began) / arguments.seeds
        print(f"{name:20} {np.median(errors):8.4f} {min(errors):8.4f} {max(errors):8.4f} {took:8.1f}")


if __name__ == "__main__":
    main()
