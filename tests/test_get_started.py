"""docs/get_started.md, followed with each library: all of it runs, and does what it says."""

import re
import struct
import sys
import types

import chex
import matplotlib
import numpy as np
import pytest
import tensorboardX
from flax import nnx

import gdmam_jax as gdmam
from docs.snippets import BLOCK, LIBRARIES, PAGE, blocks

matplotlib.use("Agg")

STATE = {
    "Optax": ("params", "opt_state"),
    "Flax NNX": ("model", "optimizer"),
    "Flax Linen": ("state",),
    "Equinox": ("params", "opt_state"),
}
"""What a step of each library's loop takes beside the batch."""


class Run:
    """Stands in for a run of Weights & Biases, with the documented signature of `log`."""

    def __init__(self):
        self.logged = []

    def log(self, data, step=None, commit=None):
        assert all(type(value) is float for value in data.values())
        self.logged.append((step, data))

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass


@pytest.fixture
def loggers(monkeypatch):
    """Modules in place of `wandb` and `mlflow`, which are large, and what they were given."""
    runs, logged = [], []

    def init(entity=None, project=None):
        runs.append((project, Run()))
        return runs[-1][1]

    def log_metrics(metrics, step=None, synchronous=None):
        assert all(re.fullmatch(r"[\w\-. :/]+", name) for name in metrics)
        assert all(type(value) is float for value in metrics.values())
        logged.append((step, metrics))

    wandb, mlflow = types.ModuleType("wandb"), types.ModuleType("mlflow")
    wandb.init, mlflow.start_run, mlflow.log_metrics = init, Run, log_metrics
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    return runs, logged


def events(folder):
    """The scalars in TensorBoard's files: by name a list of steps and values."""
    found = {}
    for path in folder.glob("events.*"):
        data, position = path.read_bytes(), 0
        while position < len(data):
            (length,) = struct.unpack_from("<Q", data, position)
            event = tensorboardX.proto.event_pb2.Event.FromString(
                data[position + 12 : position + 12 + length]
            )
            position += 12 + length + 4
            for value in event.summary.value:
                found.setdefault(value.tag, []).append((event.step, value.simple_value))
    return found


def test_the_page_has_every_library_twice():
    tabs = [match["tab"] for match in BLOCK.finditer(PAGE.read_text()) if match["tab"]]
    assert tabs == [*LIBRARIES, *LIBRARIES]
    assert list(STATE) == list(LIBRARIES)
    assert [len([*blocks(library)]) for library in STATE] == [6] * len(STATE)


def assert_drawn_and_logged(history, folder, loggers):
    assert (folder / "diagnostics.png").read_bytes().startswith(b"\x89PNG")
    cosines = [float(seen["cosine"]) for seen in history]
    logged = events(folder / "runs")
    assert logged.keys() == history[0].keys()
    steps, series = zip(*logged["cosine"], strict=True)
    assert steps == tuple(range(len(history)))
    np.testing.assert_allclose(series, cosines, rtol=1e-6)
    [(project, run)], mlflow = loggers
    assert project == "two losses"
    for entries in (run.logged, mlflow):
        assert [step for step, _ in entries] == [*range(len(history))]
        assert [data["cosine"] for _, data in entries] == cosines


@pytest.mark.parametrize("library", STATE)
def test_following_the_page(library, tmp_path, monkeypatch, loggers):
    monkeypatch.chdir(tmp_path)
    loop, *middle, checkpoint = blocks(library)
    reader = {"__name__": "reader"}

    exec(loop, reader)
    history, values = reader["history"], reader["values"]
    assert len(history) == 300
    assert all(-1 <= float(seen["cosine"]) <= 1 for seen in history)
    assert float(values[0]) < 0.05
    assert float(values[1]) < 1.0
    ratios = [float(seen["alignment_norm"] / seen["prediction_norm"]) for seen in history]
    assert np.median(ratios) > 5  # "many times longer"

    # All that the blocks in the middle take, which are the same for all.
    numbers = eval("jax.tree.map(float, history[0])", reader)
    assert numbers.keys() == gdmam.diagnostics(gdmam.gdmam(1e-2).init(np.ones(2))).keys()
    if library == "Optax":
        for block in middle:
            exec(block, reader)
        assert_drawn_and_logged(history, tmp_path, loggers)
    assert middle == [*blocks("Optax")][1:-1]

    # An NNX step changes its arguments: give it copies.
    expected = reader["step"](*(nnx.clone(reader[name]) for name in STATE[library]), reader["x"])
    exec(checkpoint, reader)
    assert (tmp_path / "checkpoint").is_dir()
    chex.assert_trees_all_equal(reader["seen"], expected[-1])

    # A second time, in the same folder: what was written is overwritten.
    reader["history"] = history[:10]
    for block in (*middle, checkpoint) if library == "Optax" else (checkpoint,):
        exec(block, reader)


def test_the_baseline_that_the_page_names_goes_through_the_same_loop():
    baseline = "gdmam.weighed(optax.adamw(1e-2), gdmam.sum_weighting)"
    assert f"`{baseline}`" in PAGE.read_text()
    loop = next(blocks("Optax")).replace("gdmam.gdmam(1e-2)", baseline)
    reader = {"__name__": "reader"}
    exec(loop.replace("range(300)", "range(3)"), reader)
    assert -1 <= float(reader["history"][-1]["cosine"]) <= 1
