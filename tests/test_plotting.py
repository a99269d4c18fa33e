"""The pictures hold the numbers that `diagnostics` gave."""

import functools
import re

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


@functools.cache
def trained(**choices):
    """Diagnostics of five steps, stacked by a scan."""
    params = {"layer": np.ones(3, np.float32), "head": np.ones(2, np.float32)}
    optimizer = gdmam.gdmam(0.1, **choices)

    def step(state, key):
        draw = [jax.tree.map(lambda p, k=k: jax.random.normal(k, p.shape), params) for k in key]
        _, state = optimizer.update(gdmam.pair_gradients(*draw), state, params)
        return state, gdmam.diagnostics(state)

    @jax.jit
    def run(key):
        keys = jax.random.split(key, (5, 2))
        return jax.lax.scan(step, optimizer.init(params), keys)[1]

    return jax.device_get(run(jax.random.key(0)))


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


@pytest.mark.parametrize("steps", [[20], [0, 10, 20], [0, 10, 90]])
def test_scopes_are_drawn_over_the_numbers_of_the_steps(steps):
    values = np.arange(len(steps)) / 10
    axes = plotting.plot_scopes({"a/cosine": values, "b/cosine": -values}, steps=steps).axes[0]
    assert axes.get_ylim() == (1.5, -0.5)
    (image,) = axes.get_images()
    np.testing.assert_array_equal(image.get_array(), [values, -values])
    for step, value in zip(steps, values, strict=True):
        x, y = axes.transData.transform((step, 0))
        event = matplotlib.backend_bases.MouseEvent("motion", axes.figure.canvas, x, y)
        assert image.get_cursor_data(event) == value


def made(scopes, losses=("",), steps=3):
    """A history with the keys of `diagnostics` and a number of its own in each series."""
    own = [name for names in plotting.PANELS.values() for name in names]
    keys = [
        f"{scope}{name}{loss}"
        for scope in scopes
        for name in [*own, "projection"]
        for loss in ([""] if name.startswith("prediction_") else losses)
    ]
    return {key: np.full(steps, float(number)) for number, key in enumerate(keys)}


def lines_by_panel(figure):
    return {axes.get_title(): [x.get_label() for x in axes.get_lines()] for axes in figure.axes}


def texts(legend):
    return [text.get_text() for text in legend.get_texts()]


@pytest.mark.parametrize("losses", [("",), ("/cosine", "/smooth")])
def test_layers_and_losses_may_be_named_like_a_scalar(losses):
    scopes = ["projection/", "gate/kernel/", "decay/", "cosine/gate/", "last/"]
    history = made(scopes, losses)
    gates = [
        f"{s}{name}{loss}"
        for s in scopes
        for name in ("gate", "orthogonal_gate")
        for loss in losses
    ]
    assert lines_by_panel(plotting.plot_diagnostics(history))["gate"] == gates
    axes = plotting.plot_scopes(history).axes[0]
    rows = [(s, loss) for s in scopes for loss in losses]
    assert [label.get_text() for label in axes.get_yticklabels()] == [
        f"{s[:-1]} ({loss[1:]})" if loss else s[:-1] for s, loss in rows
    ]
    shown = [history[f"{s}cosine{loss}"] for s, loss in rows]
    np.testing.assert_array_equal(axes.get_images()[0].get_array(), shown)


def test_losses_named_like_a_scalar_have_no_scope():
    losses = ("/gate", "/cosine")
    for history in (made([""], losses), {"cosine/gate": [0.5], "gate/gate": [1.0]}):
        panels = lines_by_panel(plotting.plot_diagnostics(history))
        for title in ("cosine of the angle", "gate"):
            names = plotting.PANELS[title]
            expected = [f"{name}{loss}" for name in names for loss in losses]
            assert [x for x in panels[title] if "/" in x] == [x for x in expected if x in history]
        with pytest.raises(ValueError, match="no scope has a 'cosine'"):
            plotting.plot_scopes(history)


def test_a_scope_may_have_an_empty_label():
    axes = plotting.plot_scopes(made(["/", "layer/"])).axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["", "layer"]


