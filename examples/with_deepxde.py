"""GDMAM inside DeepXDE, with its JAX backend: its own example on Burgers' equation.

`Model.compile` accepts any Optax optimizer, and leaves the compiled step in `model.train_step`.
`allocate_losses` puts a step there that differentiates the losses one by one. Points, conditions,
network, callbacks and `Model.train` stay DeepXDE's.

GDMAM is compared with what DeepXDE has for losses of different sizes: fixed weights. Network and
conditions are the example's. Points are fewer, and drawn anew now and then. All methods have the
same seeds and rate.

    pip install deepxde flax
    python examples/with_deepxde.py

Prints the errors against the exact solution, and processor seconds. Takes some minutes.
"""

import contextlib
import io
import os

import jax
import numpy as np
import optax
from burgers import VISCOSITY
from comparing import compare, relative_error

import gdmam_jax as gdmam

os.environ["DDE_BACKEND"] = "jax"
try:
    import deepxde as dde
except ModuleNotFoundError as error:
    raise SystemExit(f"This example needs {error.name}: pip install deepxde flax") from None

SUMMED = {"Adam, equal weights": [1, 1, 1], "Adam, data x 100": [1, 100, 100]}
# Muon needs the parameters, which DeepXDE's own step does not pass on: so Muon takes pairs, too.
PAIRED = {
    "Muon, equal weights": lambda rate: gdmam.summed(optax.contrib.muon(rate)),
    "GDMAM": gdmam.gdmam,
    "GDMAM, Muon": lambda rate: optax.chain(gdmam.allocate(), optax.contrib.muon(rate)),
}


def allocate_losses(model):
    """Gives a compiled model a step that hands its optimizer the gradients in pairs."""

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


def make_model(seed):
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
        **{"num_domain": 256, "num_boundary": 64, "num_initial": 64},
        train_distribution="pseudo",
    )
    return dde.Model(data, dde.nn.FNN([2, 20, 20, 20, 1], "tanh", "Glorot normal"))


def train(method, seed, steps, learning_rate):
    """A training by `Model.train`."""
    with contextlib.redirect_stdout(io.StringIO()):
        model = make_model(seed)
        optimizer = PAIRED.get(method, optax.adam)
        model.compile(
            optimizer(optax.cosine_decay_schedule(learning_rate, steps)),
            loss_weights=SUMMED.get(method),
        )
        if method in PAIRED:
            allocate_losses(model)
        new_points = dde.callbacks.PDEPointResampler(period=10)
        model.train(iterations=steps, display_every=steps, callbacks=[new_points])
    return model


def error(*arguments):
    model = train(*arguments)
    return relative_error(lambda x, t: model.predict(np.stack([x, t], axis=1)), end=0.99)


if __name__ == "__main__":
    compare(__doc__, [*SUMMED, *PAIRED], error, steps=3000)
