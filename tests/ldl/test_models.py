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
    frequency = losses.class_frequency(y)
    model = RDA(
        config["num_features"],
        config["num_labels"],
        config["hidden_dim"],
        rngs=nnx.Rngs(0),
        log_variance_bound=None,
    )
    graph, state = nnx.split(model)

    def prediction_loss(logits, target, weights):
        return losses.distribution_balanced(
            logits,
            target,
            frequency,
            len(y),
            weights,
            focal_gamma=config["focal_gamma"],
            logit_bias=config["init_bias"],
            negative_scale=config["neg_scale"],
            map_alpha=config["map_alpha"],
            map_beta=config["map_beta"],
            map_gamma=config["map_gamma"],
        )

    def pair(flat, rows, noise):
        nnx.replace_by_pure_dict(state, to_model(recorded, flat))
        return jnp.stack(
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

    first = np.concatenate([recorded[f"init/{n}"].ravel() for n in recorded["param_names"]])
    flats = np.concatenate([first[None], recorded["params"][:-1]])
    inputs = (flats, recorded["batch_index"], recorded["noise"])
    values, gradients = jax.jit(
        lambda inputs: jax.lax.map(lambda i: (pair(*i), jax.jacrev(pair)(*i)), inputs)
    )(inputs)
    for number, task in enumerate(("prediction", "alignment")):
        np.testing.assert_allclose(values[:, number], recorded[f"{task}_loss"], rtol=1e-10)
        scale = np.abs(recorded[f"{task}_gradient"]).max()
        np.testing.assert_allclose(
            gradients[:, number], recorded[f"{task}_gradient"], rtol=1e-10, atol=1e-12 * scale
        )


def uniform_loss(logits, target, weights):
    return losses.kullback_leibler(jax.nn.softmax(logits), target, weights)


def test_padding_has_no_effect(x64):
    model = RDA(5, 3, 4, rngs=nnx.Rngs(0))
    random = np.random.default_rng(1)
    x, y = random.normal(size=(6, 5)), random.dirichlet(np.ones(3), 6)
    noise = np.asarray(draw_noise(jax.random.key(1), 6, 4))

    @nnx.jit
    def both(model, *batch, weights=None):
        return rda_losses(model, *batch, uniform_loss, weights)

    short = both(model, x[:4], y[:4], noise[:, :4])
    padded = both(model, x, y, noise, weights=np.arange(6) < 4)
    np.testing.assert_allclose(padded, short, rtol=1e-12)


def test_gradients_are_finite_where_the_released_architecture_overflows():
    x, y = jnp.full((2, 3), 1e3), jnp.array([[1.0, 0.0], [0.5, 0.5]])
    noise = draw_noise(jax.random.key(0), 2, 4)
    finite = {}
    for bound in (None, 8.0):
        model = RDA(3, 2, 4, rngs=nnx.Rngs(0), log_variance_bound=bound)
        loss = partial(rda_losses, x=x, y=y, noise=noise, prediction_loss=uniform_loss)
        gradient = nnx.jit(nnx.grad(lambda model, loss=loss: loss(model)[1]))(model)
        finite[bound] = all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
    assert finite == {None: False, 8.0: True}


def test_initialisation():
    model = RDA(400, 5, 300, rngs=nnx.Rngs(0))
    kernel = np.asarray(model.encoder_x.kernel[...])
    assert kernel.std() == pytest.approx((2 / 400) ** 0.5, rel=0.02)
    assert np.abs(kernel).max() > 3 * (2 / 400) ** 0.5  # normal, not truncated
    for _, leaf in nnx.to_flat_state(nnx.state(model)):
        if leaf.ndim == 1:
            assert not np.any(leaf[...])


def test_images():
    rngs = nnx.Rngs(0)
    model = RDA(None, 3, 8, encoder=ConvolutionalEncoder(1, 8, rngs=rngs), rngs=rngs)
    x, y = jnp.ones((2, 16, 16, 1)), jnp.full((2, 3), 1 / 3)
    noise = draw_noise(jax.random.key(0), 2, 8)

    @nnx.jit
    def found(model):
        return model(x), *rda_losses(model, x, y, noise, uniform_loss)

    output, prediction, alignment = found(model)
    assert output.shape == (2, 3)
    assert np.isfinite(prediction + alignment)
    with pytest.raises(ValueError, match="either num_features or an encoder"):
        RDA(None, 3, rngs=rngs)
