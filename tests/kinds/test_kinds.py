"""The kinds of problems: losses and scores are what they say; rates are chosen fairly."""

import csv
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.metrics import roc_auc_score
from typer.testing import CliRunner

import gdmam_jax as gdmam
from benchmarks.kinds import adversarial, game, methods, others, regularisers, report
from benchmarks.kinds.__main__ import KINDS, app
from benchmarks.kinds.kind import Opponent
from benchmarks.kinds.methods import METHODS, TUNED, WEIGHTINGS, one_of_all
from benchmarks.kinds.training import train


@pytest.mark.parametrize("name", KINDS)
def test_both_losses_have_a_gradient_and_the_score_is_of_data_held_out(name):
    kind = KINDS[name]()

    def losses(params, batch):
        found = kind.features(params, batch)
        return kind.prediction(params, found, batch), kind.alignment(params, found, batch)

    @jax.jit
    def measured(key):
        keys = jax.random.split(key, 5)
        params = kind.init(keys[0])
        batch = kind.sample(params, keys[1])
        if kind.opponent is not None:
            batch = batch, kind.opponent.init(keys[2])
        _, pairs = gdmam.value_and_paired_grad(losses)(params, batch)
        scores = [kind.score(params, key, part) for part, key in enumerate(keys[3:])]
        return gdmam.decompose(pairs).geometry, scores

    geometry, (chosen_by, reported) = jax.device_get(measured(jax.random.key(0)))
    assert geometry.prediction_norm > 0
    assert geometry.alignment_norm > 0
    # Neither loss is a multiple of the other.
    assert abs(geometry.cosine) < 0.999
    assert np.isfinite(reported)
    assert chosen_by != reported


@pytest.mark.parametrize("number", range(len(WEIGHTINGS)))
def test_one_program_has_every_weighting(number):
    weighting = list(WEIGHTINGS.values())[number]
    gramian, norms = jnp.array([[4.0, -1.0], [-1.0, 1.0]]), jnp.array([2.0, 1.0])
    losses = gdmam.Losses(values=jnp.array([3.0, 0.5]))
    together, zeros = one_of_all(number), jnp.zeros(2)
    memory, own = together.init(zeros), None
    if isinstance(weighting, gdmam.RememberingWeighting):
        own = weighting.init(zeros)

    @jax.jit
    def update(gramian, norms, memory, own, losses):
        found = together.update(gramian, norms, memory, losses)
        if own is None:
            return found, (weighting(gramian, norms), None)
        return found, weighting.update(gramian, norms, own, losses)

    for _ in range(3):
        (weights, memory), (expected, own) = update(gramian, norms, memory, own, losses)
        np.testing.assert_allclose(weights, expected, rtol=1e-6)


def test_the_norm_ratio_at_the_last_layer_makes_the_norms_there_alike():
    slopes = {"first": jnp.array([3.0]), "last": jnp.array([1.0, 2.0, 2.0])}, {
        "first": jnp.array([40.0]), "last": jnp.array([0.0, 0.0, -6.0])
    }  # fmt: skip

    @jax.jit
    def state(pairs, params):
        chosen = methods.optimizer("last-layer", 1.0, jnp.array(0.5), pairs["last"])
        return chosen.update(pairs, chosen.init(params), params)[1]

    seen = gdmam.diagnostics(state(gdmam.pair_gradients(*slopes), slopes[0]))
    assert seen["alignment_weight"] / seen["prediction_weight"] == pytest.approx(0.25, rel=1e-4)


def test_the_distance_of_two_normal_distributions():
    random = np.random.default_rng(0)
    one, turned = random.normal(size=(500, 3)), np.linalg.qr(random.normal(size=(3, 3)))[0]
    away, width = np.array([1.0, -2.0, 0.5]), np.array([1.0, 2.0, 3.0])
    one = (one - one.mean(axis=0)) @ np.linalg.inv(np.linalg.cholesky(np.cov(one.T))).T
    found = jax.jit(adversarial._frechet)(one @ turned, (one * width) @ turned + away)
    assert found == pytest.approx(np.sum(away**2) + np.sum((width - 1) ** 2), rel=1e-3)