@pytest.mark.filterwarnings("error")
def test_ten_scopes_share_one_legend():
    scopes = [f"encoder/layer_{number}/kernel" for number in range(10)]
    figure = plotting.plot_diagnostics(made([f"{scope}/" for scope in scopes]))
    figure.get_layout_engine().execute(figure)
    assert min(axes.get_position().width for axes in figure.axes) > 0.5
    (legend,) = figure.legends
    assert texts(legend) == scopes
    colors = {line.get_label(): line.get_color() for line in figure.axes[0].get_lines()}
    for scope, handle in zip(scopes, legend.legend_handles, strict=True):
        assert handle.get_color() == colors[f"{scope}/cosine"]
    lines = lines_of(figure)
    for axes, names in zip(figure.axes, plotting.PANELS.values(), strict=True):
        assert texts(axes.get_legend()) == list(names)
        dashes = [handle.get_linestyle() for handle in axes.get_legend().legend_handles]
        for scope in scopes:
            assert [lines[f"{scope}/{name}"].get_linestyle() for name in names] == dashes
    assert not plotting.plot_diagnostics({f"{n}/cosine": [0.5] for n in range(11)}).legends


def test_a_generator_and_keys_of_others_are_no_obstacle():
    entries = [{"cosine": 0.5, "image": np.ones((2, 2))}, {"cosine": 0.25, "note": "late"}]
    lines = lines_of(plotting.plot_diagnostics(entry for entry in entries))
    np.testing.assert_array_equal(lines["cosine"].get_ydata(), [0.5, 0.25])


@pytest.mark.parametrize(("steps", "markers"), [(1, ["o", "s"]), (2, ["None", "None"])])
def test_one_step_has_markers(steps, markers):
    lines = lines_of(plotting.plot_diagnostics(made([""], steps=steps)))
    assert [lines[name].get_marker() for name in ("gate", "orthogonal_gate")] == markers


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: plotting.plot_diagnostics([]), "empty"),
        (lambda: plotting.plot_diagnostics({"cosine": []}), "empty"),
        (lambda: plotting.plot_diagnostics([{"cosine": 1.0}, {}]), r"entry 1 .*\['cosine'\]"),
        (lambda: plotting.plot_diagnostics([{}, {"cosine": 1.0}]), r"entry 0 .*\['cosine'\]"),
        (lambda: plotting.plot_diagnostics({"loss": [1.0]}), "none of cosine, .*: loss"),
        (lambda: plotting.plot_diagnostics({"cosine": [[1.0]]}), r"cosine must .*\(1, 1\)"),
        (lambda: plotting.plot_diagnostics({"cosine": [1.0]}, steps=[1, 2]), r"steps .*\(1,\).*2"),
        (lambda: plotting.plot_scopes({"a/cosine": [1.0]}, steps=[1, 2]), r"steps .*\(1,\).*2"),
        (
            lambda: plotting.plot_diagnostics({"cosine": [1, 1]}, steps=[1, 1]),
            "steps must increase",
        ),
        (lambda: plotting.plot_scopes({}), "empty"),
        (lambda: plotting.plot_scopes({"cosine": [1.0]}), "no scope has a 'cosine'"),
        (lambda: plotting.plot_scopes({"a/cosine": [1.0, 1.0], "b/cosine": [1.0]}), "b/cosine .*2"),
    ],
)
def test_what_cannot_be_drawn_is_named(call, message):
    before = plt.get_fignums()
    with pytest.raises(ValueError, match=message):
        call()
    assert plt.get_fignums() == before


def of_two(cosine, prediction=1.0, alignment=1.0, steps=40):
    values = (cosine, prediction, alignment)
    keys = ("cosine", "prediction_norm", "alignment_norm")
    return {k: np.broadcast_to(np.array(v), steps) for k, v in zip(keys, values, strict=True)}


@pytest.mark.parametrize(
    ("history", "words"),
    [
        (of_two(0.3), "No conflict that matters: the sum cancels 0%"),
        (of_two(-0.1), "Some conflict: the sum cancels 10%"),
        (of_two(-0.5), "Conflict, and it matters: the sum cancels 50% of the decrease."),
        (of_two(-0.5, 1.0, 3.0), "cancels 30% of the decrease, and raises .* on 100%"),
        (of_two(0.0, 1.0, 40.0), "the alignment gradient is 40 times as long, and drowns out"),
        (of_two(0.0, 40.0, 1.0), "the prediction gradient is 40 times as long, and drowns out"),
    ],
)
def test_the_verdict_on_two_losses(history, words):
    report = plotting.conflict_report(history)
    assert re.search(words, report.verdict)
    assert report.figure.get_suptitle() == report.verdict


