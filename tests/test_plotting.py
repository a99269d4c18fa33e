"""The pictures hold the numbers that `diagnostics` gave."""

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import pytest

import gdmam_jax as gdmam
from gdmam_jax import plotting

matplotlib.use("Agg")
import matplotlib.pyplot as plt


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


def trained(**choices):
    """Diagnostics of five steps, stacked by a scan."""
    params = {"layer": jnp.ones(3), "head": jnp.ones(2)}
    optimizer = gdmam.gdmam(0.1, **choices)

    def step(state, key):
        draw = [jax.tree.map(lambda p, k=k: jax.random.normal(k, p.shape), params) for k in key]
        _, state = optimizer.update(gdmam.pair_gradients(*draw), state, params)
        return state, gdmam.diagnostics(state)

    keys = jax.random.split(jax.random.key(0), (5, 2))
    return jax.lax.scan(step, optimizer.init(params), keys)[1]


def lines_of(figure):
    return {line.get_label(): line for axes in figure.axes for line in axes.get_lines()}


def test_every_scalar_is_a_line_over_the_steps():
    history = trained()
    figure = plotting.plot_diagnostics(history, steps=10 * np.arange(5))
    assert [axes.get_title() for axes in figure.axes] == list(plotting.PANELS)
    lines = lines_of(figure)
    for names in plotting.PANELS.values():
        for name in names:
            np.testing.assert_array_equal(lines[name].get_xdata(), 10 * np.arange(5))
            np.testing.assert_allclose(lines[name].get_ydata(), history[name])


def test_a_list_of_dictionaries_is_drawn_like_their_stack():
    history = trained()
    entries = [{key: float(values[step]) for key, values in history.items()} for step in range(5)]
    one, other = (lines_of(plotting.plot_diagnostics(each)) for each in (history, entries))
    for name in ("cosine", "alignment_weight"):
        np.testing.assert_allclose(one[name].get_ydata(), other[name].get_ydata(), rtol=1e-6)


def test_scopes_are_rows_of_a_picture():
    history = trained(scope=gdmam.leaf_scope)
    axes = plotting.plot_scopes(history).axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["head", "layer"]
    rows = np.stack([history["head/cosine"], history["layer/cosine"]])
    np.testing.assert_allclose(axes.get_images()[0].get_array(), rows, rtol=1e-6)
    norms = plotting.plot_scopes(history, "alignment_norm").axes[0].get_images()[0].get_array()
    np.testing.assert_allclose(norms[1], history["layer/alignment_norm"], rtol=1e-6)
    figure, own = plt.subplots()
    assert plotting.plot_scopes(history, axes=own) is figure
    np.testing.assert_allclose(own.get_images()[0].get_array(), rows, rtol=1e-6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: plotting.plot_diagnostics([]), "empty"),
        (lambda: plotting.plot_diagnostics([{"cosine": 1.0}, {}]), r"entry 1 .*\['cosine'\]"),
        (lambda: plotting.plot_diagnostics({"loss": [1.0]}), "none of GDMAM's scalars: loss"),
        (lambda: plotting.plot_diagnostics({"cosine": [[1.0]]}), r"cosine must .*\(1, 1\)"),
        (lambda: plotting.plot_scopes({"cosine": [1.0]}), "no scope has a 'cosine'"),
    ],
)
def test_what_cannot_be_drawn_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
