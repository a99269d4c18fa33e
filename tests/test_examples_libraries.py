"""The examples inside other libraries: an optimizer of pairs gets the gradients of their losses."""

import importlib
import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gdmam_jax as gdmam

pytestmark = [
    # jinns silences it when it is imported, which pytest undoes.
    pytest.mark.filterwarnings(r"ignore:Using `field\(init=False\)`"),
    # PINNx calls functions of brainstate by names that will go.
    pytest.mark.filterwarnings("ignore:Accessing .* from 'brainstate:DeprecationWarning"),
]
ROOT = Path(__file__).parents[1]


@pytest.fixture
def load(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples")
    monkeypatch.setenv("DDE_BACKEND", "jax")  # before anything imports DeepXDE
    return importlib.import_module


def load_installed(load, library):
    if library == "jinns" and sys.version_info[:3] == (3, 12, 1):
        pytest.skip("Python 3.12.1 crashes in TypeVar(name=...), which jinns calls when imported")
    pytest.importorskip(library, reason=f"the example is of {library}: pip install {library}")
    return load(f"with_{library}")


def recorder(first):
    """An optimizer that moves nothing: its state is the last gradients, shaped like first's."""

    def update(updates, state, params=None):
        # DeepXDE's own step gives no parameters; its gradients have their shapes.
        return jax.tree.map(jnp.zeros_like, updates if params is None else params), updates

    return optax.GradientTransformation(first, update)


def first_of_jinns(example, optimizer, weights):
    _, params, points, loss = example.make_problem(seed=0)
    terms = None
    if weights is None:
        optimizer, terms = example.paired(optimizer), example.TERMS
    else:
        names = ("dyn_loss", "initial_condition", "boundary_loss")
        weights = example.jinns.loss.LossWeightsPDENonStatio(
            **dict(zip(names, map(float, weights), strict=True))
        )
        loss = example.eqx.tree_at(lambda loss: loss.loss_weights, loss, weights)
    return example.jinns.solve(
        n_iter=1,
        init_params=params,
        data=points,
        loss=loss,
        optimizer=optimizer,
        extra_optax_args_and_kwargs=terms,
        verbose=False,
    )[5]


def first_of_deepxde(example, optimizer, weights):
    model = example.make_model(seed=0)
    model.compile(optimizer, loss_weights=weights)
    if weights is None:
        example.allocate_losses(model)
    model.train(iterations=1, display_every=1)
    return model.opt_state


def first_of_pinnx(example, optimizer, weights):
    trainer = example.pinnx.Trainer(example.make_problem(0, weights))
    trainer.compile(example.braintools.optim.OptaxOptimizer(optimizer))
    if weights is None:
        example.allocate_losses(trainer)
    trainer.train(1, display_every=1)
    return trainer.optimizer.opt_state.value


FIRST = {"jinns": first_of_jinns, "deepxde": first_of_deepxde, "pinnx": first_of_pinnx}


@pytest.mark.parametrize("library", FIRST)
def test_pairs_are_the_gradients_of_the_librarys_own_step(library, load):
    """Of which the library's own, plain step makes a weighted sum."""
    example = load_installed(load, library)
    first = FIRST[library]
    pairs = first(example, recorder(lambda params: gdmam.pair_gradients(params, params)), None)
    data, equation = gdmam.unpair_gradients(pairs)
    expected = first(example, recorder(lambda params: params), [1, 3, 3])
    sizes = [float(optax.tree.norm(tree)) for tree in (data, equation, expected)]
    assert min(sizes) > 1e-2
    for one, other, total in zip(*map(jax.tree.leaves, (data, equation, expected)), strict=True):
        np.testing.assert_allclose(3 * one + other, total, rtol=0, atol=1e-5 * sum(sizes))


@pytest.mark.parametrize("library", FIRST)
def test_a_training_comes_nearer_to_the_solution_than_nothing(library, load):
    """A network of zeros has an error of 1."""
    example = load_installed(load, library)
    assert example.error("GDMAM, Muon", 0, 200, 1e-2) < 0.9


@pytest.mark.parametrize("library", FIRST)
def test_a_missing_library_is_named(library, load, monkeypatch):
    for name in (library, "equinox", "brainstate"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, f"with_{library}", raising=False)
    with pytest.raises(SystemExit, match=f"pip install {library}"):
        load(f"with_{library}")


def test_the_table_holds_medians_and_ranges(load, monkeypatch, capsys):
    flags = ["--seeds", "3", "--methods", "second", "--steps", "7"]
    monkeypatch.setattr(sys, "argv", ["with_it.py", *flags])
    load("comparing").compare("It.", ["first", "second"], lambda *given: given[1] ** 2 / 100, 5)
    printed = capsys.readouterr().out
    assert "first" not in printed
    assert printed.splitlines()[1].split()[:4] == ["second", "0.0100", "0.0000", "0.0400"]


def test_flags_without_sense_are_refused(load, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["with_it.py", "--seeds", "0"])
    with pytest.raises(SystemExit):
        load("comparing").compare("It.", ["first"], None, 5)
    assert "--steps and --seeds must be at least 1" in capsys.readouterr().err


def test_the_error_is_relative_to_the_exact_solution(load):
    comparing = load("comparing")

    def solution(x, t):
        return comparing.exact(np.stack([x, t], axis=1))

    assert comparing.relative_error(solution) < 1e-3
    assert comparing.relative_error(lambda x, t: 1.5 * solution(x, t)) == pytest.approx(
        0.5, abs=1e-3
    )


def test_the_page_shows_the_functions_of_the_examples():
    page = (ROOT / "docs/other_libraries.md").read_text()
    shown = re.findall(r"^def .+?(?=\n\n\n|\n```)", page, re.M | re.S)
    examples = "".join(path.read_text() for path in (ROOT / "examples").glob("with_*.py"))
    assert len(shown) == 4
    assert all(function in examples for function in shown)