def test_what_a_sum_cancels_is_what_its_step_lacks():
    first, second = np.random.default_rng(0).normal(size=(2, 50, 2))
    first[:, 0] += 2
    second[:, 0] -= 2
    weight = 0.7
    norms = [np.linalg.norm(each, axis=1) for each in (first, second)]
    history = of_two(np.sum(first * second, axis=1) / np.prod(norms, axis=0), *norms, steps=50)
    report = plotting.conflict_report(history, alignment_weight=weight)
    decrease = np.sum((first + weight * second) ** 2)
    alone = np.sum(first**2) + weight**2 * np.sum(second**2)
    assert report.cancelled == pytest.approx(1 - decrease / alone)
    assert report.cosine == pytest.approx(
        np.sum(first * second) / np.sqrt(np.sum(first**2) * np.sum(second**2))
    )
    single = plotting.conflict_report(history, alignment_weight=weight, window=1)
    assert single.raised == np.mean(np.sum(first * (first + weight * second), axis=1) < 0)
    assert single.ratio == pytest.approx(np.median(weight * norms[1] / norms[0]))


def test_noise_of_single_batches_is_no_conflict():
    cosines = np.where(np.arange(400) % 2, 0.6, -0.6)
    assert plotting.conflict_report(of_two(cosines, steps=400)).cancelled < 0.01
    raised = [
        plotting.conflict_report(of_two(cosines, 1, 2, 400), window=w).raised for w in (1, 20)
    ]
    assert raised == [0.5, 0]


@pytest.mark.timeout(10)  # exceeded where the time grows with the window
def test_a_long_history_is_smoothed_fast():
    values = np.random.default_rng(0).lognormal(sigma=9, size=23)
    for window in (1, 2, 5, 12, 23, 40):
        width = min(window, 23)
        spans = [slice(max(0, i - width // 2), i + (width + 1) // 2) for i in range(23)]
        means = [values[span].mean() for span in spans]
        np.testing.assert_allclose(plotting._smooth(values, window), means, rtol=1e-12)
    np.testing.assert_allclose(plotting._smooth(np.ones(100_000), 30_000), 1)


def test_one_of_several_losses_is_reported():
    history = of_two(-0.5)
    named = {f"{key}/smooth": history[key] for key in ("cosine", "alignment_norm")}
    named |= {"cosine/other": -history["cosine"], "alignment_norm/other": history["cosine"]}
    named["prediction_norm"] = history["prediction_norm"]
    assert plotting.conflict_report(named, loss="smooth").cancelled == pytest.approx(0.5)
    with pytest.raises(ValueError, match=r"lacks cosine, alignment_norm; .*cosine/smooth"):
        plotting.conflict_report(named)


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"window": 0}, "window must be at least 1, got 0"),
        ({"alignment_weight": 0.0}, "alignment_weight must be greater than 0, got 0"),
        ({"alignment_weight": float("nan")}, "alignment_weight .* got nan"),
    ],
)
def test_reports_refuse_bad_choices(choices, message):
    with pytest.raises(ValueError, match=message):
        plotting.conflict_report(of_two(0.5), **choices)


def test_steps_that_are_not_finite_are_left_out_of_a_report():
    history = of_two(-0.5)
    expected = plotting.conflict_report(history)
    last = {"cosine": np.nan, "prediction_norm": np.inf, "alignment_norm": 1.0}
    longer = {key: np.append(values, last[key]) for key, values in history.items()}
    found = plotting.conflict_report(longer)
    assert found.verdict == expected.verdict
    assert found.cancelled == expected.cancelled


def test_a_report_is_drawn_over_the_numbers_of_the_steps():
    history = of_two(np.array([-0.5, np.nan, -0.5]), steps=3)
    figure = plotting.conflict_report(history, steps=[0, 10, 20]).figure
    for axes in figure.axes[:2]:
        np.testing.assert_array_equal(axes.get_lines()[0].get_xdata(), [0, 20])
    shares = figure.axes[2].collections[0].get_paths()[0].vertices[:, 0]
    assert (shares.min(), shares.max()) == (0, 20)


def test_steps_without_one_of_the_losses_do_not_make_the_other_longer():
    present = np.arange(20) % 4 == 0
    history = of_two(-0.5, 1.0, np.where(present, 1.0, 0.0), 20)
    assert plotting.conflict_report(history).ratio == 1


@pytest.mark.parametrize("value", [0.0, np.nan])
def test_a_report_needs_both_gradients(value):
    with pytest.raises(ValueError, match="one of the gradients is 0 or not finite at every step"):
        plotting.conflict_report(of_two(0.0, 1.0, value))


def test_a_history_of_states_is_refused():
    states = [gdmam.gdmam(0.1).init(jnp.ones(2))]
    with pytest.raises(TypeError, match=r"entry 0 of the history is tuple; expected what"):
        plotting.plot_diagnostics(states)
