"""The trainer and its command line, on few steps."""

import csv
import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from benchmarks.physics import __main__ as command
from benchmarks.physics import report as reports
from benchmarks.physics import training
from benchmarks.physics.equations import EQUATIONS
from benchmarks.physics.training import SCALES, SMALL, train
from gdmam_jax.ldl.laboratory import storage

TINY = SMALL._replace(width=8, depth=2, residual_points=16, data_points=8, steps=200, records=2)
HEAT = EQUATIONS["heat"]
BREATHER = EQUATIONS["sine-gordon"]


def test_lanes_know_nothing_of_each_other_and_seeds_differ():
    first = train(HEAT, "gdmam", [1e-2, 1e-2, 1e-3], [0, 1, 0], TINY).errors
    again = train(HEAT, "gdmam", [1e-2, 1e-2, 1e-3], [0, 1, 0], TINY).errors
    other = train(HEAT, "gdmam", [3e-2, 1e-2, 3e-3], [2, 1, 3], TINY).errors
    np.testing.assert_array_equal(first, again)
    np.testing.assert_array_equal(first[1], other[1])
    assert len(np.unique(np.concatenate([first, other])[:, -1])) == 5


@pytest.mark.parametrize(("method", "losses"), [("m-config", 2), ("gdmam", 3)])
def test_errors_fall_with_gradients_in_turn_and_with_three_losses(method, losses):
    scale = TINY._replace(steps=600, records=3)
    errors = train(BREATHER, method, [1e-2] * 3, [0, 1, 2], scale, losses).errors
    assert np.mean(errors[:, -1]) < 0.99 * np.mean(errors[:, 0])


def invoke(*arguments):
    return CliRunner().invoke(command.app, list(map(str, arguments)))


def test_the_command_resumes_reports_and_refuses(tmp_path, monkeypatch):
    monkeypatch.setitem(SCALES, "small", TINY)
    given = ["run", "--out", tmp_path, "--equations", "heat", "--seeds", 3, "--tuning-seeds", 1]
    assert invoke(*given, "--methods", "summed").exit_code == 0
    kept = (tmp_path / "heat-summed.json").read_bytes()
    result = invoke(*given, "--methods", "summed,gdmam")
    assert result.exit_code == 0
    assert (tmp_path / "heat-summed.json").read_bytes() == kept
    assert "| gdmam |" in result.output
    other = invoke(*given, "--methods", "summed", "--rates", "1e-2")
    assert other.exit_code == 2
    assert "settings" in other.output
    assert invoke(*given, "--methods", "nonsense").exit_code == 2
    for wrong, word in ((("--steps", 100), "warm-up"), (("--steps", 201), "multiple of 2"),
                        (("--rates", "fast"), "must be numbers"), (("--rates", "nan"), "above 0"),
                        (("--rates", "inf"), "above 0"), (("--rates", "1,0"), "above 0"),
    ):  # fmt: skip
        assert word in invoke(*given, "--methods", "summed", *wrong).output
    picture, csv = tmp_path / "new" / "curves.png", tmp_path / "new" / "errors.csv"
    result = invoke("report", "--out", tmp_path, "--picture", picture, "--csv", csv)
    assert result.exit_code == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    lines = csv.read_text().splitlines()
    assert len(lines) == 1 + 2 * 3
    record = json.loads((tmp_path / "heat-gdmam.json").read_text())
    median = np.median(np.array(record["errors"])[:, -1])
    assert f"{median:.2g}" in result.output
    assert invoke("report", "--out", tmp_path / "none").exit_code == 2


def test_the_rate_is_the_best_on_seeds_of_its_own(monkeypatch, tmp_path):
    finals = {
        1e-3: {1000: 1e-9, 1001: np.nan, 0: 0.1, 1: 0.1, 2: 0.1},
        3e-3: {1000: 0.2, 1001: 0.2, 0: 0.2, 1: 0.2, 2: 0.2},
        1e-2: {1000: 0.9, 1001: 1e-4, 0: 0.3, 1: 0.4, 2: 0.5},  # The lowest geometric mean.
    }
    asked = []

    def fake(problem, method, rates, seeds, scale, losses):
        asked.append(set(zip(rates.tolist(), seeds.tolist(), strict=True)))
        errors = np.array([finals[r][s] for r, s in zip(rates, seeds, strict=True)])
        return training.Curves(np.stack([1 - errors, errors], axis=1), np.zeros((len(seeds), 2)))

    monkeypatch.setattr(command, "train", fake)
    given = ["--equations", "heat", "--methods", "gdmam", "--rates", "1e-3,3e-3,1e-2"]
    assert invoke("run", "--out", tmp_path, *given, "--seeds", 3).exit_code == 0
    record = json.loads((tmp_path / "heat-gdmam.json").read_text())
    tuning, results = asked
    assert tuning == {(rate, seed) for rate in finals for seed in (1000, 1001)}
    assert results == {(1e-2, seed) for seed in range(3)}
    assert record["rate"] == 1e-2
    assert [errors[-1] for errors in record["errors"]] == [0.3, 0.4, 0.5]


