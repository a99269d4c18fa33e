"""Methods, the training loop, resuming, the command line and the report."""

import dataclasses
import errno
import json
import threading

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from typer.testing import CliRunner

import gdmam_jax as gdmam
from gdmam_jax.ldl import baselines, data, experiment, methods, progress, report, storage
from gdmam_jax.ldl.__main__ import _spelled, app, keep_compiled

pytestmark = pytest.mark.filterwarnings("ignore:.* is not made imbalanced")

SMALL = experiment.Configuration(
    folds=2,
    seeds=2,
    epochs=4,
    batch_size=16,
    validation_size=6,
    hidden=6,
    learning_rates=(1e-3, 1e-2),
    chunk=2,
)


@pytest.fixture(scope="module")
def dataset():
    """43 rows: folds of 21 and 22 rows, so the last batch is short, and empty in neither."""
    rng = np.random.default_rng(0)
    return data.from_arrays(
        rng.normal(size=(43, 5)), rng.dirichlet(np.ones(4), 43), name="small", normalize=True
    )


@pytest.fixture(scope="module", autouse=True)
def compile_once():
    """Programs are compiled once for this module: that is what takes the time."""
    built = {}
    build = experiment.build

    def remember(method, folds, configuration):
        key = method.name, folds.labels.tobytes(), configuration
        if key not in built:
            built[key] = build(method, folds, configuration)
        return built[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experiment, "build", remember)
        yield


class KilledError(Exception):
    pass


@pytest.fixture(scope="module")
def finished(dataset, tmp_path_factory):
    """A whole experiment, killed twice on its way, and the folder it wrote to."""
    folder = tmp_path_factory.mktemp("experiment")
    calls = []

    def progress(label, done, total):
        calls.append((label, done, total))
        if len(calls) in (3, 7):  # in the midst of the second run, and of the third
            raise KilledError

    for _ in range(2):
        with pytest.raises(KilledError):
            _run(dataset, folder, progress)
    records = _run(dataset, folder, progress)
    return folder, records, calls


def _run(dataset, folder, progress=None):
    return experiment.run(
        dataset,
        [methods.find("gdmam")],
        SMALL,
        folder=folder,
        checkpoint_seconds=0,
        progress=progress,
    )


@pytest.mark.parametrize("rows", ["validation", "natural"])
def test_the_learning_rate_is_the_best_on_the_rows_that_tune(rows):
    rng = np.random.default_rng(1)
    labels = rng.dirichlet(np.ones(4), 80)
    sampled = data.from_arrays(
        rng.normal(size=(80, 5)),
        labels,
        sampler=lambda labels, seed: np.flatnonzero(labels[:, 0] > np.median(labels[:, 0])),
        normalize=True,
    )
    configuration = dataclasses.replace(SMALL, seeds=1, epochs=2, tuning=rows)
    (record,) = experiment.run(sampled, [methods.find("adamw")], configuration)
    scores = {float(rate): found[rows] for rate, found in record["tuning"].items()}
    assert record["learning_rate"] == min(scores, key=scores.get)
    for found in record["tuning"].values():
        assert found["validation"] != found["natural"]


def test_a_killed_run_resumes_with_the_same_numbers(dataset, finished):
    folder, records, calls = finished
    whole = _run(dataset, None)
    for key in ("runs", "tuning", "learning_rate"):
        assert records[0][key] == whole[0][key]
    # Two rates of one seed, one rate of the other; what was done is not done again.
    # What a checkpoint or an outcome on the disk holds is told, too.
    assert [done for _, done, _ in calls] == [2, 4, 6, 4, 6, 8, 10, 4, 8, 10, 12]
    assert {total for *_, total in calls} == {12}
    assert sorted(path.name for path in folder.iterdir() if path.name[0] == "g") == [
        "gdmam.json",
        "gdmam.npz",
    ]


@pytest.mark.skipif(len(experiment._workers()) < 2, reason="needs two processors")
def test_folds_are_trained_at_once():
    """Two calls that wait for each other both return."""
    meeting = threading.Barrier(2, timeout=60)
    assert sorted(experiment._at_once(lambda _: meeting.wait(), range(2))) == [0, 1]


def test_two_devices_train_the_same_numbers(dataset, finished, monkeypatch):
    monkeypatch.setattr(experiment, "_workers", lambda: [None, jax.devices()[1]])
    seen = experiment._at_once(lambda number: jnp.ones(2) * number, range(3))
    assert [next(iter(array.devices())) for array in seen] == [jax.devices()[i] for i in (0, 1, 0)]
    assert _run(dataset, None)[0]["runs"] == finished[1][0]["runs"]


