"""Each benchmark runs on tiny sizes and reports what it should. No timing is asserted."""

import json

import pytest

pytest.importorskip("torch")
pytest.importorskip("torchjd")
from typer.testing import CliRunner

from benchmarks.__main__ import app
from benchmarks.hlo import bytes_moved, instructions
from benchmarks.timing import Case, measure_in_turn, ratio


def run(tmp_path, *arguments):
    output = tmp_path / "result.json"
    result = CliRunner().invoke(app, [*arguments, "--output", str(output)])
    assert result.exit_code == 0, result.output + repr(result.exception)
    report = json.loads(output.read_text())
    assert report["versions"]["jax"]
    assert report["device"]
    return report["rows"]


@pytest.mark.parametrize("steps", ["1", "3"])
def test_update(tmp_path, steps):
    rows = run(
        tmp_path, "update", "--parameters", "4096", "--leaves", "1,4", "--rounds", "2",
        "--only", "gdmam", "--steps", steps,
    )  # fmt: skip
    assert [(row["optimizer"], row["leaves"]) for row in rows] == [
        ("summed(adamw)", 1),
        ("gdmam", 1),
        ("summed(adamw)", 4),
        ("gdmam", 4),
    ]
    for row in rows:
        # Two gradients read, three buffers read and written, in float32; GDMAM reads its gradients
        # once more for the inner products.
        needed = {"summed(adamw)": (2 + 2 * 3) * 4, "gdmam": (2 * 2 + 2 * 3) * 4}
        assert row["must move"] == pytest.approx(needed[row["optimizer"]], rel=0.05)
        assert row["bytes/parameter"] > 0.9 * row["must move"]
        ratios = row["over summed(adamw)"]
        assert 0 < ratios["low"] <= ratios["median"] <= ratios["high"]


@pytest.mark.parametrize("options", [(), ("--rematerialise",)])
def test_pair(tmp_path, options):
    rows = run(
        tmp_path, "pair", "--models", "transformer", "--batch", "2", "--width", "8",
        "--rounds", "1", *options,
    )  # fmt: skip
    assert [row["way"] for row in rows] == [
        "JAX summed",
        "JAX paired",
        "JAX batched",
        "PyTorch summed",
        "PyTorch twice",
        "TorchJD autojac",
    ]
    assert rows[1]["memory over summed"] > 1


@pytest.mark.filterwarnings("ignore:.*renormalised")
def test_step(tmp_path):
    rows = run(tmp_path, "step", "--data", "emotion6", "--steps", "1", "--rounds", "1")
    assert len(rows) == 4
    assert all(row["milliseconds a step"] > 0 for row in rows)


@pytest.mark.filterwarnings("ignore:.*renormalised")
def test_experiment_reaches_the_same_quality(tmp_path):
    rows = run(tmp_path, "experiment", "--data", "emotion6", "--epochs", "4")
    pytorch, jax = (row["test KLD"] for row in rows)
    assert jax == pytest.approx(pytorch, rel=0.5)


def test_compile(tmp_path):
    rows = run(tmp_path, "compile", "--leaves", "2,3", "--shape", "4,4", "--only", "gdmam")
    assert [row["leaves"] for row in rows] == [2, 2, 3, 3]
    assert all(row["first step s"] >= row["compile s"] > 0 for row in rows)


def test_unknown_names_are_refused():
    result = CliRunner().invoke(app, ["pair", "--models", "perceptron"])
    assert result.exit_code == 2
    assert "perceptron" in result.output
    result = CliRunner().invoke(app, ["experiment", "--data", "movie,emotion6"])
    assert result.exit_code == 2
    assert "--data takes one name" in result.output


def test_ratios_are_taken_round_by_round():
    case, base = Case("case", lambda: None), Case("base", lambda: None)
    case.seconds, base.seconds = (2.0, 6.0, 8.0), (1.0, 2.0, 4.0)
    assert ratio(case, base).median == 2
    assert ratio(case, base).high == 2.5


def test_cases_run_in_turn():
    order = []
    cases = [Case(name, lambda name=name: order.append(name)) for name in "ab"]
    measure_in_turn(cases, rounds=2, warmup=1)
    assert order == [*"ab", *"ababab"]
    assert all(len(case.seconds) == 2 for case in cases)


PROGRAM = """
%branch (p: f32[10]) -> f32[10] {
  ROOT %n = f32[10]{0} negate(%p)
}

ENTRY %main (x: f32[10], y: bf16[10]) -> f32[10] {
  %x = f32[10]{0} parameter(0)
  %y = bf16[10]{0} parameter(1)
  %fusion.1 = (f32[10]{0}, f32[]) fusion(%x, %y), kind=kLoop, calls=%f
  %a = f32[10]{0} get-tuple-element(%fusion.1), index=0
  ROOT %add.2 = f32[10]{0} add(%a, %x)
}
"""


def test_bytes_are_counted_once_for_each_instruction():
    assert bytes_moved(PROGRAM) == (40 + 20 + 44) + (40 + 40 + 40)
    assert instructions(PROGRAM) == 6