def test_the_printed_commands_run_one_after_another_and_make_the_files(monkeypatch, tmp_path):
    """Nothing is trained: each rate that the files have is the best."""
    docs = Path(__file__).parents[2] / "docs"
    tables = {f"docs/{path.name}": path.read_text() for path in docs.glob("physics*.csv")}
    runs = {name: [*csv.DictReader(text.splitlines())] for name, text in tables.items()}
    best = {
        (run["equation"], run["method"], int(run["steps"]), losses): float(run["rate"])
        for name, found in runs.items()
        for losses in [2 + (name == "docs/physics_3.csv")]
        for run in found
    }

    def fake(problem, method, rates, seeds, scale, losses):
        rate = best.get((problem.name, method, scale.steps, losses), rates[0])
        return training.Curves(*[np.where(np.asarray(rates) == rate, 0.1, 0.9)[:, None]] * 2)

    def write(path, record):  # Without waiting for the disk, 500 times.
        path.write_text(json.dumps(record))

    monkeypatch.setattr(command, "train", fake)
    monkeypatch.setattr(storage, "write_json", write)
    monkeypatch.chdir(tmp_path)
    pages = [docs / f"physics{page}.md" for page in ("", "_choices", "_optimizers")]
    text = "\n".join(page.read_text().replace("\\\n", "") for page in pages)
    for line in re.findall(r"^python -m benchmarks\.physics (run .*)", text, re.MULTILINE):
        result = invoke(*shlex.split(line))
        assert result.exit_code == 0, result.output
    text = (docs.parent / "CONTRIBUTING.md").read_text()
    reported = re.findall(r"`python -m benchmarks\.physics (report .* --csv (\S+))`", text)
    assert {name for _, name in reported} == runs.keys()
    for line, name in reported:
        assert invoke(*shlex.split(line)).exit_code == 0
        made = [*csv.DictReader(Path(name).read_text().splitlines())]
        keys = [[{**run, "error": ""} for run in found] for found in (made, runs[name])]
        assert sorted(map(str, keys[0])) == sorted(map(str, keys[1]))


def test_the_time_of_a_step_is_told_side_by_side(tmp_path, monkeypatch):
    monkeypatch.setitem(SCALES, "small", TINY)
    output = tmp_path / "step.json"
    given = ["step", "--equation", "heat", "--methods", "gdmam", "--steps", 2, "--rounds", 2]
    assert invoke(*given, "--output", output).exit_code == 0
    rows = json.loads(output.read_text())["rows"]
    assert [row["method"] for row in rows] == ["summed loss", "summed", "gdmam"]
    assert (
        rows[0]["over the summed loss"]["median"] == rows[1]["over the pair's sum"]["median"] == 1
    )
    for row in rows:
        for base in ("over the summed loss", "over the pair's sum"):
            assert 0 < row[base]["low"] <= row[base]["median"] <= row[base]["high"]
    for given, word in (
        (("--equation", "poisson", "--losses", 3), "poisson"),
        (("--methods", "l-bfgs"), "l-bfgs"),
    ):
        refused = invoke("step", *given)
        assert refused.exit_code == 2
        assert word in refused.output


