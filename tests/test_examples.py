"""The main example: it runs, says who won, draws its picture, and lowers for accelerators."""

import importlib.util
import json
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from gdmam_jax import ldl

FOLDER = Path(__file__).parents[1] / "examples"


def load_example(name):
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def movie_ratings():
    return load_example("movie_ratings")


def test_movie_ratings_trains_and_concludes(movie_ratings, tmp_path, monkeypatch, capsys):
    # Each method takes seconds to compile.
    kept = {name: movie_ratings.METHODS[name] for name in (movie_ratings.BASELINE, "GDMAM")}
    monkeypatch.setattr(movie_ratings, "METHODS", kept)
    picture = tmp_path / "new" / "picture.png"
    arguments = ["--epochs", "2", "--learning-rates", "1e-3", "--picture", str(picture)]
    monkeypatch.setattr(sys, "argv", ["movie_ratings.py", *arguments])
    movie_ratings.main()
    printed = capsys.readouterr().out
    for text in ("KLD ↓", "intersection ↑", "Lowest test divergence", "conflicted in"):
        assert text in printed
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_movie_ratings_refuses_no_epochs(movie_ratings, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["movie_ratings.py", "--epochs", "0"])
    with pytest.raises(SystemExit) as stopped:
        movie_ratings.main()
    assert stopped.value.code == 2
    assert "--epochs must be at least 1" in capsys.readouterr().err


def test_movie_ratings_tells_what_diverged(movie_ratings):
    def run(*klds):
        found = {"kld": np.array(klds)}
        return {"validation": found, "test": found, "report": {"cosine": np.ones(2)}}

    assert movie_ratings.best_epoch(run(np.nan, 0.5, 0.4)) == 2
    baseline, broken = run(0.5, 0.4), run(np.nan, np.nan)
    name = movie_ratings.BASELINE
    words = movie_ratings.conclusion({"other": broken, name: baseline})
    assert words.startswith("other diverged with every learning rate.\nLowest test divergence")
    assert "about equal" not in words
    words = movie_ratings.conclusion({"other": baseline, name: broken})
    assert "Lowest test divergence (KLD): other, 0.4" in words
    assert "against" not in words


def test_movie_ratings_training_set_is_imbalanced(movie_ratings):
    data = movie_ratings.load_data()
    sizes = {name: len(labels) for name, (_, labels) in data.items()}
    assert sizes["validation"] == 20
    assert sizes["test"] > 5 * sizes["train"]
    factors = {name: ldl.imbalance_statistics(labels).factor for name, (_, labels) in data.items()}
    assert factors["train"] > 5 * factors["test"]


def test_movie_ratings_lowers_for_cuda_and_tpu(movie_ratings):
    data = movie_ratings.load_data()
    features, labels = data["train"]
    model = ldl.RDA(features.shape[1], labels.shape[1], rngs=nnx.Rngs(0))
    name = "GDMAM, PCGrad weights"
    epoch = movie_ratings.make_epoch(name, nnx.graphdef(model), data)
    params = nnx.state(model)
    opt_state = movie_ratings.METHODS[name](1e-3).init(params)
    exported = jax.jit(epoch).trace(params, opt_state, jax.random.key(0), 1e-3)
    assert exported.lower(lowering_platforms=("cuda", "tpu")).as_text()


def test_burgers_trains_concludes_and_draws(tmp_path, monkeypatch, capsys):
    example = load_example("burgers")
    monkeypatch.setattr(example, "RESIDUAL_POINTS", 32)
    monkeypatch.setattr(example, "DATA_POINTS", 16)
    picture = tmp_path / "new" / "burgers.png"
    output = tmp_path / "errors.json"
    arguments = ["--steps", "200", "--width", "8", "--seeds", "2"]
    arguments += ["--picture", str(picture), "--output", str(output)]
    monkeypatch.setattr(sys, "argv", ["burgers.py", *arguments])
    example.main()
    printed = capsys.readouterr().out
    assert "GDMAM, Muon: relative error" in printed
    assert "opposed each other" in printed
    assert picture.read_bytes().startswith(b"\x89PNG")
    errors = json.loads(output.read_text())
    assert list(errors) == list(example.METHODS)
    assert all(len({*found}) == 2 for found in errors.values())


def test_burgers_residual_of_the_solution_vanishes(x64):
    """The example's own derivatives, on a solution known in closed form: u = x / (1 + t)."""
    example = load_example("burgers")
    solution, other = lambda at: at[:, :1] / (1 + at[:, 1:]), lambda at: at[:, :1] ** 2
    residuals = jax.jit(lambda points: [example.residual(u, points) for u in (solution, other)])
    found, wrong = residuals(np.random.default_rng(0).uniform(size=(20, 2)))
    np.testing.assert_allclose(found, 0, atol=1e-14)
    assert np.min(np.abs(wrong)) > 1e-4


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--steps", "150"], "multiple of 100"),
        (["--width", "0"], "--width must be at least 1"),
    ],
)
def test_burgers_refuses_what_it_cannot_do(flags, message, monkeypatch, capsys):
    example = load_example("burgers")
    monkeypatch.setattr(sys, "argv", ["burgers.py", *flags])
    with pytest.raises(SystemExit) as stopped:
        example.main()
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_ldl_choices_compares_variants(tmp_path, monkeypatch, capsys):
    example = load_example("ldl_choices")
    monkeypatch.setattr(example, "BASELINES", ["adamw"])
    arguments = ["--out", str(tmp_path), "--variants", "preference2", "--rates", "1e-3", "1e-2"]
    arguments += ["--folds", "2", "--epochs", "2"]
    monkeypatch.setattr(sys, "argv", ["ldl_choices.py", *arguments])
    example.main()
    printed = capsys.readouterr().out
    for name in ("preference2", "adamw"):
        found = []
        for trial in ("0.001", "0.01"):
            with np.load(tmp_path / name / trial / "0.npz") as curves:
                found.append(curves["history/natural_kld"][:, -1].mean())
        row = next(line for line in printed.splitlines() if name in line)
        assert f"{min(found):.4f}" in row


def test_ldl_choices_refuses_unknown_variants(tmp_path, monkeypatch, capsys):
    example = load_example("ldl_choices")
    monkeypatch.setattr(sys, "argv", ["x", "--out", str(tmp_path), "--variants", "preference3"])
    with pytest.raises(SystemExit):
        example.main()
    assert "unknown variants ['preference3']; expected some of default" in capsys.readouterr().err
    (tmp_path / "file").touch()
    monkeypatch.setattr(sys, "argv", ["x", "--out", str(tmp_path / "file"), "--variants", "adam"])
    with pytest.raises(SystemExit):
        example.main()
    assert "file cannot be written" in capsys.readouterr().err


def test_ldl_choices_takes_files_as_the_command_does(tmp_path, monkeypatch, capsys):
    """Rows are divided by their sum, a constant column is left out, and three rows are too few."""
    example = load_example("ldl_choices")
    path = tmp_path / "small.npz"
    np.savez(path, features=[[1, 2], [1, 3], [1, 4]], labels=np.ones((3, 2)))
    arguments = ["x", "--out", str(tmp_path), "--data", str(path), "--normalize", "--drop-constant"]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit):
        example.main()
    assert "3 rows are too few for 10 folds" in capsys.readouterr().err
