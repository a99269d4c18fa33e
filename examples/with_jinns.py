"""Inside jinns: its tutorial on Burgers' equation with the losses' gradients allocated by GDMAM.

`jinns.solve` takes the gradient of every loss by itself, and hands them to an optimizer that asks
for them. So its own loop, losses, points and network stay: only the optimizer is another.

Beside it jinns' own adaptive weights: ReLoBRaLo, and learning-rate annealing, which is the one that
looks at gradients. Same seeds, points, network and learning rate.

    pip install jinns
    python examples/with_jinns.py

Prints the errors against the exact solution. About a minute on two cores.
"""

import argparse
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from burgers import VISCOSITY, exact

import gdmam_jax as gdmam

try:
    import equinox as eqx
    import jinns
except ModuleNotFoundError as error:
    raise SystemExit(f"This example needs {error.name}: pip install jinns") from None


def paired(optimizer):
    """Makes an optimizer of pairs one for jinns, which gives it the gradients by terms."""

    def update(updates, state, params, *, terms):
        del updates  # jinns' weighted sum of the gradients
        data = jax.tree.map(jnp.add, terms.initial_condition, terms.boundary_loss)
        pairs = gdmam.pair_gradients(data, terms.dyn_loss[0])
        return optimizer.update(pairs, state, params)

    return optax.GradientTransformationExtraArgs(optimizer.init, update)


# No weight decay in gdmam: it would reach the viscosity, which is one of jinns' parameters.
METHODS = {
    "Adam, equal weights": (optax.adam, None),
    "Adam, ReLoBRaLo": (optax.adam, "ReLoBRaLo"),
    "Adam, annealing": (optax.adam, "lr_annealing"),
    "Muon, equal weights": (optax.contrib.muon, None),
    "Muon, annealing": (optax.contrib.muon, "lr_annealing"),
    "GDMAM": (lambda rate: paired(gdmam.gdmam(rate, weight_decay=0.0)), None),
    "GDMAM, Muon": (
        lambda rate: paired(optax.chain(gdmam.allocate(), optax.contrib.muon(rate))),
        None,
    ),
}


def problem(seed, width=16, update_weight_method=None):
    """The tutorial's network, points and losses, from (t, x) to u."""
    sizes = [(2, width), (width, width), (width, width), (width, 1)]
    layers = [layer for size in sizes for layer in ((eqx.nn.Linear, *size), (jax.nn.tanh,))]
    key_of_network, key_of_points = jax.random.split(jax.random.PRNGKey(seed))
    network, start = jinns.nn.PINN_MLP.create(
        key=key_of_network, eqx_list=tuple(layers[:-1]), eq_type="PDENonStatio"
    )
    params = jinns.parameters.Params(nn_params=start, eq_params={"nu": jnp.float32(VISCOSITY)})
    points = jinns.data.CubicMeshPDENonStatio(
        key=key_of_points,
        **{"n": 5000, "ni": 2000, "nb": 2000, "method": "uniform"},
        **{"domain_batch_size": 256, "initial_batch_size": 64, "border_batch_size": 64},
        **{"dim": 1, "min_pts": (-1,), "max_pts": (1,), "tmin": 0, "tmax": 1},
    )
    weights = jinns.loss.LossWeightsPDENonStatio(
        dyn_loss=1.0, initial_condition=1.0, boundary_loss=1.0
    )
    loss = jinns.loss.LossPDENonStatio(
        u=network,
        dynamic_loss=jinns.loss.BurgersEquation(Tmax=1),
        initial_condition_fun=lambda x: -jnp.sin(jnp.pi * x),
        boundary_condition=jinns.loss.Dirichlet(),
        loss_weights=weights,
        params=params,
        update_weight_method=update_weight_method,
    )
    return network, params, points, loss


def train(method, seed, steps, learning_rate):
    """A training by `jinns.solve`; the network, and the parameters that it ends with."""
    make_optimizer, update_weight_method = METHODS[method]
    network, params, points, loss = problem(seed, update_weight_method=update_weight_method)
    terms = {"terms": jinns.solver.GetJinnsVariableName("grad_terms")}
    solution = jinns.solve(
        n_iter=steps,
        init_params=params,
        data=points,
        loss=loss,
        optimizer=make_optimizer(optax.cosine_decay_schedule(learning_rate, steps)),
        extra_optax_args_and_kwargs=terms if method.startswith("GDMAM") else None,
        key=jax.random.PRNGKey(seed),
        verbose=False,
    )
    return network, solution[0]


def relative_error(network, params):
    """Against the exact solution, on a grid."""
    x, t = np.meshgrid(np.linspace(-1, 1, 101), np.linspace(0, 1, 101))
    expected = exact(np.stack([x.ravel(), t.ravel()], axis=1))
    points = jnp.stack([t.ravel(), x.ravel()], axis=1)
    found = jax.vmap(lambda point: network(point, params))(points)
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
            relative_error(*train(name, seed, arguments.steps, arguments.learning_rate))
            for seed in range(arguments.seeds)
        ]
        seconds = (time.monotonic() - began) / arguments.seeds
        print(f"{name:20} {np.median(errors):8.4f} {min(errors):8.4f} {max(errors):8.4f} {seconds:8.1f}")


if __name__ == "__main__":
    main()