def test_pictures_of_final_errors_and_over_seconds(tmp_path):
    csv, times, drawn = (tmp_path / name for name in ("all.csv", "step.json", "new/picture.png"))
    reports.write_csv([], csv)
    refused = invoke("finals", csv, drawn)
    assert refused.exit_code == 2
    assert "runs of all of" in " ".join(refused.output.replace("│", "").split())
    methods = [f"{name} {front}" for name in reports.OPTIMIZERS for front in reports.LINES]
    record = {"errors": [[0.5, 0.1], [0.4, 0.2]], "rate": 1e-2, "extras": "fourier,causal"}
    record |= {"milliseconds": 1.0, "settings": {"scale": TINY._asdict()}}
    reports.write_csv([{"heat": dict.fromkeys([*reports.FINALS, *methods], record)}], csv)
    assert csv.read_text().splitlines()[2] == "heat,summed,fourier causal,200,0.01,1,0.2"
    assert invoke("finals", csv, drawn).exit_code == 2  # All have extras.
    record |= {"extras": ""}
    reports.write_csv([{"heat": dict.fromkeys([*reports.FINALS, *methods], record)}], csv)
    assert invoke("finals", csv, drawn).exit_code == 0
    assert drawn.read_bytes().startswith(b"\x89PNG")
    drawn.unlink()
    storage.write_json(tmp_path / "heat-muon_allocated.json", record)
    for name, code in (("muon allocated", 0), ("soap allocated", 2)):
        storage.write_json(times, {"rows": [{"method": name, "milliseconds a step": 2.0}]})
        given = ["report", "--out", tmp_path, "--picture", drawn, "--step", times]
        assert invoke(*given).exit_code == code
        assert drawn.exists() == (code == 0)
        drawn.unlink(missing_ok=True)


def test_the_curves_over_seconds_end_at_the_time_of_the_training(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(reports, "_save", lambda figure, path, named: drawn.append(named))
    record = {"errors": [[0.5, 0.1], [0.4, 0.2], [0.9, 0.3]]}
    record |= {"settings": {"scale": TINY._asdict()}}
    reports.draw_over_seconds(
        {"heat": {"muon allocated": record}}, {"muon allocated": 2.0}, tmp_path
    )
    (line,) = drawn[0].lines
    np.testing.assert_allclose(line.get_xdata(), [0.2, 0.4])  # 200 steps of 2 ms
    np.testing.assert_allclose(line.get_ydata(), [0.5, 0.2])


def test_a_missing_package_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    refused = invoke("run", "--out", tmp_path, "--methods", "ssbroyden")
    assert refused.exit_code == 2
    assert "ssbroyden-optimistix" in refused.output


def test_jaxpis_configuration_trains_and_its_extras_are_options(tmp_path, monkeypatch):
    small = {"width": 8, "residual_points": 32, "data_points": 8, "steps": 200, "records": 2}
    jaxpi = SCALES["jaxpi"]._replace(**small, depth=2, frequencies=4)
    extras = TINY._replace(residual_points=20)
    for name, scale in (("jaxpi", jaxpi), ("small", extras)):
        monkeypatch.setitem(SCALES, name, scale)
    given = ["run", "--equations", "burgers", "--methods", "adamw gradient norms", "--seeds", 1]
    given += ["--rates", "1e-3", "--out"]
    assert invoke(*given, tmp_path / "jaxpi", "--configuration", "jaxpi").exit_code == 0
    (found,) = (tmp_path / "jaxpi").glob("*.json")
    settings = json.loads(found.read_text())["settings"]["scale"]
    assert settings == jaxpi._asdict()
    named = "periodic,fourier,factorised,causal"
    fewer = [tmp_path / "extras", "--extras", named, "--points", 40]
    # The configuration, which has all of them, has been trained.
    curves = training.Curves(np.ones((1, 2)), np.ones((1, 2)))
    monkeypatch.setattr(command, "train", lambda *_: curves)
    assert invoke(*given, *fewer).exit_code == 0
    (found,) = (tmp_path / "extras").glob("*.json")
    settings = json.loads(found.read_text())["settings"]["scale"]
    assert settings["periodic"]
    assert settings["factorised"]
    assert (settings["frequencies"], settings["chunks"]) == (16, 20)
    assert (settings["residual_points"], settings["data_points"]) == (40, 16)
    for option in ("--extras", "--configuration"):
        assert invoke(*given, tmp_path, option, "nonsense").exit_code == 2
    refused = invoke(*given, tmp_path, "--equations", "heat", "--extras", "periodic")
    assert refused.exit_code == 2
    assert "periodic" in refused.output


def test_the_exponential_schedule_falls_to_jaxpis_last_share():
    rate = training._schedule(2.0, 500, SMALL._replace(exponential=True))
    np.testing.assert_allclose([rate(0), rate(5), rate(500)], [2, 1.8, 2 * 0.9**100], rtol=1e-5)
