"""RDA against recorded runs of the released code, and its parts."""

import json
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gdmam_jax.ldl import losses
from gdmam_jax.ldl.models import RDA, ConvolutionalEncoder, draw_noise, rda_losses

LAYERS = {
    "encoder_x": "encoder_x",
    "encoder_x_mu": "encoder_x_mean",
    "encoder_x_log_var": "encoder_x_log_variance",
    "encoder_y": "encoder_y",
    "encoder_y_mu": "encoder_y_mean",
    "encoder_y_log_var": "encoder_y_log_variance",
    "decoder": "decoder",
}


def to_model(recorded, flat):
    """Recorded flat parameters in the model's layout, linear in `flat`."""
    params, start = {}, 0
    for name in map(str, recorded["param_names"]):
        shape = recorded[f"init/{name}"].shape
        value = flat[start : start + int(np.prod(shape))].reshape(shape)
        start += value.size
        layer, kind = name.rsplit(".", 1)
        entry = ("kernel", value.T) if kind == "weight" else ("bias", value)
        params.setdefault(LAYERS[layer], {})[entry[0]] = entry[1]
    return params


@pytest.mark.parametrize("name", ["released_mixed", "released_alignment_dominated"])
def test_losses_and_gradients_of_the_released_code(x64, name):
    recorded = np.load(Path(__file__).parents[1] / "data" / f"{name}.npz")
    config = json.loads(str(recorded["config"]))
    x, y = jnp.asarray(recorded["x"]), jnp.asarray(recorded["y"])
    sizes = config["num_features"], config["num_labels"], config["hidden_dim"]
    model = nnx.eval_shape(lambda: RDA(*sizes, rngs=nnx.Rngs(0), log_variance_bound=None))
    graph, state = nnx.split(model)

    def prediction_loss(logits, target, weights):
        return losses.distribution_balanced(
            logits,
            target,
            losses.class_frequency(y),
            len(y),
            weights,
            focal_gamma=config["focal_gamma"],
            logit_bias=config["init_bias"],
            negative_scale=config["neg_scale"],
            map_alpha=config["map_alpha"],
            map_beta=config["map_beta"],
            map_gamma=config["map_gamma"],
        )

    @partial(jax.jacrev, has_aux=True)
    def gradients_and_values(flat, rows, noise):
        nnx.replace_by_pure_dict(state, to_model(recorded, flat))
        pair = jnp.stack(
            rda_losses(
                nnx.merge(graph, state),
                x[rows],
                y[rows],
                noise,
                prediction_loss,
                recovery_weight=config["lambda_recovery"],
                target_weight=config["lambda_target"],
                similarity_weight=config["lambda_similarity"],
                similarity="sum",
            )
        )
        return pair, pair

    first = np.concatenate([recorded[f"init/{n}"].ravel() for n in recorded["param_names"]])
    flats = np.concatenate([first[None], recorded["params"][:-1]])
    inputs = (flats, recorded["batch_index"], recorded["noise"])
    found = jax.jit(lambda inputs: jax.lax.map(lambda i: gradients_and_values(*i), inputs))(inputs)
    gradients, values = jax.device_get(found)
    for number, task in enumerate(("prediction", "alignment")):
        np.testing.assert_allclose(values[:, number], recorded[f"{task}_loss"], rtol=1e-10)
        scale = np.abs(recorded[f"{task}_gradient"]).max()
        np.testing.assert_allclose(
            gradients[:, number], recorded[f"{task}_gradient"], rtol=1e-10, atol=1e-12 * scale
        )


def uniform_loss(logits, target, weights):
    return losses.kullback_leibler(jax.nn.softmax(logits), target, weights)


def test_padding_has_no_effect(x64):
    random = np.random.default_rng(1)

    @jax.jit
    def both(x, y, present):
        model = RDA(5, 3, 4, rngs=nnx.Rngs(0))
        noise = draw_noise(jax.random.key(1), 6, 4)
        padded = rda_losses(model, x, y, noise, uniform_loss, present)
        return padded, rda_losses(model, x[:4], y[:4], noise[:, :4], uniform_loss)

    padded, short = both(
        random.normal(size=(6, 5)), random.dirichlet(np.ones(3), 6), np.arange(6) < 4
    )
    np.testing.assert_allclose(padded, short, rtol=1e-12)


def test_gradients_are_finite_where_the_released_architecture_overflows():
    bounds = None, 8.0

    @jax.jit
    def gradients(x, y):
        noise = draw_noise(jax.random.key(0), 2, 4)
        loss = partial(rda_losses, x=x, y=y, noise=noise, prediction_loss=uniform_loss)
        model, found = RDA(3, 2, 4, rngs=nnx.Rngs(0)), []
        for bound in bounds:
            model.log_variance_bound = bound
            found.append(nnx.grad(lambda model: loss(model)[1])(model))
        return found

    x, y = np.full((2, 3), 1e3, np.float32), np.array([[1.0, 0.0], [0.5, 0.5]], np.float32)
    finite = {
        bound: all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
        for bound, gradient in zip(bounds, gradients(x, y), strict=True)
    }
    assert finite == {None: False, 8.0: True}


def test_initialisation():
    state = jax.jit(lambda: nnx.state(RDA(400, 5, 300, rngs=nnx.Rngs(0))))()
    kernel = np.asarray(state["encoder_x"]["kernel"][...])
    assert kernel.std() == pytest.approx((2 / 400) ** 0.5, rel=0.02)
    assert np.abs(kernel).max() > 3 * (2 / 400) ** 0.5  # normal, not truncated
    biases = [np.asarray(leaf) for leaf in jax.tree.leaves(state) if leaf.ndim == 1]
    assert len(biases) == 7
    assert not np.any(np.concatenate(biases))


def test_images():
    @jax.jit
    def found(x, y):
        rngs = nnx.Rngs(0)
        model = RDA(None, 3, 8, encoder=ConvolutionalEncoder(1, 8, rngs=rngs), rngs=rngs)
        noise = draw_noise(jax.random.key(0), 2, 8)
        return model(x), *rda_losses(model, x, y, noise, uniform_loss)

    output, *values = found(np.ones((2, 16, 16, 1), np.float32), np.full((2, 3), 1 / 3, np.float32))
    assert output.shape == (2, 3)
    assert np.all(np.isfinite(values))
    with pytest.raises(ValueError, match="either num_features or an encoder"):
        RDA(None, 3, rngs=nnx.Rngs(0))
