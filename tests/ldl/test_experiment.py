"""Methods, the training loop, resuming, the command line and the report."""

import dataclasses
import errno
import json
import re
import shutil
import threading
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.flatten_util import ravel_pytree
from typer.testing import CliRunner

import gdmam_jax as gdmam
from gdmam_jax import ldl
from gdmam_jax.ldl import data
from gdmam_jax.ldl.__main__ import _spelled, app, keep_compiled
from gdmam_jax.ldl.laboratory import (
    baselines,
    compare,
    experiment,
    methods,
    program,
    progress,
    protocol,
    report,
    results,
    selection,
    storage,
    tables,
    training,
)

pytestmark = pytest.mark.filterwarnings("ignore:.* is not made imbalanced")

SMALL = protocol.Configuration(
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
    """69 rows, of which folds train on 20 and 22, so the last batch is short, and empty in neither.

    Test folds have 35 and 34 rows. 8 and 7 rows are left out.
    """
    rng = np.random.default_rng(0)
    return data.from_arrays(
        rng.normal(size=(69, 5)),
        rng.dirichlet(np.ones(4), 69),
        name="small",
        normalize=True,
        sampler=lambda labels, fold: np.argsort(labels[:, 0])[: 26 + 2 * fold],
    )


@pytest.fixture(scope="module", autouse=True)
def compile_once():
    """Programs are compiled once for this module: that is what takes the time."""
    built = {}
    build = experiment.build

    def remember(method, folds, configuration):
        key = method.program(), folds.labels.tobytes(), configuration
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
    """A whole experiment, killed twice on its way, its results, and what it told."""
    folder = tmp_path_factory.mktemp("experiment")
    calls = []

    def progress(label, done, total):
        calls.append((label, done, total))
        if len(calls) in (4, 9):  # in the second training, and at the end of the third
            raise KilledError

    for _ in range(2):
        with pytest.raises(KilledError):
            _run(dataset, folder, progress)
    _run(dataset, folder, progress)
    return folder, results.load(folder), calls


def _run(dataset, folder, progress=None, method="gdmam"):
    experiment.run(
        dataset,
        [methods.find(method)],
        SMALL,
        folder=folder,
        checkpoint_seconds=0,
        progress=progress,
    )


def _same(left, right):
    """Two experiments' trials are the same to the last bit."""
    for mine, theirs in zip(left.methods, right.methods, strict=True):
        assert list(mine.trials) == list(theirs.trials)
        jax.tree.map(np.testing.assert_array_equal, mine.trials, theirs.trials)


def test_a_killed_run_resumes_with_the_same_numbers(dataset, finished, tmp_path):
    folder, found, calls = finished
    _run(dataset, tmp_path)
    _same(found, results.load(tmp_path))
    leftover = tmp_path / "gdmam" / "0.01" / "1"  # of a run killed when its outcome was written
    leftover.mkdir()
    _run(dataset, tmp_path)
    assert not leftover.exists()
    # Two rates of two seeds; what was done is not done again, and told first.
    assert [done for _, done, _ in calls] == [0, 2, 4, 6, 4, 6, 8, 10, 12, 8, 10, 12, 14, 16]
    assert {total for *_, total in calls} == {16}
    assert sorted(
        str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()
    ) == [
        ".lock",
        "experiment.json",
        *(f"gdmam/{trial}/{seed}.npz" for trial in ("0.001", "0.01") for seed in (0, 1)),
        "gdmam/method.json",
    ]


@pytest.mark.parametrize("rows", ["validation", "natural"])
def test_rate_and_epoch_are_chosen_by_one_criterion(finished, rows):
    """And again by another, from the same folder: without training."""
    _, found, _ = finished
    (method,) = found.methods
    best = {
        trial: trained.history[f"{rows}_kld"].min(1).mean()
        for trial, trained in method.trials.items()
    }
    chosen = method.trial(rows)
    assert chosen == min(best, key=best.get)
    np.testing.assert_allclose(selection.score(method.trials[chosen], rows), best[chosen], 1e-6)
    epochs = method.trials[chosen].history[f"{rows}_kld"].argmin(1) + 1
    np.testing.assert_array_equal(method.chosen(rows).results[rows]["epoch"], epochs)
    last = {t: trained.history[f"{rows}_kld"][:, -1].mean() for t, trained in method.trials.items()}
    assert method.trial("last", rows) == min(last, key=last.get)


def test_a_diverged_trial_is_not_chosen():
    def trial(*klds):
        return training.Trained({}, {"last": {"held_out": {"natural": np.array(klds)}}})

    found = {"0.1": trial(0.1, np.nan), "0.01": trial(0.5, 0.5), "0.001": trial(0.4, 0.7)}
    assert selection.choose(found, "last") == "0.01"
    with pytest.raises(ValueError, match=r"tuning must be one of validation, .*, got .test."):
        selection.rows("last", "test")


def test_settings_are_trained_by_one_program(dataset, tmp_path):
    """A setting is what another method is; it is a trial of its own."""
    method = methods.Method(
        "several",
        "Several",
        methods._gdmam,
        flat=True,
        settings=methods._chosen("preference=1", "pcgrad"),
    )
    assert method.program() == methods.find("gdmam").program()
    one = dataclasses.replace(SMALL, seeds=1, learning_rates=(1e-2,))
    chosen = [method, methods.find("gdmam"), methods.find("gdmam-pcgrad")]
    experiment.run(dataset, chosen, one, folder=tmp_path)
    gdmam_, pcgrad, several = results.load(tmp_path).methods
    assert list(several.trials) == ["0.01-preference=1", "0.01-pcgrad"]
    for trial, single in zip(several.trials.values(), (gdmam_, pcgrad), strict=True):
        jax.tree.map(np.testing.assert_array_equal, trial, single.trials["0.01"])
    first, second = several.trials.values()
    assert not np.array_equal(
        first.history["prediction_weight"], second.history["prediction_weight"]
    )


@pytest.mark.skipif(len(training._workers()) < 2, reason="needs two processors")
def test_folds_are_trained_at_once():
    """Two calls that wait for each other both return."""
    meeting = threading.Barrier(2, timeout=60)
    assert sorted(training._at_once(lambda _: meeting.wait(), range(2))) == [0, 1]


def test_two_devices_train_the_same_numbers(dataset, finished, monkeypatch, tmp_path):
    monkeypatch.setattr(training, "_workers", lambda: [None, jax.devices()[1]])
    seen = training._at_once(lambda number: jnp.ones(2) * number, range(3))
    assert [next(iter(array.devices())) for array in seen] == [jax.devices()[i] for i in (0, 1, 0)]
    _run(dataset, tmp_path)
    _same(finished[1], results.load(tmp_path))


def test_results_are_guarded(dataset, finished):
    folder, *_ = finished
    for other in (
        data.from_arrays(dataset.features, dataset.labels[::-1], name="small", normalize=True),
        data.from_arrays(dataset.features[::-1], dataset.labels, name="small", normalize=True),
    ):
        with pytest.raises(ValueError, match=r"experiment\.json is of another data"):
            _run(other, folder)


@pytest.mark.parametrize("change", [{"folds": 3}, {"alignment_weight": 9.0}])
def test_a_folder_is_one_experiment(dataset, finished, change):
    """Nor does another method's run change the configuration."""
    other = dataclasses.replace(SMALL, **change)
    with pytest.raises(ValueError, match=r"experiment\.json is of another configuration"):
        experiment.run(dataset, [methods.find("adamw")], other, folder=finished[0])


def test_a_run_that_is_not_imbalanced_is_told(dataset, finished):
    whole = dataclasses.replace(dataset, sampler=None)
    with (
        pytest.warns(UserWarning, match="small is not made imbalanced: .*; give it a sampler"),
        pytest.raises(ValueError, match="is of another data"),
    ):
        _run(whole, finished[0])


def test_checkpoints_go_by_work_done(tmp_path, monkeypatch):
    """However fast a seed is: after every quarter of its epochs."""
    saved = []
    monkeypatch.setattr(storage, "save", lambda folder, epoch, *_: saved.append(epoch))
    built = program.Program(
        prepare=lambda length: None,
        init=lambda run: jnp.zeros(()),
        advance=lambda state, run, first, length: (state, {"kld": jnp.zeros(length)}),
        finish=lambda state, run: state,
    )
    configuration = dataclasses.replace(SMALL, epochs=12, chunk=1)
    training.train(built, 0, 0.1, configuration, folder=tmp_path)
    assert saved == [3, 6, 9]


def test_a_checkpoint_is_read_as_it_was_written(tmp_path):
    states = [
        {
            "count": jnp.int32(run),
            "key": jax.random.key(run, impl="rbg"),
            "m": jnp.full(2, run, jnp.bfloat16),
        }
        for run in (3, 4)
    ]
    history = {"kld": np.arange(6.0).reshape(2, 3)}
    for epoch in (3, 5):  # the later one replaces the earlier
        leaves = jax.tree.leaves(training._stack(states))
        storage.save(tmp_path / "a", epoch, leaves, history)
    epoch, leaves, found = storage.restore(tmp_path / "a")
    assert epoch == 5
    np.testing.assert_array_equal(found.pop("kld"), history["kld"])
    assert not found
    restored = training._unstack(leaves, states[0], tmp_path)
    assert repr(restored) == repr(states)
    with pytest.raises(ValueError, match="a checkpoint of another method or version: remove it"):
        training._unstack(leaves, {"m": jnp.ones(3)}, tmp_path)
    assert storage.restore(tmp_path / "b") is None


def test_a_damaged_file_is_named(tmp_path):
    facts, outcome = tmp_path / "experiment.json", tmp_path / "0.npz"
    for path in (facts, outcome):
        path.touch()
    with pytest.raises(ValueError, match=rf"{re.escape(str(facts))} is damaged: .*; remove it, an"):
        results.load(tmp_path)
    with pytest.raises(ValueError, match=rf"{re.escape(str(outcome))} is damaged: No data left"):
        storage.read_npz(outcome)


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr("os.fsync", lambda _: seen.append(sorted(tmp_path.iterdir())))
    storage.write_json(tmp_path / "a.json", {})
    assert seen == [[tmp_path / "a.json.part"]]


def test_a_folder_is_held_by_one_run(tmp_path):
    with (
        storage.locked(tmp_path),
        pytest.raises(OSError, match=f"another run writes to {re.escape(str(tmp_path))}"),
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
    _, found, _ = finished
    trivial = {result.name: result for result in found.trivial}
    assert [result.name for result in found.rows] == ["gdmam", *baselines.BASELINES]
    folds = data.make_folds(dataset, folds=2, validation_size=6)
    for fold in range(2):
        tested = folds.test[fold][folds.test_mask[fold]]
        trained = folds.train[fold][folds.train_mask[fold]]
        untouched = np.setdiff1d(np.arange(69), tested)
        target = dataset.labels[tested]
        for name, prediction in (
            ("trivial-uniform", np.full(4, 0.25)),
            ("trivial-mean", dataset.labels[trained].mean(0)),
            ("trivial-untouched", dataset.labels[untouched].mean(0)),
        ):
            kld = (target * np.log(target / prediction)).sum(1).mean()
            chebyshev = np.abs(target - prediction).max(1).mean()
            for measure, value in (("kld", kld), ("chebyshev", chebyshev)):
                values = trivial[name].values(measure, "last")
                assert values.shape == (1, 2)
                np.testing.assert_allclose(values[0, fold], value, rtol=1e-5)


def _experiment(klds, folder="a", noise=1e-3, folds=10):
    """A data set with these mean test KLDs by method; trivial ones by their names."""
    rng = np.random.default_rng(0)
    methods_, trivial = [], []
    for name, kld in klds.items():
        measured = dict.fromkeys(tables.COLUMNS, kld + noise * rng.normal(size=folds))
        if name.startswith("trivial"):
            trivial.append(results.Result(name, name, folds, trivial=measured))
            continue
        held_out = dict.fromkeys(protocol.HELD_OUT, measured["kld"])
        outcome = {"epoch": np.ones(folds, int), "held_out": held_out, "measures": measured}
        trained = training.Trained({}, dict.fromkeys(protocol.SELECTIONS, outcome))
        methods_.append(results.Result(name, name.upper(), folds, {"0.1": trained}))
    return results.Experiment(folder, {"data": {"name": folder}}, methods_, trivial)


TRIVIAL = {"trivial-uniform": 2.0, "trivial-mean": 3.0, "trivial-untouched": 1.0}


def test_a_set_on_which_no_method_beats_the_trivial_baselines_is_marked():
    note = tables.unbeaten(_experiment({"a": 2.1, "b": 2.5} | TRIVIAL), "last")
    assert note.startswith("No method beats a prediction without features")
    assert tables.unbeaten(_experiment({"a": 1.9, "b": 2.5} | TRIVIAL), "last") == ""


def test_table_ranks_and_tests():
    cells = tables.table(_experiment({"a": 0.5, "b": 0.4, "c": 0.4001} | TRIVIAL), "last")
    assert [cells[name]["kld"].rank for name in "abc"] == [3, 1, 2]
    assert [cells[name]["cosine"].rank for name in "abc"] == [1, 3, 2]
    assert cells["a"]["kld"].p_runs < 0.01
    assert cells["a"]["kld"].p_folds < 1e-6
    assert cells["c"]["kld"].p_runs > 0.05
    assert cells["b"]["kld"].p_runs == 1


def test_equal_methods_are_both_the_best():
    """In tables of one set and of several; a table is made once."""
    found = _experiment({"a": 0.4, "b": 0.4, "rda": 0.5} | TRIVIAL, noise=0)
    found.methods[0] = dataclasses.replace(found.methods[0], label="A&B_1")
    cells = tables.table(found, "last", None)
    assert tables.table(found, "last", None) is cells
    kld, cosine = ([cells[name][m] for name in ("a", "b", "rda")] for m in ("kld", "cosine"))
    assert [cell.rank for cell in kld] == [1.5, 1.5, 3]
    assert [cell.best for cell in kld] == [True, True, False]
    assert [cell.rank for cell in cosine] == [2.5, 2.5, 1]
    assert tables.markdown(found, "last", None).count("**0.4000 ± 0.0000**") == 2 * 7
    assert tables.summary(found, ["last"], None).count("(lowest, ") == 2
    assert r"A\&B\_1 & $\mathbf{0.4000" in tables.latex(found, "last", None)


def test_a_method_that_diverged_is_not_the_best():
    found = _experiment({"a": float("nan"), "b": 0.4} | TRIVIAL)
    assert tables.table(found, "last")["a"]["kld"].rank == 2
    assert found.beaten("last")


def test_comparison(monkeypatch, tmp_path):
    klds = {
        "First": {"rda": 0.5, "a": 0.4, "b": 0.3},
        "second": {"rda": 0.5, "a": 0.4, "b": 0.6},
        "third": {"rda": 0.3, "a": 0.4, "b": 0.5},
        "useless": {"rda": 2.5, "a": 2.3, "b": 2.2, "c": 9.0},
    }
    found = {name: _experiment(values | TRIVIAL, name) for name, values in klds.items()}
    found["tied"] = _experiment({"rda": 0.5, "a": 0.5, "b": 0.6} | TRIVIAL, "tied", noise=0)
    found["First"].unfinished.append("adamw")
    monkeypatch.setattr(compare, "load", found.__getitem__)
    assert compare.markdown(compare.compare(["tied", "third"], "last")).count("| **0.500** |") == 2
    compared = compare.compare(["third", "useless", "First", "second"], "last")
    assert list(compared["data"].unique()) == ["First", "second", "third", "useless"]
    assert list(compared["method"].unique()) == ["a", "rda", "b"]
    assert list(compared["verdict"][::3]) == [1, 1, 1, 0]
    np.testing.assert_allclose(compare.friedman(compared), np.exp(-1 / 3))  # 2/3, two degrees
    text = compare.markdown(compared)
    assert "(useless)" in text
    for line in (
        "| A | 0.400\\* | **0.400**\\* | 0.400\\* | 2.300\\* | 1.7 | 2.0 | 1.0 | 2, 1 |",
        "| RDA | 0.500 | 0.500 | **0.300** | 2.500 | 2.0 | 2.0 | 2.0 |  |",
        "| B | **0.300**\\* | 0.600\\* | 0.500\\* | **2.200**\\* | 2.3 | 2.0 | 3.0 | 1, 2 |",
    ):
        assert line in text
    compare.write_csv(compared, tmp_path / "a.csv")
    assert len((tmp_path / "a.csv").read_text().splitlines()) == 1 + 4 * 3
    with pytest.raises(ValueError, match="two folders are of one data set"):
        compare.compare(["third", "third"], "last")
    with pytest.raises(ValueError, match="must have results of c and of another method; all have"):
        compare.compare(["third", "useless"], "last", reference="c")
    with pytest.raises(ValueError, match=r"left out, since some of .* are not finished: adamw"):
        compare.compare(["third", "First"], "last", reference="adamw")
    with pytest.raises(ValueError, match="unknown method 'd'; expected one of"):
        compare.compare(["third", "First"], "last", reference="d")


def test_where_a_training_diverged_its_method_is_last_in_every_test():
    pd = pytest.importorskip("pandas")
    rng = np.random.default_rng(0)
    found = [
        {"data": str(i), "label": label, "verdict": 1, "kld": rank + 1.0}
        for i in range(6)
        for label, rank in zip("ABC", rng.permutation(3), strict=True)
    ]
    worst = max(range(3), key=lambda row: found[row]["kld"])
    table = pd.DataFrame(found)
    before = compare.friedman(table)
    table.loc[worst, "kld"] = np.nan
    assert compare.friedman(table) == before


def test_paired_tests_of_a_difference_that_never_changes():
    """Exactly: ten signs that agree have a chance of 2 / 2^10."""
    p_runs, p_folds = tables.compare_runs(np.ones((2, 5)), np.zeros((2, 5)))
    assert 0 < p_runs < 0.01
    assert p_folds == 0
    p_runs, p_folds = tables.compare_runs(np.array([[1.0] * 4, [3.0] * 4]), np.zeros((2, 4)))
    assert 0 < p_runs < 0.02
    assert p_folds == 0


def test_the_test_over_folds_allows_for_their_overlap():
    """With two folds t has one degree of freedom, whose distribution is Cauchy's."""
    differences = np.array([[0.0, 5.0], [2.0, 1.0]])  # means of the seeds: 1 and 3
    _, p_folds = tables.compare_runs(differences, np.zeros((2, 2)))
    t = 2 / np.sqrt(2 * (1 / 2 + 1 / 1))
    np.testing.assert_allclose(p_folds, 1 - 2 / np.pi * np.arctan(t), rtol=1e-12)


def test_files_of_a_comparison_may_have_a_dot_in_their_name(monkeypatch, tmp_path):
    klds = {"a": {"rda": 0.5, "b": 0.4}, "c": {"rda": 0.5, "b": 0.6}}
    found = {name: _experiment(values | TRIVIAL, name) for name, values in klds.items()}
    monkeypatch.setattr(compare, "load", lambda folder: found[str(folder)])
    stale = tmp_path / "rate0.01.png"
    stale.touch()
    for name in ("rate0.01", "rate0.003"):
        given = ["compare", "a", "c", "--selection", "last", "--out", str(tmp_path / name)]
        assert CliRunner().invoke(app, given).exit_code == 0
    files = {path.name for path in tmp_path.iterdir()}
    assert files == {f"rate{rate}.{end}" for rate in ("0.01", "0.003") for end in ("md", "csv")}


def test_rates_that_differ_have_names_that_differ():
    """Six digits where these tell them apart in float32, and one name where nothing does."""
    given = 1e-3, 1.0000001e-3, 1.000001e-3, 3.1622776e-3, 3.16228e-3
    configuration = dataclasses.replace(SMALL, learning_rates=given)
    found = experiment.trials(methods.find("rda"), configuration)
    names = ["0.001", "0.00100000098", "0.00316227763", "0.00316228"]
    assert [trial.name for trial in found] == names
    rates = np.float32([trial.learning_rate for trial in found])
    np.testing.assert_array_equal(rates, np.float32([given[i] for i in (0, 2, 3, 4)]))


def test_a_trial_that_was_given_up_does_not_hide_its_method(tmp_path):
    path, method = tmp_path / "method.json", methods.find("rda")
    for rates, finished in (((0.1, 0.01), "0.01"), ((0.001,), None)):
        experiment._describe(path, method, dataclasses.replace(SMALL, learning_rates=rates))
        for seed in range(SMALL.seeds) if finished else ():
            (tmp_path / finished).mkdir(exist_ok=True)
            (tmp_path / finished / f"{seed}.npz").touch()
    assert json.loads(path.read_text())["trials"] == ["0.01", "0.001"]


def test_other_versions_than_those_of_the_folder_are_told(dataset, tmp_path, monkeypatch):
    folds = data.make_folds(dataset, folds=2, validation_size=6)
    common = experiment.facts(dataset, folds, SMALL)
    experiment._check(tmp_path, common, folds)
    experiment._check(tmp_path, common, folds)
    versions = experiment.versions() | {"jax": "0.0.1"}
    monkeypatch.setattr(experiment, "versions", lambda: versions)
    with pytest.warns(UserWarning, match=r"other versions than jax 0\.0\.1: what is trained now"):
        experiment._check(tmp_path, common, folds)


def test_a_label_that_never_occurs_is_no_head_label():
    labels = np.array([[0.9, 0.05, 0.05, 0], [0.9, 0.08, 0.02, 0], [0, 0, 0, 1]])
    folds = types.SimpleNamespace(
        labels=labels, train=np.array([[0, 1, 2]]), train_mask=np.array([[True, True, False]])
    )
    frequency, head = baselines.frequency_and_head(folds)
    np.testing.assert_allclose(frequency, [[1.8, 0.13, 0.07, 1]], rtol=1e-6)
    assert head.tolist() == [[True, True, False, False]]


def test_critical_difference_diagram(tmp_path):
    pytest.importorskip("scikit_posthocs")
    pd = pytest.importorskip("pandas")
    rng = np.random.default_rng(0)
    rows = [
        {"data": str(i), "label": label, "verdict": 1, "kld": rank, "rank": rank}
        for i in range(6)
        for label, rank in zip("ABC", rng.permutation(3) + 1.0, strict=True)
    ]
    compared = pd.DataFrame(rows)
    compare.draw(compared, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_selections_test_the_parameters_they_name(finished):
    _, found, _ = finished
    for trained in found.methods[0].trials.values():
        curves, outcomes = trained.history, trained.results
        assert set(outcomes) == set(protocol.SELECTIONS)
        last = outcomes["last"]
        np.testing.assert_allclose(curves["test_kld"][:, -1], last["measures"]["kld"], rtol=1e-6)
        for rows in protocol.HELD_OUT:
            best = curves[f"{rows}_kld"].argmin(1) + 1
            np.testing.assert_array_equal(outcomes[rows]["epoch"], best)
            scored = curves[f"{rows}_kld"].min(1), curves[f"{rows}_kld"][:, -1]
            np.testing.assert_allclose(outcomes[rows]["held_out"][rows], scored[0], rtol=1e-6)
            np.testing.assert_allclose(last["held_out"][rows], scored[1], rtol=1e-6)
        assert {"cosine", "gate", "prediction_momentum"} <= set(curves)
        np.testing.assert_allclose(last["shown"].sum(-1), 1, rtol=1e-5)


def _model():
    """A model of the fixture's, and a function from a vector to its parameters."""
    made = ldl.RDA(5, 4, SMALL.hidden, rngs=nnx.Rngs(0))
    graph, state = nnx.split(made)
    vector, tree = ravel_pytree(state)
    return vector, lambda params: nnx.merge(graph, tree(params))


@pytest.mark.parametrize("fold", [0, 1])
def test_the_numbers_of_a_training_are_those_that_numpy_finds(dataset, fold):
    """From the parameters of its state: on test rows, held-out rows, and of the average."""
    folds = data.make_folds(dataset, folds=2, validation_size=6)
    built = experiment.build(methods.find("gdmam"), folds, SMALL)
    run = program.run_of(fold, 1, 1e-2, methods.find("gdmam").settings["preference=1"])
    state, _ = built.advance(built.init(run), run, jnp.int32(0), 2)
    state, history = built.advance(state, run, jnp.int32(2), 2)
    training_rows = folds.labels[folds.train[fold][folds.train_mask[fold]]]
    frequency = training_rows.sum(0, dtype=np.float64)
    head = frequency >= np.sort(frequency)[2]
    test = folds.test[fold][folds.test_mask[fold]]
    model = _model()[1]

    def found(params, rows):
        """Labels of the rows, and what a vector of parameters predicts for them."""
        predicted = jax.nn.softmax(model(jnp.asarray(params))(folds.features[rows]))
        return np.asarray(folds.labels[rows], np.float64), np.asarray(predicted, np.float64)

    def klds(labels, predicted):
        return (labels * np.log(labels / predicted)).sum(1)

    def held_out(params):
        validation = found(params, folds.validation[fold])
        return {
            "validation": klds(*validation).mean(),
            "reweighted": np.average(klds(*validation), weights=(validation[0] / frequency).sum(1)),
            "natural": klds(*found(params, folds.natural[fold])).mean(),
        }

    results_ = built.finish(state, run)
    tested = dict(zip(protocol.HELD_OUT, state.best.params, strict=True))
    for name, params in (tested | {"last": state.params, "average": state.average}).items():
        labels, predicted = found(params, test)
        distances = np.square(labels - predicted)
        expected = {
            "kld": klds(labels, predicted).mean(),
            "euclidean_head": np.sqrt(distances[:, head].sum(1)).mean(),
            "euclidean_tail": np.sqrt(distances[:, ~head].sum(1)).mean(),
        }
        for measure, value in expected.items():
            np.testing.assert_allclose(results_[name]["measures"][measure], value, rtol=1e-4)
        for rows, value in held_out(params).items():
            np.testing.assert_allclose(results_[name]["held_out"][rows], value, rtol=1e-4)
    # The mean over epochs 3 and 4 of four: epoch 3's parameters are twice it less the last ones.
    third = held_out(2 * state.average - state.params)
    for rows, value in third.items():
        np.testing.assert_allclose(history[f"{rows}_kld"][0], value, rtol=1e-4)


def test_a_step_of_rda_on_a_short_batch_is_one_by_hand(dataset):
    """On the rows that are there, with the factors of the alignment loss's terms."""
    folds, rate = data.make_folds(dataset, folds=2, validation_size=6), 0.1
    method = dataclasses.replace(
        methods.find("rda"),
        optimizer=lambda rate: gdmam.summed(optax.sgd(rate)),
        alignment_weights=(0.5, 20.0, 3.0),
    )
    vector, model = _model()
    loop = program._Loop(program._Model(5, 4, SMALL), method, SMALL.batch_size, 2)
    run, arrays = program.run_of(0, 0, rate), program.arrays_of(folds)
    rows, mask, noise = loop.batches(jnp.int32(0), run, arrays)
    training_rows = folds.train[0][folds.train_mask[0]]
    assert sorted(rows[mask].tolist()) == sorted(training_rows.tolist())
    assert mask.sum(1).tolist() == [16, 4]
    last = rows[1], mask[1], noise[1]
    (stepped, _), _ = loop.step((vector, loop.optimizer(run).init(vector)), last, run, arrays)
    x, y = folds.features[rows[1, :4]], folds.labels[rows[1, :4]]

    def prediction_loss(logits, target, weights):
        frequency = folds.labels[training_rows].sum(0)
        return ldl.distribution_balanced(logits, target, frequency, 20, weights)

    @jax.jit
    @jax.grad
    def gradient(params):
        prediction, alignment = ldl.rda_losses(
            model(params), x, y, noise[1, :, :4], prediction_loss,
            recovery_weight=0.05, target_weight=2.0, similarity_weight=0.3,
        )  # fmt: skip
        total = prediction + alignment
        return total / jax.lax.stop_gradient(total)

    step = rate * gradient(vector)
    np.testing.assert_allclose(stepped, vector - step, atol=1e-4 * jnp.abs(step).max())


def stop_rendering(monkeypatch):
    """Figures are drawn all the same: rendering is what takes the time."""
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda _, path, **__: path.touch())


def test_report(finished, monkeypatch):
    folder, found, _ = finished
    page = report.write(folder).read_text()
    for picture in ("kld", "conflict", "allocation", "head_tail", "distributions"):
        assert (folder / f"{picture}.png").is_file()
    assert page.count("data:image/png;base64,") == 5
    texts = page, tables.summary(found, list(protocol.SELECTIONS))
    for label in ("GDMAM", *baselines.BASELINES.values()):
        assert all(label in text for text in texts)
        for name, row in (("table.md", f"| {label} |"), ("table.tex", f"{label} & ")):
            assert (folder / name).read_text().count(row) == len(protocol.SELECTIONS)
    assert r"\toprule" in (folder / "table.tex").read_text()
    lines = 1 + (4 + 3 * 2) * len(protocol.SELECTIONS)  # three baselines on two folds
    assert len((folder / "runs.csv").read_text().splitlines()) == lines
    stop_rendering(monkeypatch)
    (folder / "rda").mkdir()
    record = {"method": "rda", "label": "RDA", "trials": ["0.1"]}
    storage.write_json(folder / "rda" / "method.json", record)
    given = ["report", str(folder), "--selection", "last, natural, last", "--tuning", "validation"]
    with monkeypatch.context() as patch:
        loaded = []
        load = results.load
        for module in (results, report):
            patch.setattr(module, "load", lambda home: loaded.append(home) or load(home))
        shown = CliRunner().invoke(app, given)
    assert loaded == [folder]
    assert "left out, since some of their trials are not finished: rda\n" in shown.output
    shutil.rmtree(folder / "rda")
    mean = found.methods[0].values("kld", "last", "validation").mean()
    assert f"{mean:.4f} ±" in shown.output
    lines = 1 + (4 + 3 * 2) * 2
    assert len((folder / "runs.csv").read_text().splitlines()) == lines
    with pytest.raises(FileNotFoundError, match="no results in"):
        results.load(folder / "nothing")
    with pytest.raises(ValueError, match="unknown selection 'first'; expected one of validation"):
        report.selections(["first"])


@pytest.mark.parametrize("name", methods.METHODS)
def test_every_method_makes_a_step(name):
    method = methods.find(name)
    params = {"kernel": np.ones((3, 2), np.float32), "bias": np.ones(2, np.float32)}

    def pair(params):
        total = params["kernel"].sum() + params["bias"].sum()
        return method.rescale(total**2, method.alignment * (total - 9) ** 2)

    optimizer = method.optimizer(0.1, *list(method.settings.values())[:1])

    @jax.jit
    def losses(params):
        (before, _), pairs = gdmam.value_and_paired_grad(pair)(params)
        updates, _ = optimizer.update(pairs, optimizer.init(params), params)
        return before, pair(optax.apply_updates(params, updates))[0]

    before, after = losses(params)
    assert after < before


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
        state, update = optimizer.init(params), jax.jit(optimizer.update)
        for gradient in gradients:
            weight.grad = torch.from_numpy(gradient.copy())
            reference.step()
            updates, state = update(jnp.asarray(gradient), state, params)
            params = optax.apply_updates(params, updates)
            np.testing.assert_allclose(params, weight.detach().numpy(), rtol=1e-12)


def test_a_method_of_ones_own(monkeypatch):
    monkeypatch.setattr(methods, "METHODS", dict(methods.METHODS))
    # Not "mine", which the example of docs/ldl.md registers, perhaps in this process.
    ours = methods.Method("ours", "Ours", lambda rate: gdmam.summed(optax.sgd(rate)))
    assert methods.register(ours) is methods.find("ours")
    with pytest.raises(ValueError, match="there is a method 'ours' already"):
        methods.register(ours)
    with pytest.raises(ValueError, match="unknown method 'yours'; expected one of gdmam, "):
        methods.find("yours")


@pytest.mark.parametrize("flat", [False, True])
def test_a_method_is_given_the_losses_values(dataset, flat):
    """Without them FAMO's weights are an error."""
    weighting = gdmam.famo_weighting()
    method = methods.Method(
        "famo", "FAMO", lambda rate: gdmam.weighed(optax.adam(rate), weighting), flat=flat
    )
    folds, run = data.make_folds(dataset, folds=2, validation_size=6), program.run_of(0, 0, 1e-3)
    built = program.build(method, folds, SMALL)
    _, history = built.advance(built.init(run), run, jnp.int32(0), 2)
    assert np.all(np.isfinite(history["test_kld"]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"folds": 1}, "folds must be at least 2, got 1"),
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"learning_rates": (-1.0,)}, "learning_rates must be positive numbers"),
        ({"learning_rates": (1e-3, float("nan"))}, "learning_rates must be positive numbers"),
        ({"alignment_weight": float("inf")}, "alignment_weight must be at least 0, got inf"),
        ({"log_variance_bound": 0.0}, "log_variance_bound must be above 0, or None, got 0"),
    ],
)
def test_bad_configurations_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        protocol.Configuration(**change)


