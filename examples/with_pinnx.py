"""GDMAM inside PINNx: its own tutorial on Burgers' equation, in metres and seconds.

`Trainer.compile` accepts any Optax transformation, and leaves the compiled step in
`trainer.fn_train_step`. `allocate_losses` puts a step there that differentiates the losses one by
one. Points, conditions, network, units and `Trainer.train` stay PINNx's.

GDMAM is compared with what PINNx has for losses of different sizes: fixed weights. Network and
conditions are the tutorial's. Points are fewer, and drawn anew now and then. All methods have the
same seeds and rate.

    pip install pinnx
    python examples/with_pinnx.py

Prints the errors against the exact solution, and processor seconds. Takes some minutes.
"""

import contextlib
import io

import jax
import optax
from burgers import VISCOSITY
from comparing import compare, relative_error

import gdmam_jax as gdmam

try:
    import brainstate
    import braintools
    import brainunit as u
    import pinnx
except ModuleNotFoundError as error:
    raise SystemExit(f"This example needs {error.name}: pip install pinnx") from None

SPEED = u.meter / u.second
SUMMED = {
    "Adam, equal weights": (optax.adam, [1, 1, 1]),
    "Adam, data x 100": (optax.adam, [1, 100, 100]),
    "Muon, equal weights": (optax.contrib.muon, [1, 1, 1]),
}
PAIRED = {
    "GDMAM": gdmam.gdmam,
    "GDMAM, Muon": lambda rate: optax.chain(gdmam.allocate(), optax.contrib.muon(rate)),
}


def paired_gradients(trainer, inputs, targets):
    """The gradients of the conditions and of the equation, in pairs."""

    def equation():
        return u.get_magnitude(trainer.fn_outputs_losses_train(inputs, targets)[1][0])

    def conditions():
        _, *losses = trainer.fn_outputs_losses_train(inputs, targets)[1]
        return sum(u.get_magnitude(loss) for loss in jax.tree.leaves(losses))

    return gdmam.pair_gradients(
        *(brainstate.transform.grad(loss, trainer.params)() for loss in (conditions, equation))
    )


def allocate_losses(trainer):
    """Gives a compiled trainer a step that hands its optimizer the gradients in pairs."""

    def train_step(inputs, targets):
        trainer.optimizer.update(paired_gradients(trainer, inputs, targets))

    trainer.fn_train_step = brainstate.transform.jit(train_step)


def make_problem(seed, loss_weights=None):
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
        slopes = network.jacobian(points)["y"]
        bend = network.hessian(points, xi="x", xj="x")["y"]["x"]["x"]
        viscosity = VISCOSITY * u.meter**2 / u.second
        return slopes["t"] + outputs["y"] * slopes["x"] - viscosity * bend

    return pinnx.problem.TimePDE(
        domain,
        residual,
        [at_ends, at_first],
        network,
        **{"num_domain": 256, "num_boundary": 64, "num_initial": 64},
        train_distribution="pseudo",
        loss_weights=loss_weights,
    )


def train(method, seed, steps, learning_rate):
    """A training by `Trainer.train`."""
    make_optimizer, weights = SUMMED[method] if method in SUMMED else (PAIRED[method], None)
    optimizer = make_optimizer(optax.cosine_decay_schedule(learning_rate, steps))
    with contextlib.redirect_stdout(io.StringIO()):
        trainer = pinnx.Trainer(make_problem(seed, weights))
        trainer.compile(braintools.optim.OptaxOptimizer(optimizer))
        if method in PAIRED:
            allocate_losses(trainer)
        new_points = pinnx.callbacks.PDEPointResampler(period=10)
        trainer.train(steps, display_every=steps, callbacks=[new_points])
    return trainer


def error(*arguments):
    trainer = train(*arguments)
    return relative_error(
        lambda x, t: u.get_magnitude(trainer.predict({"x": x * u.meter, "t": t * u.second})["y"]),
        end=0.99,
    )


if __name__ == "__main__":
    compare(__doc__, [*SUMMED, *PAIRED], error, steps=3000)