def test_words_pass_their_gradient_to_what_they_stand_for():
    book, found = jnp.array([[0.0, 0.0], [1.0, 1.0]]), jnp.array([[[0.9, 0.7]], [[0.1, -0.2]]])
    slope = jax.random.normal(jax.random.key(0), found.shape)

    @jax.jit
    def pulled(slope):
        words, pull = jax.vjp(lambda x: adversarial._quantise(book, x)[0], found)
        return words, *pull(slope)

    words, gradient = pulled(slope)
    np.testing.assert_allclose(words, [[[1.0, 1.0]], [[0.0, 0.0]]], atol=1e-6)
    np.testing.assert_array_equal(gradient, slope)


def test_an_opponent_is_trained_on_its_own_loss():
    def mean(params, found, batch):
        return jnp.mean((params - batch[0]) ** 2) + 0 * jnp.sum(batch[1])

    kind = KINDS["scales"]()._replace(
        init=lambda key: jnp.zeros(()), sample=lambda params, key: jnp.ones(()), steps=400,
        features=lambda params, batch: (), prediction=mean,
        alignment=lambda params, found, batch: (params - batch[1]) ** 2,
        score=lambda params, key, part: params,
        opponent=Opponent(lambda key: jnp.array(0.0), lambda own, params, batch: (own - 5) ** 2),
    )  # fmt: skip
    found = train(kind, "weighed", [0.1], [list(WEIGHTINGS).index("sum x 1")], [0])
    # Halfway between what is sampled, 1, and where the opponent goes, 5.
    assert found.score[0] == pytest.approx(3, abs=0.05)


def test_two_atoms_rest_where_the_potential_is_least():
    apart = jnp.array([[0.0, 0, 0], [2 ** (1 / 6), 0, 0]])
    energy, slope = jax.jit(jax.value_and_grad(others._lennard_jones))(apart)
    assert energy == pytest.approx(-1, abs=1e-5)
    np.testing.assert_allclose(slope, 0, atol=1e-4)


def test_a_trajectory_on_a_circle():
    starts = jnp.array([[1.0, 0.0], [0.0, -2.0]])
    found = regularisers.trajectories(lambda at: at[..., ::-1] * jnp.array([-1.0, 1.0]), starts, 6)
    angles = regularisers.INTERVAL * np.arange(1, 7)
    np.testing.assert_allclose(found[0], np.stack([np.cos(angles), np.sin(angles)], 1), atol=1e-4)
    np.testing.assert_allclose(
        found[1], 2 * np.stack([np.sin(angles), -np.cos(angles)], 1), atol=1e-4
    )


def test_the_area_under_the_curve_is_that_of_scikit_learn(monkeypatch):
    data = regularisers.make_multilabel_classification(
        4000, n_features=30, n_classes=8, n_labels=1, allow_unlabeled=True, random_state=0
    )
    kind = regularisers.consistency()
    monkeypatch.setattr(regularisers.networks, "apply", lambda params, inputs: params)
    logits = np.random.default_rng(0).normal(size=(2000, 8)) + data[1][2000:]
    expected = roc_auc_score(data[1][2000:], logits, average="macro")
    score = jax.jit(kind.score, static_argnums=2)(logits, None, 1)
    assert score == pytest.approx(100 * expected, rel=1e-4)


def test_cart_and_pole_move_by_their_equations():
    state, force = np.array([[0.1, 0.2, 0.05, -0.3], [0.4, -1.0, -0.15, 0.8]], np.float32), 10.0
    moved = jax.jit(game._pole)(state, np.array([True, False]))
    (speed, speeding, turn, turning) = np.moveaxis((moved - state) / 0.02, -1, 0)
    np.testing.assert_allclose(speed, state[:, 1], rtol=1e-4)
    np.testing.assert_allclose(turn, state[:, 3], rtol=1e-4)
    sine, cosine, lever = np.sin(state[:, 2]), np.cos(state[:, 2]), 0.1 * 0.5
    pull = 1.1 * speeding + lever * (turning * cosine - state[:, 3] ** 2 * sine)
    np.testing.assert_allclose(pull, [force, -force], rtol=1e-3)
    np.testing.assert_allclose(4 / 3 * 0.5 * turning + speeding * cosine, 9.8 * sine, atol=2e-3)