def test_results_are_kept_and_guarded(dataset, finished):
    folder, records, _ = finished
    assert _run(dataset, folder) == records
    assert len(records[0]["runs"]) == 4
    for run in records[0]["runs"]:
        assert set(run["selections"]) == set(experiment.SELECTIONS)
        assert 1 <= run["selections"]["validation"]["epoch"] <= 4
        assert run["selections"]["last"]["epoch"] == 4
    for other in (
        data.from_arrays(dataset.features, dataset.labels[::-1], name="small", normalize=True),
        data.from_arrays(dataset.features[::-1], dataset.labels, name="small", normalize=True),
    ):
        with pytest.raises(ValueError, match=r"gdmam\.json holds results of another data"):
            _run(other, folder)


def test_a_folder_is_one_experiment(dataset, finished):
    """Nor does another method's run change the configuration."""
    folder, _, _ = finished
    other = dataclasses.replace(SMALL, folds=3)
    with pytest.raises(ValueError, match=r"gdmam\.json holds results of another configuration"):
        experiment.run(dataset, [methods.find("adamw")], other, folder=folder)


def test_a_killed_run_is_not_resumed_as_another(dataset, tmp_path):
    def killed(label, done, total):
        raise KilledError

    with pytest.raises(KilledError):
        _run(dataset, tmp_path, killed)
    other = dataclasses.replace(SMALL, alignment_weight=9.0)
    with pytest.raises(ValueError, match=r"facts\.json holds results of another configuration"):
        experiment.run(dataset, [methods.find("gdmam")], other, folder=tmp_path)


def test_a_run_that_is_not_imbalanced_is_told(dataset, finished):
    with pytest.warns(UserWarning, match="small is not made imbalanced: .*; give it a sampler"):
        _run(dataset, finished[0])


def test_checkpoints_go_by_work_done(tmp_path, monkeypatch):
    """However fast a seed is: after every quarter of its epochs."""
    saved = []
    monkeypatch.setattr(storage, "save", lambda folder, epoch, *_: saved.append(epoch))
    program = experiment.Program(
        prepare=lambda length: None,
        init=lambda run: jnp.zeros(()),
        advance=lambda state, run, first, length: (state, {"kld": jnp.zeros(length)}),
        finish=lambda state, run: state,
    )
    configuration = dataclasses.replace(SMALL, epochs=12, chunk=1)
    experiment.train(program, 0, 0.1, configuration, folder=tmp_path)
    assert saved == [3, 6, 9]


def test_a_checkpoint_is_read_as_it_was_written(tmp_path):
    states = [{"count": jnp.int32(run), "m": jnp.full(2, run, jnp.bfloat16)} for run in (3, 4)]
    history = {"kld": np.arange(6.0).reshape(2, 3)}
    for epoch in (3, 5):  # the later one replaces the earlier
        leaves = jax.tree.leaves(experiment._stack(states))
        storage.save(tmp_path / "a", epoch, leaves, history)
    epoch, leaves, found = storage.restore(tmp_path / "a")
    assert epoch == 5
    np.testing.assert_array_equal(found.pop("kld"), history["kld"])
    assert not found
    restored = experiment._unstack(leaves, states[0], tmp_path)
    assert repr(restored) == repr(states)
    with pytest.raises(ValueError, match="a checkpoint of another method or version: remove it"):
        experiment._unstack(leaves, {"m": jnp.ones(3)}, tmp_path)
    assert storage.restore(tmp_path / "b") is None


def test_a_folder_is_held_by_one_run(tmp_path):
    with (
        storage.locked(tmp_path),
        pytest.raises(OSError, match=f"another run writes to {tmp_path}"),
        storage.locked(tmp_path),
    ):
        pass
    with storage.locked(tmp_path):
        pass


def test_errors_of_writing_name_the_path(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"file/out cannot be written: Not a directory"):
        storage.locked(tmp_path / "file" / "out").__enter__()
    full = OSError(errno.ENOSPC, "No space left on device")
    with (
        pytest.raises(OSError, match=r"a\.npz cannot be written: No space left on device"),
        storage.whole(tmp_path / "a.npz"),
    ):
        raise full
    assert not (tmp_path / "a.npz").exists()


