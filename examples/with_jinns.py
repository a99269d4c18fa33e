"""GDMAM inside jinns: its own tutorial on Burgers' equation.

`jinns.solve` differentiates every loss by itself, and hands the gradients to an optimizer that
asks for them. So its loop, losses, points and network stay, and only the optimizer changes.

GDMAM is compared with two of jinns' adaptive weights: ReLoBRaLo, and learning-rate annealing, which
looks at gradients. Network, loss and conditions are the tutorial's. All methods have the same
seeds, points and rate.

    pip install jinns
    python examples/with_jinns.py

Prints the errors against the exact solution, and processor seconds. Takes some minutes.
"""

import jax
import jax.numpy as jnp
import optax
from burgers import VISCOSITY
from comparing import compare, relative_error

import gdmam_jax as gdmam

try:
    import equinox as eqx
    import jinns
except ModuleNotFoundError as error:
    raise SystemExit(f"This example needs {error.name}: pip install jinns") from None


def paired(optimizer):
    """Lets jinns, which hands out gradients by terms, use an optimizer of pairs."""

    def update(updates, state, params, *, terms):
        del updates  # the weighted sum of the gradients
        data = jax.tree.map(jnp.add, terms.initial_condition, terms.boundary_loss)
        pairs = gdmam.pair_gradients(data, terms.dyn_loss[0])
        return optimizer.update(pairs, state, params)

    return optax.GradientTransformationExtraArgs(optimizer.init, update)


TERMS = {"terms": jinns.solver.GetJinnsVariableName("grad_terms")}
# The viscosity is one of jinns' parameters: weight decay would reach it.
PAIRED = {
    "GDMAM": lambda rate: paired(gdmam.gdmam(rate, weight_decay=0.0)),
    "GDMAM, Muon": lambda rate: paired(optax.chain(gdmam.allocate(), optax.contrib.muon(rate))),
}
SUMMED = {
    "Adam, equal weights": (optax.adam, None),
    "Adam, ReLoBRaLo": (optax.adam, "ReLoBRaLo"),
    "Adam, annealing": (optax.adam, "lr_annealing"),
    "Muon, equal weights": (optax.contrib.muon, None),
    "Muon, annealing": (optax.contrib.muon, "lr_annealing"),
}


def make_problem(seed, update_weight_method=None):
    """The network, from (t, x) to u, its parameters, points and losses."""
    sizes = [(2, 16), (16, 16), (16, 16), (16, 1)]
    layers = [layer for size in sizes for layer in ((eqx.nn.Linear, *size), (jax.nn.tanh,))]
    key_of_network, key_of_points = jax.random.split(jax.random.PRNGKey(seed))
    network, start = jinns.nn.PINN_MLP.create(
        key=key_of_network, eqx_list=tuple(layers[:-1]), eq_type="PDENonStatio"
    )
    params = jinns.parameters.Params(nn_params=start, eq_params={"nu": jnp.float32(VISCOSITY)})
    points = jinns.data.CubicMeshPDENonStatio(
        key=key_of_points,
        **{"dim": 1, "min_pts": (-1,), "max_pts": (1,), "tmin": 0, "tmax": 1},
        **{"n": 5000, "ni": 2000, "nb": 2000, "method": "uniform"},
        **{"domain_batch_size": 256, "initial_batch_size": 64, "border_batch_size": 64},
    )
    loss = jinns.loss.LossPDENonStatio(
        u=network,
        dynamic_loss=jinns.loss.BurgersEquation(Tmax=1),
        initial_condition_fun=lambda x: -jnp.sin(jnp.pi * x),
        boundary_condition=jinns.loss.Dirichlet(),
        loss_weights=jinns.loss.LossWeightsPDENonStatio(
            dyn_loss=1.0, initial_condition=1.0, boundary_loss=1.0
        ),
        params=params,
        update_weight_method=update_weight_method,
    )
    return network, params, points, loss


def train(method, seed, steps, learning_rate):
    """A training by `jinns.solve`; the network, and the parameters that it ends with."""
    make_optimizer, weights = SUMMED[method] if method in SUMMED else (PAIRED[method], None)
    network, params, points, loss = make_problem(seed, weights)
    trained, *_ = jinns.solve(
        n_iter=steps,
        init_params=params,
        data=points,
        loss=loss,
        optimizer=make_optimizer(optax.cosine_decay_schedule(learning_rate, steps)),
        extra_optax_args_and_kwargs=TERMS if method in PAIRED else None,
        key=jax.random.PRNGKey(seed),
        verbose=False,
    )
    return network, trained


def error(*arguments):
    network, params = train(*arguments)
    return relative_error(
        lambda x, t: jax.vmap(lambda point: network(point, params))(jnp.stack([t, x], axis=1))
    )


if __name__ == "__main__":
    compare(__doc__, [*SUMMED, *PAIRED], error, steps=3000)
