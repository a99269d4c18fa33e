"""RDA, the model GDMAM was made for, as `flax.nnx` modules."""

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from gdmam_jax.ldl import losses

_he_normal = jax.nn.initializers.variance_scaling(2.0, "fan_in", "normal")


def _linear(inputs: int, outputs: int, rngs: nnx.Rngs) -> nnx.Linear:
    return nnx.Linear(inputs, outputs, kernel_init=_he_normal, rngs=rngs)


class ConvolutionalEncoder(nnx.Module):
    """A small convolutional encoder, for labelled images instead of feature vectors.

    Three 3 x 3 convolutions with ReLU, each of which halves height and width, are followed by the
    mean over what is left of the image and an affine layer.

    Args:
      channels: of the images.
      hidden: width of the representation.
      rngs: streams with `params`.
      widths: channels of the three convolutions.

    Examples:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> encoder = ConvolutionalEncoder(3, 16, rngs=nnx.Rngs(0))
      >>> encoder(jnp.zeros((2, 32, 32, 3))).shape
      (2, 16)
    """

    def __init__(
        self,
        channels: int,
        hidden: int,
        *,
        rngs: nnx.Rngs,
        widths: tuple[int, int, int] = (16, 32, 64),
    ) -> None:
        self.convolutions = nnx.List(
            nnx.Conv(inputs, outputs, (3, 3), strides=2, kernel_init=_he_normal, rngs=rngs)
            for inputs, outputs in zip((channels, *widths[:-1]), widths, strict=True)
        )
        self.output = _linear(widths[-1], hidden, rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Encode images of shape (samples, height, width, channels) to (samples, hidden)."""
        for convolution in self.convolutions:
            images = jax.nn.relu(convolution(images))
        return self.output(images.mean((1, 2)))


class RDA(nnx.Module):
    r"""Representation-distribution alignment for imbalanced label distributions.

    With features x and label distributions y, all layers affine:

    $$h = A x, \quad \mu_x, v_x = B h, C h, \quad z_x = \mu_x + \epsilon_1 e^{v_x / 2}$$
    $$k = D y, \quad \mu_y, v_y = E k, F k, \quad z_y = \mu_y + \epsilon_2 e^{v_y / 2}$$

    The prediction is $\mathrm{softmax}(G\,\mathrm{relu}(h))$. Weights start He-normal, biases at 0.

    The released architecture leaves the log-variances v unbounded. The alignment loss divides by
    the variances that the labels' encoder gives, so they shrink, the loss and its gradient grow
    without bound, and $e^v$ overflows in some folds of some data sets. By default v is softly
    bounded here (see `losses.bounded`), to standard deviations between 0.37 and 2.7.

    Args:
      num_features: width of x, or None with an `encoder`.
      num_labels: width of y.
      hidden: H, width of all representations.
      log_variance_bound: bound on both log-variances; None is the released architecture.
      encoder: A, any callable module from x to (samples, hidden), such as
        `ConvolutionalEncoder`; None makes an affine layer.
      rngs: streams with `params`.

    Examples:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> model = RDA(8, 3, rngs=nnx.Rngs(0))
      >>> model(jnp.ones((2, 8))).shape
      (2, 3)

    References:
      Zhao, An, Xu, Geng, Imbalanced Label Distribution Learning, AAAI 2023.
    """

    def __init__(
        self,
        num_features: int | None,
        num_labels: int,
        hidden: int = 100,
        *,
        rngs: nnx.Rngs,
        log_variance_bound: float | None = 2.0,
        encoder: Callable[[jax.Array], jax.Array] | None = None,
    ) -> None:
        if (num_features is None) == (encoder is None):
            raise ValueError("give either num_features or an encoder")
        if encoder is None:
            assert num_features is not None
            encoder = _linear(num_features, hidden, rngs)
        self.encoder_x = encoder
        self.encoder_x_mean = _linear(hidden, hidden, rngs)
        self.encoder_x_log_variance = _linear(hidden, hidden, rngs)
        self.encoder_y = _linear(num_labels, hidden, rngs)
        self.encoder_y_mean = _linear(hidden, hidden, rngs)
        self.encoder_y_log_variance = _linear(hidden, hidden, rngs)
        self.decoder = _linear(hidden, num_labels, rngs)
        self.hidden = hidden
        self.log_variance_bound = log_variance_bound

    def __call__(self, x: jax.Array) -> jax.Array:
        """Prediction logits of shape (samples, labels) for features x."""
        return self.decoder(jax.nn.relu(self.encoder_x(x)))


def rda_losses(
    model: RDA,
    x: jax.Array,
    y: jax.Array,
    noise: jax.Array,
    prediction_loss: Callable[[jax.Array, jax.Array, jax.Array | None], jax.Array],
    weights: jax.Array | None = None,
    *,
    recovery_weight: float = 0.1,
    target_weight: float = 0.1,
    similarity_weight: float = 0.1,
    similarity: Literal["mean", "sum"] = "mean",
) -> tuple[jax.Array, jax.Array]:
    r"""RDA's prediction loss and alignment loss, from one forward pass.

    - recovery: cross entropy of softmax(G z_y) against y
    - target: $\mathrm{KL}(N(\mu_x, e^{v_x}) \| N(\mu_y, e^{v_y}))$, no gradient through the second
    - similarity: squared difference of the cosine-similarity matrices of z_x and z_y

    alignment loss = recovery_weight recovery + target_weight target
    + similarity_weight similarity.

    Args:
      model: an `RDA`.
      x: features, shape (samples, features).
      y: label distributions, shape (samples, labels), rows sum to 1.
      noise: standard normal, shape (2, samples, hidden), for z_x and z_y: see `draw_noise`.
      prediction_loss: a function of `(logits, y, weights)`, such as a partial of
        `losses.distribution_balanced`.
      weights: shape (samples,), 0 for rows of padding, or None.
      recovery_weight: RDA's lambda 1.
      target_weight: RDA's lambda 2.
      similarity_weight: RDA's lambda 3.
      similarity: ``mean`` over the pairs of samples (RDA) or ``sum`` (the released GDMAM code).

    Returns:
      `(prediction_loss, alignment_loss)`, scalars.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from flax import nnx
      >>> from gdmam_jax.ldl import losses
      >>> model, x, y = RDA(8, 3, rngs=nnx.Rngs(0)), jnp.ones((2, 8)), jnp.full((2, 3), 1 / 3)
      >>> noise = draw_noise(jax.random.key(1), 2, model.hidden)
      >>> def prediction_loss(logits, y, weights):
      ...     return losses.kullback_leibler(jax.nn.softmax(logits), y, weights)
      >>> prediction, alignment = rda_losses(model, x, y, noise, prediction_loss)
      >>> prediction.shape, alignment.shape
      ((), ())
    """

    def gaussian(
        mean: nnx.Linear, log_variance: nnx.Linear, hidden: jax.Array, noise: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Mean, log-variance and a draw."""
        m, v = mean(hidden), losses.bounded(log_variance(hidden), model.log_variance_bound)
        return m, v, m + noise * jnp.exp(v / 2)

    h, k = model.encoder_x(x), model.encoder_y(y)
    mean_x, log_variance_x, z_x = gaussian(
        model.encoder_x_mean, model.encoder_x_log_variance, h, noise[0]
    )
    mean_y, log_variance_y, z_y = gaussian(
        model.encoder_y_mean, model.encoder_y_log_variance, k, noise[1]
    )
    prediction = prediction_loss(model.decoder(jax.nn.relu(h)), y, weights)
    recovery = losses.cross_entropy(model.decoder(z_y), y, weights)
    fixed = jax.lax.stop_gradient((mean_y, log_variance_y))
    target = losses.gaussian_kullback_leibler(mean_x, log_variance_x, *fixed, weights)
    arrangement = losses.similarity_difference(z_x, z_y, weights, reduction=similarity)
    alignment = (
        recovery_weight * recovery + target_weight * target + similarity_weight * arrangement
    )
    return prediction, alignment


def draw_noise(key: jax.Array, num_samples: int, hidden: int) -> jax.Array:
    """The two standard normal draws that `rda_losses` needs, e1 for z_x before e2 for z_y.

    Args:
      key: a `jax.random` key.
      num_samples: rows of the batch.
      hidden: width of the representations.

    Returns:
      Shape (2, num_samples, hidden).

    Examples:
      >>> import jax
      >>> draw_noise(jax.random.key(0), 4, 100).shape
      (2, 4, 100)
    """
    return jax.random.normal(key, (2, num_samples, hidden))