def test_the_time_left_counts_what_was_trained_now():
    seconds = iter(range(0, 1000, 10))
    clock = progress.Clock({"a": 225, "b": 100}, chunk=25, now=lambda: next(seconds))
    for done in (25, 225):  # finished by an earlier run, however little it was at once
        assert clock("a", done) == "time left unknown"
    assert clock("b", 0) == "time left unknown"
    assert clock("b", 25) == "time left unknown"  # compiled first
    assert clock("b", 50) == "0:00:20 left"  # 25 epochs in ten seconds, 50 to go
    assert clock("b", 75) == "0:00:10 left"
    assert clock("b", 100) == "nothing left"


def test_messages_are_spelled_as_on_the_command_line():
    for text, spelled in (
        ("rows sum to 2; normalize=True divides", "rows sum to 2; --normalize divides"),
        ("batch_size must be below seeds = 5", "--batch-size must be below --seeds = 5"),
        ("--imbalance must be auto", "--imbalance must be auto"),
        ("tuning must be one of", "--tuning must be one of"),
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
    for name in (*methods.METHODS, *data.REGISTRY, *protocol.SELECTIONS):
        assert name in shown


@pytest.fixture
def command(tmp_path, dataset):
    features = np.column_stack([dataset.features, np.ones(69)])
    np.savez(tmp_path / "small.npz", features=features, labels=dataset.labels)

    def invoke(*options):
        given = f"run --data {tmp_path / 'small.npz'} --methods adamw --out {tmp_path / 'out'}"
        # Models like those of SMALL, which need not be compiled again.
        given += " --folds 2 --seeds 1 --epochs 4 --validation-size 6 --hidden 6 --chunk 2"
        return CliRunner().invoke(app, [*given.split(), *options], catch_exceptions=False)

    return invoke


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--drop-constant", "--rows", "9"), "--rows needs --imbalance thresholds, or a number"),
        (("--drop-constant", "--imbalance", "0.5"), "--imbalance must be auto, thresholds, none"),
        (("--drop-constant", "--imbalance", "thresholds"), "cannot keep 100 of 34 rows"),
        ((), "of column 5, in float32; drop_constant=True leaves such columns out"),
        (("--data", "Moovie"), "unknown data set 'Moovie'"),
    ],
)
def test_bad_commands_are_refused(command, options, message):
    with pytest.raises(ValueError, match=message):
        command(*options)