def test_trivial_baselines_are_in_the_results(dataset, finished):
    folder, _, _ = finished
    records = {record["method"]: record for record in report.load(folder)}
    assert list(records) == ["gdmam", *baselines.BASELINES]
    folds = data.make_folds(dataset, folds=2, validation_size=6)
    for fold in range(2):
        tested = folds.test[fold][folds.test_mask[fold]]
        trained = folds.train[fold][folds.train_mask[fold]]
        untouched = np.setdiff1d(np.arange(43), tested)
        target = dataset.labels[tested]
        for name, prediction in (
            ("trivial-uniform", np.full(4, 0.25)),
            ("trivial-mean", dataset.labels[trained].mean(0)),
            ("trivial-untouched", dataset.labels[untouched].mean(0)),
        ):
            kld = (target * np.log(target / prediction)).sum(1).mean()
            chebyshev = np.abs(target - prediction).max(1).mean()
            for selection in experiment.SELECTIONS:
                found = report.values(records[name], selection, "kld")
                assert found.shape == (1, 2)
                np.testing.assert_allclose(found[0, fold], kld, rtol=1e-5)
            found = report.values(records[name], "last", "chebyshev")[0, fold]
            np.testing.assert_allclose(found, chebyshev, rtol=1e-5)


def _records(**klds):
    """Of two folds, by method's name."""
    runs = {
        name: [{"fold": f, "seed": 0, "selections": {"last": {"kld": kld + f}}} for f in range(2)]
        for name, kld in klds.items()
    }
    return [
        {"method": name, "label": name, "trivial": name.startswith("trivial"), "runs": found}
        | {"configuration": {"folds": 2}}
        for name, found in runs.items()
    ]


def test_a_set_on_which_no_method_beats_the_trivial_baselines_is_marked():
    trivial = {"trivial-uniform": 2.0, "trivial-mean": 3.0, "trivial-untouched": 1.0}
    note = report.unbeaten(_records(a=2.1, b=2.5, **trivial), "last")
    assert note.startswith(
        "No method beats a prediction without features (trivial-uniform: KLD 2.5"
    )
    assert report.unbeaten(_records(a=1.9, b=2.5, **trivial), "last") == ""
    assert report.unbeaten(_records(a=2.1), "last") == ""


