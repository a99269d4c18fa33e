"""Inside PINNx: its tutorial on Burgers' equation, in metres and seconds, gradients by GDMAM.

`Trainer.compile` takes any transformation of Optax, and leaves the compiled step in
`trainer.fn_train_step`. A step that differentiates the losses one by one goes there:
`allocate_losses`. Points, conditions, network, units and `Trainer.train` stay PINNx's.

Beside it what PINNx has for losses of different sizes, fixed weights. Same seeds, points, network
and learning rate.

    pip install pinnx
    python examples/with_pinnx.py

Prints the errors against the exact solution. About two minutes on two cores.
"""

import argparse
import contextlib
import io
import time

import jax
import numpy as np
import optax
from burgers import VISCOSITY, exact

import gdmam_jax as gdmam

try:
    import brainstate
    import braintools
    import brainunit as u
    import pinnx
except ModuleNotFoundError as error:
    raise SystemExit(f"This example needs {error.name}: pip install pinnx") from None

SPEED = u.meter / u.second
METHODS = {
    "Adam, equal weights": (optax.adam, [1, 1, 1]),
    "Adam, data x 100": (optax.adam, [1, 100, 100]),
    "Muon, equal weights": (optax.contrib.muon, [1, 1, 1]),
    "GDMAM": (gdmam.gdmam, None),
    "GDMAM, Muon": (
        lambda rate: optax.chain(gdmam.allocate(), optax.contrib.muon(rate)),
        None,
    ),
}


def gradients(trainer, inputs, targets):
    """The gradients of the conditions and of the equation, in pairs."""

    def losses():
        equation, *conditions = trainer.fn_outputs_losses_train(inputs, targets)[1]
        return jax.tree.map(u.get_magnitude, (conditions, equation), is_leaf=u.math.is_quantity)

    def gradient(loss):
        return brainstate.transform.grad(loss, grad_states=trainer.params)()

    return gdmam.pair_gradients(
        gradient(lambda: sum(jax.tree.leaves(losses()[0]))), gradient(lambda: losses()[1])
    )


def allocate_losses(trainer):
    """Gives the gradients of a compiled trainer to its optimizer in pairs."""

    def train_step(inputs, targets):
        trainer.optimizer.update(gradients(trainer, inputs, targets))

    trainer.fn_train_step = brainstate.transform.jit(train_step)


def make_problem(seed, loss_weights=None, points_inside=2540):
    """PINNx's tutorial, as it comes."""
    brainstate.random.seed(seed)
    domain = pinnx.geometry.GeometryXTime(
        pinnx.geometry.Interval(-1, 1.0), pinnx.geometry.TimeDomain(0, 0.99)
    ).to_dict_point(x=u.meter, t=u.second)
    at_ends = pinnx.icbc.DirichletBC(lambda x: {"y": 0.0 * SPEED})
    at_first = pinnx.icbc.IC(lambda x: {"y": -u.math.sin(u.math.pi * x["x"] / u.meter) * SPEED})
    network = pinnx.nn.Model(
        pinnx.nn.DictToArray(x=u.meter, t=u.second),
        pinnx.nn.FNN([2, 20, 20, 20, 1], "tanh", braintools.init.KaimingUniform()),
        pinnx.nn.ArrayToDict(y=SPEED),
    )

    def residual(points, outputs):
        slopes, bends = network.jacobian(points)["y"], network.hessian(points)["y"]
        viscosity = VISCOSITY * u.meter**2 / u.second
        return slopes["t"] + outputs["y"] * slopes["x"] - viscosity * bends["x"]["x"]

    return pinnx.problem.TimePDE(
        domain,
        residual,
        [at_ends, at_first],
        network,
        num_domain=points_inside,
        num_boundary=80,
        num_initial=160,
        train_distribution="pseudo",  # the default needs scikit-optimize
        loss_weights=loss_weights,
    )


def train(method, seed, steps, learning_rate):
    """A training by `Trainer.train`."""
    make_optimizer, loss_weights = METHODS[method]
    optimizer = make_optimizer(optax.cosine_decay_schedule(learning_rate, steps))
    with contextlib.redirect_stdout(io.StringIO()):
        trainer = pinnx.Trainer(make_problem(seed, loss_weights))
        trainer.compile(braintools.optim.OptaxOptimizer(optimizer))
        if loss_weights is None:
            allocate_losses(trainer)
        trainer.train(steps, display_every=steps)
    return trainer


def relative_error(trainer):
    """Against the exact solution, on a grid."""
    x, t = np.meshgrid(np.linspace(-1, 1, 101), np.linspace(0, 0.99, 101))
    expected = exact(np.stack([x.ravel(), t.ravel()], axis=1)).ravel()
    points = {"x": np.float32(x.ravel()) * u.meter, "t": np.float32(t.ravel()) * u.second}
    found = np.asarray(u.get_magnitude(trainer.predict(points)["y"]))
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=5000, help="per training (5000)")
    parser.add_argument("--learning-rate", type=float, default=1e-2, help="at first (1e-2)")
    parser.add_argument("--seeds", type=int, default=1, help="networks per method (1)")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
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