def test_command_line(tmp_path, command, monkeypatch):
    stop_rendering(monkeypatch)
    options = ("--drop-constant", "--imbalance", "thresholds", "--rows", "14")
    result = command(*options)
    assert result.exit_code == 0, result.output
    assert "is not made imbalanced" not in result.output
    assert "AdamW: 0 of 4 epochs; all methods: time left unknown" in result.output
    out = tmp_path / "out"
    assert (out / "report.html").is_file()
    facts = json.loads((out / "experiment.json").read_text())
    assert facts["configuration"]["hidden"] == 6
    assert facts["data"]["features"] == 5
    assert facts["data"]["training_rows"] == [8, 8]
    assert facts["data"]["imbalance_factor"] > 1
    assert facts["versions"]["jax"] == jax.__version__
    outcome = (out / "adamw" / "0.001" / "0.npz").read_bytes()
    again = command(*options, "--no-report")  # trains nothing, and reads as finished
    assert "AdamW: 4 of 4 epochs; all methods: nothing left" in again.output
    assert (out / "adamw" / "0.001" / "0.npz").read_bytes() == outcome
    with pytest.raises(ValueError, match="is of another data"):
        command("--drop-constant")
    listed = CliRunner().invoke(app, ["data", "list"], env={"GDMAM_LDL_CACHE": str(tmp_path)})
    assert "emotion6" in listed.output