def test_advantages_start_again_where_the_pole_fell():
    kind = game.actor_critic()
    shapes = jax.eval_shape(kind.init, jax.random.key(0))
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
    batch = jax.device_get(jax.jit(kind.sample)(params, jax.random.key(1)))
    # Values are 0, so that every step surprises by its reward, 1.
    goes_on = 1 + 0.99 * 0.95 * batch.returns[1:]
    before = batch.returns[:-1]
    fell = np.abs(batch.observations[1:, :, 2]) < 0.05
    np.testing.assert_allclose(np.where(before == 1, goes_on, before), goes_on, rtol=1e-5)
    assert np.all(fell[before == 1])
    assert np.sum(before == 1) > 8
    np.testing.assert_allclose(batch.returns[-1], 1)


def written(folder, scores, chosen_by, methods, program="weighed"):
    nothing = np.zeros_like(scores).tolist()
    record = {
        "methods": methods, "rates": [0.1, 0.2], "score": scores, "chosen_by": chosen_by,
        "cosine": nothing, "ratio": nothing, "settings": {"seeds": 2, "tuning_seeds": 1},
    }  # fmt: skip
    (folder / f"scales-{program}.json").write_text(json.dumps(record))


def test_rates_and_factors_are_chosen_by_seeds_of_their_own(tmp_path):
    # By method, rate and seed; the last seed is for choosing.
    scores = [[[1.0, 2.0, 0.0], [3.0, 4.0, 0.0]], [[5.0, 6.0, 0.0], [7.0, 8.0, 0.0]]]
    chosen_by = [[[0.0, 0.0, 9.0], [9.0, 9.0, 5.0]], [[9.0, 9.0, 4.0], [0.0, 0.0, float("nan")]]]
    written(tmp_path, scores, chosen_by, ["sum x 0.1", "sum x 1"])
    rows = report.rows({"scales": KINDS["scales"]()}, tmp_path)
    found = {
        name: [(row.of, row.rate, row.seed, row.score) for row in rows if row.method == name]
        for name in ("sum x 0.1", "sum x 1", "sum tuned")
    }
    assert found["sum x 0.1"] == [("sum x 0.1", 0.2, 0, 3.0), ("sum x 0.1", 0.2, 1, 4.0)]
    assert found["sum x 1"] == [("sum x 1", 0.1, 0, 5.0), ("sum x 1", 0.1, 1, 6.0)]
    assert found["sum tuned"] == found["sum x 1"]
    assert "| scales | **3.5 (3 to 4)** | 5.5 (5 to 6) | 5.5 (5 to 6) |" in report.table(rows)


def test_a_score_that_is_not_a_number_is_the_worst(tmp_path):
    written(tmp_path, [[[float("nan"), 1.0, 0.0]] * 2], [[[0.0, 0.0, 9.0]] * 2], ["sum x 1"])
    rows = report.rows({"scales": KINDS["scales"]()}, tmp_path)
    assert [row.score for row in rows if row.method == "sum x 1"] == [np.inf, 1.0]


def test_the_command_runs_resumes_and_writes_every_score(tmp_path):
    def run(*arguments):
        return CliRunner().invoke(app, [*arguments, "--out", str(tmp_path / "out")])

    small = ["run", "--kinds", "scales", "--seeds", "1", "--tuning-seeds", "1", "--steps", "3"]
    first = run(*small)
    assert first.exit_code == 0, first.output
    again = run(*small)
    assert again.stdout == first.stdout
    assert not again.stderr
    refused = run(*small[:-1], "4")
    assert refused.exit_code == 2
    assert "settings" in refused.output
    assert run("report", "--csv", str(tmp_path / "kinds.csv")).exit_code == 0
    with (tmp_path / "kinds.csv").open() as lines:
        rows = list(csv.DictReader(lines))
    # No discriminator, and so no last layer that is special.
    expected = [name for name in (*METHODS, *TUNED) if not name.startswith("last layer")]
    assert [row["method"] for row in rows] == expected
    assert all(np.isfinite(float(row["score"])) for row in rows)
    assert CliRunner().invoke(app, ["report", "--out", str(tmp_path)]).exit_code == 2
