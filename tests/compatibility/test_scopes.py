"""One geometry for all parameters, one per label, one per leaf."""

import chex
import jax
import jax.numpy as jnp
import optax
import pytest

import gdmam_jax as gdmam
from tests.compatibility.harness import STEPS, example_pairs, example_params, train

CHOICES = {
    "reference": {},
    "alternative": {
        "weighting": gdmam.balanced_weighting,
        "gate": gdmam.conflict_gate,
        "momentum": gdmam.relative_momentum,
        "b2": 0.99,
        "amsgrad": True,
    },
}


def flat(tree):
    """The tree as a dictionary of its leaves (pairs, for a tree of pairs) by path."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(
            tree, is_leaf=lambda node: isinstance(node, gdmam.GradientPair)
        )
    }


def by_part(path):
    return path.split("/")[0]


@pytest.mark.parametrize("choices", CHOICES)
@pytest.mark.parametrize("scope", [by_part, gdmam.leaf_scope])
def test_every_scope_goes_as_if_it_were_alone(scope, choices):
    """Decomposed apart, with statistics and momenta of its own; `diagnostics` names the scopes."""
    settings = CHOICES[choices]
    params, pairs = flat(example_params()), flat(example_pairs())
    groups = {}
    for path in params:
        groups.setdefault(scope(path), []).append(path)
    assert len(groups) == (2 if scope is by_part else 3)

    def parts(tree):
        return {label: {path: tree[path] for path in paths} for label, paths in groups.items()}

    alone = optax.chain(gdmam.scale_by_gdmam(**settings), optax.scale(-0.1))
    scoped = optax.chain(gdmam.scale_by_gdmam(scope=scope, **settings), optax.scale(-0.1))
    runs = train(
        {"scoped": scoped, **dict.fromkeys(groups, alone)},
        {"scoped": params, **parts(params)},
        {"scoped": pairs, **parts(pairs)},
    )
    report = gdmam.diagnostics(runs["scoped"].after(STEPS)[1])
    for label, paths in groups.items():
        found = {path: runs["scoped"].params[path] for path in paths}
        chex.assert_trees_all_close(found, runs[label].params, rtol=1e-5, atol=1e-6)
        for name, value in gdmam.diagnostics(runs[label].after(STEPS)[1]).items():
            chex.assert_trees_all_close(report.pop(f"{label}/{name}"), value, rtol=1e-3, atol=1e-5)
    assert not report


def test_one_label_is_one_geometry():
    runs = train(
        {
            "label": gdmam.gdmam(0.1, scope=lambda path: "all"),
            "default": gdmam.gdmam(0.1),
            "leaves": gdmam.gdmam(0.1, scope=gdmam.leaf_scope),
        },
        example_params(),
        example_pairs(),
    )
    chex.assert_trees_all_close(runs["label"].params, runs["default"].params, rtol=1e-6)
    difference = jax.tree.map(jnp.subtract, runs["leaves"].params, runs["default"].params)
    assert optax.tree.norm(difference) > 0.01


@pytest.mark.parametrize("weighting", [gdmam.norm_weighting, gdmam.balanced_weighting])
def test_leaves_of_one_task_alone_are_trained_by_it(weighting):
    """A head that only one loss reaches has one gradient, and follows that."""
    params = {"alignment head": jnp.zeros(3), "prediction head": jnp.zeros(3)}
    gradient, zero = jnp.array([1.0, -2, 2]), jnp.zeros(3)
    pairs = {
        "alignment head": gdmam.GradientPair(zero, gradient),
        "prediction head": gdmam.GradientPair(gradient, zero),
    }
    optimizer = gdmam.scale_by_gdmam(scope=gdmam.leaf_scope, weighting=weighting)
    updates, _ = jax.jit(optimizer.update)(pairs, optimizer.init(params))
    chex.assert_trees_all_close(updates, dict.fromkeys(params, gradient), rtol=1e-6)
