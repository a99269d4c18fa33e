"""Each benchmark runs on tiny sizes and reports what it should. No timing is asserted."""

import json
import types

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("torchjd")
from typer.testing import CliRunner  # noqa: E402

import gdmam_jax as gdmam  # noqa: E402
from benchmarks import compilation, pair  # noqa: E402
from benchmarks.__main__ import app  # noqa: E402
from benchmarks.hlo import bytes_moved, instructions  # noqa: E402
from benchmarks.timing import Case, measure_in_turn, ratio  # noqa: E402


@pytest.fixture
def shallow(monkeypatch):
    """Models of few layers: each is compiled for itself."""
    monkeypatch.setattr(pair, "MLP_LAYERS", 2)
    monkeypatch.setattr(pair, "TRANSFORMER_LAYERS", 1)


def run(tmp_path, *arguments):
    output = tmp_path / "result.json"
    result = CliRunner().invoke(app, [*arguments, "--output", str(output)])
    assert result.exit_code == 0, result.output + repr(result.exception)
    report = json.loads(output.read_text())
    assert report["versions"]["jax"]
    assert report["device"]
    return report["rows"]


def test_update_of_several_steps_and_leaves(tmp_path):
    rows = run(
        tmp_path, "update", "--parameters", "4096", "--leaves", "1,4", "--rounds", "2",
        "--only", "gdmam", "--steps", "3",
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
        assert row["moved"] > 0.9 * row["must move"]
        ratios = row["over summed"]
        assert 0 < ratios["low"] <= ratios["median"] <= ratios["high"]


def test_update_of_several_losses(tmp_path):
    rows = run(
        tmp_path, "update", "--parameters", "65536", "--leaves", "2", "--rounds", "1",
        "--losses", "2,3", "--only", "gdmam_released,gdmam", "--torch",
    )  # fmt: skip
    torch_ways = ["PyTorch summed(AdamW)", "TorchJD UPGrad(AdamW)"]
    # The released form has one alignment loss.
    assert [(row["losses"], row["optimizer"]) for row in rows] == [
        *((2, name) for name in ("summed(adamw)", "gdmam_released", "gdmam", *torch_ways)),
        *((3, name) for name in ("summed(adamw)", "gdmam", *torch_ways)),
    ]
    for row in rows[-4:]:
        reads = 1 if "summed" in row["optimizer"] else 2
        assert row["must move"] == pytest.approx((reads * 3 + 2 * 3) * 4, rel=0.05)
        # Parameters, two buffers and three gradients, and as much again at most.
        assert 0.9 < row["memory"] < 2


@pytest.mark.parametrize(
    ("model", "losses", "options"), [("mlp", 3, ()), ("transformer", 2, ("--rematerialise",))]
)
def test_pair(shallow, tmp_path, model, losses, options):
    rows = run(
        tmp_path, "pair", "--models", model, "--losses", str(losses), "--batch", "1",
        "--width", "64", "--rounds", "1", *options,
    )  # fmt: skip
    ways = [
        "JAX summed", "JAX paired", "JAX paired, UPGrad", "JAX batched",
        "PyTorch summed", "PyTorch in turn", "TorchJD autojac", "TorchJD autojac, UPGrad",
    ]  # fmt: skip
    assert [(row["losses"], row["way"]) for row in rows] == [(losses, way) for way in ways]
    for row in rows:
        if "summed" in row["way"]:
            assert row["memory"] == row["(1 + 2K) / 3"] == 1
        else:
            # The gradients of all losses are held at once.
            assert row["memory"] > 1
            assert row["(1 + 2K) / 3"] == pytest.approx((1 + 2 * losses) / 3)
        assert not row["off by"] > 1e-5


def test_fork(shallow, tmp_path):
    rows = run(
        tmp_path, "fork", "--models", "mlp", "--losses", "3", "--batch", "2", "--width", "64",
        "--rounds", "1",
    )  # fmt: skip
    ways = [
        "JAX summed", "JAX fork", "JAX fork, GDMAM", "JAX fork, UPGrad", "JAX fork, UPGrad, state",
        "JAX pairs, UPGrad",
        "PyTorch summed", "TorchJD mtl_backward, UPGrad", "PyTorch at the features, UPGrad",
    ]  # fmt: skip
    assert [(row["losses"], row["way"]) for row in rows] == [(3, way) for way in ways]
    memory = {row["way"]: row["MiB"] for row in rows}
    # Nothing of the parameters' size beside the summed loss's gradient.
    half = pair.MLP_LAYERS * 64 * 64 * 4 / 2**20 / 2
    assert memory["JAX fork, UPGrad, state"] < memory["JAX summed"] + half


def test_many(tmp_path):
    rows = run(
        tmp_path, "many", "--losses", "4", "--parameters", "1024", "--chunk", "2", "--rounds", "1"
    )
    ways = [
        "JAX mean loss", "JAX", "JAX, chunks of 2", "JAX, by example",
        "JAX, by example, chunks of 2", "PyTorch mean loss", "TorchJD autojac",
        "TorchJD autojac, chunks of 2", "TorchJD autogram",
    ]  # fmt: skip
    assert [(row["losses"], row["way"]) for row in rows] == [(4, way) for way in ways]
    assert all(row["milliseconds"] > 0 for row in rows)


def test_many_with_given_gradients(tmp_path):
    rows = run(
        tmp_path, "many", "--given", "--losses", "3,8", "--parameters", "100", "--rounds", "1"
    )
    kinds = ("random", "conflicting", "nearly dependent")
    expected = [(k, kind, way) for k in (3, 8) for kind in kinds for way in ("JAX", "TorchJD")]
    assert [(row["losses"], row["gradients"], row["way"]) for row in rows] == expected
    assert all(row["over TorchJD"]["median"] == 1 for row in rows if row["way"] == "TorchJD")


def test_peak_memory_is_what_is_held_at_once():
    def run():
        first = torch.ones(1000)
        second = first + 1  # 8000 bytes
        del first
        second + torch.ones(2000)[:1000]  # 4000 + 8000 + 4000

    assert 16_000 <= pair.peak_bytes(run) < 17_000


@pytest.mark.filterwarnings("ignore:.*renormalised")
def test_step(tmp_path):
    rows = run(tmp_path, "step", "--data", "emotion6", "--steps", "1", "--rounds", "1")
    assert len(rows) == 4
    assert all(row["milliseconds a step"] > 0 for row in rows)


@pytest.mark.filterwarnings("ignore:.*renormalised")
def test_experiment(tmp_path):
    """So short that nothing is learned: all find something alike, and the cache is as before."""
    cache = jax.config.jax_compilation_cache_dir
    rows = run(tmp_path, "experiment", "--data", "emotion6", "--epochs", "4")
    assert jax.config.jax_compilation_cache_dir == cache
    assert {row["data"] for row in rows} == {"emotion6"}
    pytorch, compiles, has_compiled = (row["test KLD"] for row in rows)
    assert compiles == pytest.approx(pytorch, rel=0.5)
    assert has_compiled == compiles


def test_compile(tmp_path):
    rows = run(
        tmp_path, "compile", "--leaves", "2,3", "--shape", "4,4", "--losses", "2,3",
        "--only", "gdmam_released",
    )  # fmt: skip
    # The released form has one alignment loss.
    cases = (2, "summed(adamw)"), (2, "gdmam_released"), (3, "summed(adamw)")
    expected = [(leaves, *case) for leaves in (2, 3) for case in cases]
    assert [(row["leaves"], row["losses"], row["optimizer"]) for row in rows] == expected
    assert all(row["first step s"] >= row["compile s"] > 0 for row in rows)


@pytest.mark.parametrize("losses", [2, 3])
@pytest.mark.parametrize("name", ["MGDA(adamw)", "PCGrad(adamw)"])
def test_compile_has_weightings(name, losses):
    gradient = np.ones(4, np.float32)
    pair = gdmam.pair_gradients(gradient, gradient if losses == 2 else (gradient,) * 2)
    optimizer = compilation.OPTIMIZERS[name](None, losses - 1)
    updates, _ = jax.eval_shape(lambda: optimizer.update(pair, optimizer.init(gradient), gradient))
    assert updates.shape == gradient.shape


@pytest.mark.parametrize("command", ["pair", "update", "fork", "many"])
def test_one_loss_is_no_case(command):
    result = CliRunner().invoke(app, [command, "--losses", "3,1"])
    assert result.exit_code == 2
    assert "--losses must be whole numbers of at least 2" in result.output


def test_unknown_names_are_refused():
    result = CliRunner().invoke(app, ["pair", "--models", "perceptron"])
    assert result.exit_code == 2
    assert "perceptron" in result.output
    result = CliRunner().invoke(app, ["experiment", "--data", "movie,emotion6"])
    assert result.exit_code == 2
    assert "--data takes one name" in result.output


@pytest.mark.parametrize(
    "options",
    [
        ("update", "--leaves", "0"),
        ("update", "--leaves", "2.7"),
        ("update", "--dtype", "float8"),
        ("update", "--mu-dtype", "float8"),
        ("pair", "--models", ""),
        ("fork", "--models", "mlp,"),
        ("many", "--losses", "inf"),
        ("step", "--data", ""),
        ("compile", "--shape", ""),
        ("defaults", "--equations", ""),
        ("defaults", "--sets", "nowhere.mat"),
        ("weightings", "--sets", "Moovie"),
        ("soak", "--dtypes", ""),
        ("soak", "--only", "adam"),
    ],
)
def test_lists_that_are_empty_or_hold_unknown_entries_are_refused(options):
    assert CliRunner().invoke(app, options).exit_code == 2


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

%f (p.0: f32[10], p.1: bf16[10]) -> (f32[10], f32[]) {
  %p.0 = f32[10]{0} parameter(0)
  %p.1 = bf16[10]{0} parameter(1)
  %b = bf16[2,5]{1,0} bitcast(%p.1)
  %s = bf16[2,1]{1,0} slice(%b), slice={[0:2], [0:1]}
  ROOT %t = (f32[10]{0}, f32[]) custom-call(%p.0, %s)
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
    # Of y the fusion reads a slice of two elements.
    assert bytes_moved(PROGRAM) == (40 + 4 + 44) + (40 + 40 + 40)
    assert instructions(PROGRAM) == 11


def test_defaults_judges_candidates_by_failures_then_the_worst_ratio(tmp_path, monkeypatch):
    from benchmarks import defaults

    choices = {name: defaults.OURS[name] for name in ("gdmam", "gdmam pcgrad")}
    monkeypatch.setattr(defaults, "OURS", choices)
    monkeypatch.delitem(defaults.SOLVED, "solved, constant rate")
    monkeypatch.delitem(defaults.SOLVED, "solved, falling rate")
    errors = {"burgers": {"gdmam": [0.1, 0.3, 0.7], "gdmam pcgrad": [0.1, 0.2, 0.4]}}
    arrays = {name: np.array(runs) for name, runs in errors["burgers"].items()}
    monkeypatch.setattr(defaults, "networks", lambda *_: {"burgers": arrays})
    monkeypatch.setattr(
        defaults, "distributions", lambda *_: {"gdmam": np.ones(2), "gdmam pcgrad": np.full(2, 4.0)}
    )
    rows = run(tmp_path, "defaults", "--equations", "burgers", "--sets", "films")
    assert [row["candidate"] for row in rows] == ["gdmam pcgrad", "gdmam"]
    assert [row["failed"] for row in rows] == [0, 1]
    assert [row["worst ratio"] for row in rows] == pytest.approx([4.0, 1.5])
    assert [row["burgers"] for row in rows] == pytest.approx([0.2, 0.3])
    # A gradient that is only noise, and longer than the other, is what unit weights take off.
    pcgrad, default = (row["noisy, falling rate"] for row in rows)
    assert default < 1e-4 < 1e-3 < pcgrad


def test_weightings(tmp_path, monkeypatch):
    """Each problem's numbers are kept; the rate is the one that is best on seeds of their own."""
    from benchmarks import weightings

    def scores(*_):
        runs = len(weightings.RATES) * (2 + weightings.CHOOSING)
        return types.SimpleNamespace(
            errors=np.arange(runs)[:, None], score=np.arange(runs), chosen_by=np.arange(runs)
        )

    monkeypatch.setattr(weightings, "train_network", scores)
    monkeypatch.setattr(weightings, "train_kind", scores)
    command = "weightings", "--only", "famo", "--equations", "burgers", "--sets", "", "--seeds", "2"
    out = tmp_path / "out"
    (row,) = run(tmp_path, *command, "--out", str(out))
    assert row == {"weighting": "famo", "burgers": "0.5 (0 to 1)", "digits": "3.5 (3 to 4)"}
    path = out / "burgers" / "famo.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"scores": [7.0]}))
    (row,) = run(tmp_path, *command, "--out", str(out))
    assert row["burgers"] == "7 (7 to 7)"
    refused = CliRunner().invoke(app, [*command, "--out", str(out), "--steps", "200"])
    assert refused.exit_code == 2
    assert "settings" in refused.output


def test_absent(tmp_path):
    """Steps with labels that are not numbers are lost where nothing is said of them."""
    (row,) = run(tmp_path, "absent", "--only", "mgda", "--steps", "30", "--seeds", "3")
    assert row["weighting"] == "mgda"
    assert row["steps lost, hidden"] > 0
    assert row["steps lost, said"] == 0
    middle, low, high = (float(part.strip("()")) for part in row["said"].split() if part != "to")
    assert 0 < low <= middle <= high