def test_results_that_do_not_belong_together_are_not_compared(tmp_path):
    for name, folds in (("a", 2), ("b", 3)):
        record = {"method": name, "data": {}, "configuration": {"folds": folds}, "runs": []}
        (tmp_path / f"{name}.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match="the configuration of a is"):
        report.load(tmp_path)


def test_a_method_that_diverged_is_not_the_best(finished, tmp_path):
    folder, records, _ = finished
    diverged = json.loads(json.dumps(records[0])) | {"method": "a", "label": "Diverged"}
    diverged["runs"][0]["selections"]["last"]["kld"] = float("nan")
    for record in (diverged, records[0]):
        (tmp_path / f"{record['method']}.json").write_text(json.dumps(record))
        with np.load(folder / "gdmam.npz") as stored:
            curves = dict(stored)
        if record is diverged:
            curves["validation_kld"] = curves["validation_kld"] * np.nan
        np.savez(tmp_path / f"{record['method']}.npz", **curves)
    text = report.compare([tmp_path], method="gdmam")
    assert "| Diverged | nan ± nan (nan, nan) |" in text
    assert "| Diverged |  |" in text
    with pytest.raises(ValueError, match="no results of method 'c'; there are a, gdmam"):
        report.compare([tmp_path], method="c")


def test_selections_test_the_parameters_they_name(finished):
    folder, records, _ = finished
    with np.load(folder / "gdmam.npz") as curves:
        last = [run["selections"]["last"]["kld"] for run in records[0]["runs"]]
        np.testing.assert_allclose(curves["test_kld"][:, -1], last, rtol=1e-6)
        epochs = [run["selections"]["validation"]["epoch"] for run in records[0]["runs"]]
        np.testing.assert_array_equal(curves["validation_kld"].argmin(1) + 1, epochs)
        epochs = [run["selections"]["natural"]["epoch"] for run in records[0]["runs"]]
        np.testing.assert_array_equal(curves["natural_kld"].argmin(1) + 1, epochs)
        assert {"cosine", "gate", "prediction_momentum"} <= set(curves)
        tried = curves["tuning_natural_kld"]
        assert tried.shape == (len(SMALL.learning_rates), SMALL.folds, SMALL.epochs)
        used = SMALL.learning_rates.index(records[0]["learning_rate"])
        np.testing.assert_array_equal(tried[used], curves["natural_kld"][: SMALL.folds])
        np.testing.assert_allclose(curves["shown_last"].sum(-1), 1, rtol=1e-5)


def test_report(finished, tmp_path):
    folder, records, _ = finished
    page = report.write(folder).read_text()
    assert page.count("data:image/png;base64,") == len(report.PICTURES)
    texts = page, report.summary(folder), report.compare([folder])
    for label in ("GDMAM", *baselines.BASELINES.values()):
        assert all(label in text for text in texts)
        for name, row in (("table.md", f"| {label} |"), ("table.tex", f"{label} & ")):
            assert (folder / name).read_text().count(row) == len(experiment.SELECTIONS)
    assert r"\toprule" in (folder / "table.tex").read_text()
    lines = 1 + (4 + 3 * 2) * len(experiment.SELECTIONS)  # three baselines on two folds
    assert len((folder / "runs.csv").read_text().splitlines()) == lines
    assert f"{records[0]['learning_rate']:g}" in texts[1]
    compared = tmp_path / "runs.csv"
    result = CliRunner().invoke(
        app, ["compare", str(folder), "--method", "gdmam", "--csv", str(compared)]
    )
    last = np.mean([run["selections"]["last"]["kld"] for run in records[0]["runs"]])
    assert f"**{last:.4f} ± " in result.output
    marked = any(report.unbeaten(report.load(folder), name) for name in experiment.SELECTIONS)
    assert ("| small ‡ |" in result.output) == marked
    assert len(compared.read_text().splitlines()) == lines
    with pytest.raises(FileNotFoundError, match="no results in"):
        report.load(folder / "nothing")


def test_table_ranks_and_tests():
    rng = np.random.default_rng(0)

    def record(name, shift):
        runs = []
        for seed in range(5):
            for fold in range(10):
                found = dict.fromkeys(report.COLUMNS, shift + 0.01 * rng.normal())
                runs.append({"fold": fold, "seed": seed, "selections": {"last": found}})
        return {"method": name, "label": name, "configuration": {"folds": 10}, "runs": runs}

    cells = report.table([record("a", 0.5), record("b", 0.4), record("c", 0.401)], "last")
    assert [cells[name]["kld"].rank for name in "abc"] == [3, 1, 2]
    assert [cells[name]["cosine"].rank for name in "abc"] == [1, 3, 2]
    assert cells["a"]["kld"].p_runs < 1e-6
    assert cells["a"]["kld"].p_folds < 1e-6
    assert cells["c"]["kld"].p_runs > 0.05
    assert cells["b"]["kld"].p_runs == 1


@pytest.mark.parametrize("name", methods.METHODS)
def test_every_method_makes_a_step(name):
    method = methods.find(name)
    params = {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2)}

    def pair(params):
        total = params["kernel"].sum() + params["bias"].sum()
        return method.rescale(total**2, method.alignment * (total - 9) ** 2)

    optimizer = method.optimizer(0.1)
    _, pairs = gdmam.value_and_paired_grad(pair)(params)
    updates, _ = jax.jit(optimizer.update)(pairs, optimizer.init(params), params)
    moved = optax.apply_updates(params, updates)
    assert pair(moved)[0] < pair(params)[0]


def test_released_amsgrad_is_pytorchs():
    torch = pytest.importorskip("torch")
    gradients = np.random.default_rng(0).normal(size=(20, 4)) * np.geomspace(1, 1e-3, 20)[:, None]
    weight = torch.nn.Parameter(torch.ones(4, dtype=torch.float64))
    reference = torch.optim.AdamW([weight], lr=0.1, weight_decay=0.0, amsgrad=True)
    with jax.enable_x64(True):
        optimizer = optax.chain(
            methods.scale_by_released_amsgrad(), optax.scale_by_learning_rate(0.1)
        )
        params = jnp.ones(4)
        state = optimizer.init(params)
        for gradient in gradients:
            weight.grad = torch.from_numpy(gradient.copy())
            reference.step()
            updates, state = optimizer.update(jnp.asarray(gradient), state, params)
            params = optax.apply_updates(params, updates)
            np.testing.assert_allclose(params, weight.detach().numpy(), rtol=1e-12)


def test_a_method_of_ones_own(monkeypatch):
    monkeypatch.setattr(methods, "METHODS", dict(methods.METHODS))
    mine = methods.Method("mine", "Mine", lambda rate: gdmam.summed(optax.sgd(rate)))
    assert methods.register(mine) is methods.find("mine")
    with pytest.raises(ValueError, match="there is a method 'mine' already"):
        methods.register(mine)
    with pytest.raises(ValueError, match="unknown method 'yours'; expected one of gdmam, "):
        methods.find("yours")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"folds": 1}, "folds must be at least 2, got 1"),
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"learning_rates": (-1.0,)}, "learning_rates must be positive"),
        ({"tuning": "test"}, "tuning must be validation or natural, got 'test'"),
        ({"tuning_seeds": 9}, "tuning_seeds must be between 1 and seeds = 5, got 9"),
    ],
)
def test_bad_configurations_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        experiment.Configuration(**change)


def test_the_time_left_counts_what_was_trained_now():
    seconds = iter(range(0, 1000, 10))
    clock = progress.Clock(["a", "b"], chunk=25, now=lambda: next(seconds))
    assert clock("a", 200, 200) == "time left unknown"  # finished by an earlier run
    assert clock("b", 75, 200) == "time left unknown"  # at its checkpoint
    assert clock("b", 100, 200) == "time left unknown"  # compiled first
    assert clock("b", 125, 200) == "0:00:30 left"  # 25 epochs in ten seconds, 75 to go
    assert clock("b", 150, 200) == "0:00:20 left"
    assert clock("b", 200, 200) == "nothing left"


def test_messages_are_spelled_as_on_the_command_line():
    for text, spelled in (
        ("rows sum to 2; normalize=True divides", "rows sum to 2; --normalize divides"),
        ("tuning_seeds must be below seeds = 5", "--tuning-seeds must be below --seeds = 5"),
        ("3 rows are too few for 10 folds", "3 rows are too few for 10 folds"),
    ):
        assert _spelled(text) == spelled


def test_compiled_programs_are_kept_in_the_cache_unless_jax_is_told_where(tmp_path, monkeypatch):
    monkeypatch.setenv("GDMAM_LDL_CACHE", str(tmp_path))
    names = "jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs"
    before = {name: getattr(jax.config, name) for name in names}
    try:
        for told, kept in ((str(tmp_path), tmp_path), (None, tmp_path / "compiled")):
            jax.config.update(names[0], told)
            keep_compiled()
            assert jax.config.jax_compilation_cache_dir == str(kept)
    finally:
        for name, value in before.items():
            jax.config.update(name, value)


def test_help_lists_what_can_be_named():
    shown = CliRunner().invoke(app, ["run", "--help"], env={"COLUMNS": "200"}).output
    for name in (*methods.METHODS, *data.REGISTRY, *experiment.SELECTIONS):
        assert name in shown


@pytest.fixture
def command(tmp_path, dataset):
    features = np.column_stack([dataset.features, np.ones(43)])
    np.savez(tmp_path / "small.npz", features=features, labels=dataset.labels)

    def invoke(*options):
        given = f"run --data {tmp_path / 'small.npz'} --methods adamw --out {tmp_path / 'out'}"
        given += " --folds 2 --seeds 1 --epochs 2 --validation-size 6 --hidden 4 --chunk 1"
        return CliRunner().invoke(app, [*given.split(), *options], catch_exceptions=False)

    return invoke


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--drop-constant", "--rows", "9"), "--rows needs --imbalance thresholds, or a number"),
        (("--drop-constant", "--imbalance", "0.5"), "--imbalance must be auto, thresholds, none"),
        (("--drop-constant", "--imbalance", "thresholds"), "cannot keep 100 of 21 rows"),
        ((), "of column 5, in float32; drop_constant=True leaves such columns out"),
        (("--data", "Moovie"), "unknown data set 'Moovie'"),
    ],
)
def test_bad_commands_are_refused(command, options, message):
    with pytest.raises(ValueError, match=message):
        command(*options)


def test_command_line(tmp_path, command):
    options = ("--drop-constant", "--imbalance", "thresholds", "--rows", "14")
    result = command(*options)
    assert result.exit_code == 0, result.output
    assert "is not made imbalanced" not in result.output
    assert "AdamW: 1 of 2 epochs; all methods: time left unknown" in result.output
    out = tmp_path / "out"
    assert (out / "report.html").is_file()
    record = json.loads((out / "adamw.json").read_text())
    assert record["configuration"]["hidden"] == 4
    assert record["data"]["features"] == 5
    assert record["data"]["training_rows"] == [8, 8]
    assert record["data"]["imbalance_factor"] > 1
    assert record["versions"]["jax"] == jax.__version__
    again = command(*options, "--no-report")  # trains nothing, and reads as finished
    assert "AdamW: 2 of 2 epochs; all methods: nothing left" in again.output
    assert json.loads((out / "adamw.json").read_text()) == record
    with pytest.raises(ValueError, match="holds results of another data"):
        command("--drop-constant")
    assert CliRunner().invoke(app, ["report", str(out)]).exit_code == 0
    listed = CliRunner().invoke(app, ["data", "list"], env={"GDMAM_LDL_CACHE": str(tmp_path)})
    assert "emotion6" in listed.output
