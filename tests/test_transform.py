"""The update rules of both forms inside JAX's and Optax's machinery, and what they refuse."""

import functools
import inspect

import chex
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gdmam_jax as gdmam
from tests.conftest import skipped_under

FORMS = {
    "momentum": lambda: gdmam.scale_by_gdmam(),
    "allocated": lambda: gdmam.gdmam(0.05, amsgrad=True),
    "separate": lambda: gdmam.gdmam(0.05, momenta="separate"),
    "released": lambda: gdmam.gdmam_released(0.05),
}
WEIGHTINGS = (
    gdmam.norm_weighting, gdmam.balanced_weighting, gdmam.constant_weighting(1, 0.5),
    gdmam.pcgrad_weighting,
)  # fmt: skip
GATES = (gdmam.cosine_gate, gdmam.conflict_gate, gdmam.open_gate, gdmam.priority_gate)
MOMENTA = (
    gdmam.ratcheted_momentum, gdmam.anchored_momentum, gdmam.relative_momentum,
    gdmam.constant_momentum,
)  # fmt: skip

EVERY_FORM = pytest.mark.parametrize("form", FORMS)
PARAMS = {"dense": {"kernel": jnp.ones((3, 2)), "bias": jnp.zeros(2)}}


def losses(params, x):
    output = x @ params["dense"]["kernel"] + params["dense"]["bias"][None]
    return jnp.mean((output - 1) ** 2), jnp.mean(jnp.sin(3 * output))


def step(optimizer, params, state, x):
    _, pairs = gdmam.value_and_paired_grad(losses)(params, x)
    updates, state = optimizer.update(pairs, state, params)
    return optax.apply_updates(params, updates), state


def batches(count):
    return jnp.asarray(np.random.default_rng(0).normal(size=(count, 4, 3)), jnp.float32)


def all_finite(tree):
    return all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(tree))


@skipped_under("jax_debug_nans", "switches off donation")
@skipped_under("jax_disable_jit", "compiles nothing")
@EVERY_FORM
def test_one_compilation_serves_all_steps_and_buffers_can_be_donated(form):
    optimizer, traces = FORMS[form](), []

    def traced(params, state, x):
        traces.append(1)
        return step(optimizer, params, state, x)

    compiled = jax.jit(traced, donate_argnums=(0, 1))
    params = jax.tree.map(jnp.copy, PARAMS)
    state = optimizer.init(params)
    # Parameters and moments; the scalars that only report the last step are not read again.
    buffers = [leaf for leaf in jax.tree.leaves((params, state)) if leaf.shape == (3, 2)]
    for x in batches(3):
        params, state = compiled(params, state, x)
    assert (len(traces), compiled._cache_size()) == (1, 1)
    assert len(buffers) >= 2
    assert all(leaf.is_deleted() for leaf in buffers)
    assert all_finite(params)


@EVERY_FORM
def test_scan_and_steps_one_by_one_agree_and_state_keeps_its_types(form):
    optimizer = FORMS[form]()
    carry = PARAMS, optimizer.init(PARAMS)
    one_step, xs = jax.jit(functools.partial(step, optimizer)), batches(4)
    scanned, _ = jax.lax.scan(lambda c, x: (one_step(*c, x), None), carry, xs)
    for x in xs:
        after = one_step(*carry, x)
        chex.assert_trees_all_equal_shapes_and_dtypes(after, carry)
        carry = after
    chex.assert_trees_all_close(scanned, carry, rtol=1e-5, atol=1e-6)


@EVERY_FORM
def test_vmap_trains_each_model_as_alone(form, x64):
    optimizer = FORMS[form]()
    xs = np.float64(batches(3))
    models = jax.tree.map(
        lambda leaf: np.float64([leaf, 2 * np.asarray(leaf) + 0.3, np.zeros(leaf.shape)]), PARAMS
    )

    def train(model):
        def one(carry, x):
            return step(optimizer, *carry, x), None

        return jax.lax.scan(one, (model, optimizer.init(model)), xs)[0]

    (together, states), alone = jax.device_get(jax.jit(jax.vmap(train))(models)), jax.jit(train)
    reports = gdmam.diagnostics(states)
    assert all(report.shape == (3,) for report in reports.values())
    for row in range(3):
        model, *found = (
            jax.tree.map(lambda leaf, row=row: leaf[row], tree)
            for tree in (models, together, reports)
        )
        params, state = alone(model)
        expected = [params, gdmam.diagnostics(state)]
        chex.assert_trees_all_close(found, expected, rtol=1e-5, atol=1e-6)


@EVERY_FORM
def test_the_step_lowers_for_cpu_cuda_and_tpu(form):
    optimizer = FORMS[form]()
    state = jax.eval_shape(optimizer.init, PARAMS)
    leaves, structure = jax.tree.flatten((PARAMS, state, batches(1)[0]))

    def on_leaves(*leaves):
        return jax.tree.leaves(step(optimizer, *structure.unflatten(leaves)))

    exported = jax.export.export(jax.jit(on_leaves), platforms=("cpu", "cuda", "tpu"))(*leaves)
    assert exported.platforms == ("cpu", "cuda", "tpu")


@EVERY_FORM
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
def test_updates_and_momenta_have_the_parameters_dtype_and_statistics_are_wider(form, dtype, x64):
    optimizer = FORMS[form]()
    params = {"w": jnp.ones(3, dtype), "b": jnp.ones(2, dtype)}

    def one(params):
        state = optimizer.init(params)
        pairs = gdmam.pair_gradients(params, params)
        return optimizer.update(pairs, state, params)

    updates, state = jax.eval_shape(one, params)
    assert {leaf.dtype for leaf in jax.tree.leaves(updates)} == {jnp.dtype(dtype)}
    wide = jnp.dtype("float64" if dtype == "float64" else "float32")
    own = state if form == "momentum" else state[0]
    momentum = own.first_moment if form == "released" else own.momenta[-1]
    assert momentum["w"].dtype == dtype
    assert own.statistics.mean.dtype == wide
    if form != "momentum":
        assert own.second_moment["w"].dtype == wide


def zero_cases():
    one, zero = [0.5, -1.0, 0.0], [0.0] * 3
    return np.array([zero, one, zero]), np.array([zero, zero, one])


# With the defaults in FORMS, every weighting, gate and momentum rule once.
OTHER_CHOICES = {
    f"choice {k}": functools.partial(
        gdmam.gdmam, 0.05, weighting=WEIGHTINGS[k], gate=GATES[k], momentum=MOMENTA[k]
    )
    for k in range(4)
}


@pytest.mark.parametrize("form", [*FORMS, *OTHER_CHOICES])
def test_zero_gradients_give_finite_updates_and_derivatives(form):
    optimizer, params = (FORMS | OTHER_CHOICES)[form](), jnp.ones(3)

    def three_steps(prediction, alignment):
        def one(carry, _):
            params, state = carry
            pair = gdmam.GradientPair(prediction, alignment)
            update, state = optimizer.update(pair, state, params)
            return (optax.apply_updates(params, update), state), None

        (end, _), _ = jax.lax.scan(one, (params, optimizer.init(params)), length=3)
        return jnp.sum(end * jnp.arange(1.0, 4.0))

    values, gradients = jax.jit(jax.vmap(jax.value_and_grad(three_steps, argnums=(0, 1))))(
        *zero_cases()
    )
    assert all_finite((values, gradients))


def test_derivatives_through_a_step_are_right(x64):
    """Against central differences, where nothing is zero: what meta-learning relies on."""

    optimizer, params = gdmam.gdmam(0.1, amsgrad=True), jnp.ones(3)

    def two_steps(prediction):
        def one(carry, scale):
            params, state = carry
            pair = gdmam.GradientPair(scale * prediction, jnp.array([0.3, 1.0, -0.7]))
            update, state = optimizer.update(pair, state, params)
            return (params + update, state), None

        scales = jnp.array([1.0, 1.5])
        (end, _), _ = jax.lax.scan(one, (params, optimizer.init(params)), scales)
        return jnp.sum(end * jnp.arange(1.0, 4.0))

    compiled, at, h = jax.jit(jax.value_and_grad(two_steps)), np.array([0.5, 0.8, 0.4]), 1e-6
    _, found = compiled(at)
    for row, unit in enumerate(np.eye(3)):
        after, before = (float(compiled(at + side * h * unit)[0]) for side in (1, -1))
        np.testing.assert_allclose(found[row], (after - before) / (2 * h), rtol=1e-5, atol=1e-8)


@EVERY_FORM
@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e18])
def test_updates_are_finite_at_every_scale_whose_squares_the_dtype_holds(form, scale):
    optimizer = FORMS[form]()
    params = jnp.ones(3)
    state = optimizer.init(params)
    update_once = jax.jit(optimizer.update)
    for other in (1.0, scale, 0.0):
        pair = gdmam.GradientPair(scale * np.array([1.0, -2, 0.5]), other * np.array([1.0, 1, 2]))
        update, state = update_once(pair, state, params)
        assert all_finite(update)
        if form in ("allocated", "separate"):
            assert np.max(np.abs(update)) < 1


@pytest.mark.parametrize("form", FORMS)
def test_nothing_depends_on_the_split_into_leaves(form, x64):
    random = np.random.default_rng(1)
    prediction, alignment = random.normal(size=(2, 5, 12))
    optimizer = FORMS[form]()

    def run(to_tree):
        params = to_tree(np.ones(12))
        state = optimizer.init(params)
        update_once = jax.jit(optimizer.update)
        for g_p, g_a in zip(prediction, alignment, strict=True):
            pairs = gdmam.pair_gradients(to_tree(g_p), to_tree(g_a))
            updates, state = update_once(pairs, state, params)
            params = optax.apply_updates(params, updates)
        return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(params)])

    whole = run(lambda vector: [vector])
    parts = run(lambda vector: {"a": vector[:5], "b": [vector[5:6], vector[6:].reshape(2, 3)]})
    np.testing.assert_allclose(parts, whole, rtol=1e-13)


def test_momentum_is_unbiased_for_a_constant_gradient():
    """However the decays change, the average of equal gradients is that gradient."""
    optimizer = gdmam.scale_by_gdmam(gate=gdmam.open_gate, weighting=gdmam.constant_weighting(1, 1))
    g_p, g_a = np.array([3.0, -40.0, 0.5]), np.array([1.0, 2.0, -3.0])
    state = optimizer.init(g_p)
    update_once = jax.jit(optimizer.update)
    for _ in range(20):
        update, state = update_once(gdmam.GradientPair(g_p, g_a), state)
        np.testing.assert_allclose(update, g_p + g_a, rtol=1e-6)


def test_hyperparameters_can_be_injected_scheduled_and_traced():
    optimizer = optax.inject_hyperparams(gdmam.scale_by_gdmam)(
        statistics_decay=0.8, b2=optax.linear_schedule(0.9, 0.99, 10)
    )
    state = optimizer.init(PARAMS)
    pairs = gdmam.pair_gradients(PARAMS, PARAMS)
    update_once = jax.jit(optimizer.update)
    for _ in range(2):
        updates, state = update_once(pairs, state, PARAMS)
    assert all_finite(updates)
    np.testing.assert_allclose(state.hyperparams["b2"], 0.909, rtol=1e-6)


PAIRS = gdmam.pair_gradients(PARAMS, PARAMS)
KERNEL, BIAS = PAIRS["dense"]["kernel"], PAIRS["dense"]["bias"]
WRONG_UPDATES = {
    "not pairs": (
        PARAMS,
        TypeError,
        r"dense/bias is float(32|64)\[2\]; expected a GradientPair",
    ),
    "one leaf is no pair": (
        {"dense": {"kernel": KERNEL, "bias": jnp.zeros(2)}},
        TypeError,
        r"dense/bias is float(32|64)\[2\]; expected a GradientPair",
    ),
    "halves are trees": (
        gdmam.GradientPair(PARAMS, PARAMS),
        TypeError,
        r"the prediction half of the pair at \(root\) is dict; .* pair_gradients",
    ),
    "halves of two shapes": (
        {"dense": {"kernel": gdmam.GradientPair(jnp.ones((3, 2)), jnp.ones((2, 3))), "bias": BIAS}},
        ValueError,
        r"dense/kernel must agree in shape and dtype.*float(32|64)\[3, 2\].*float(32|64)\[2, 3\]",
    ),
    "halves of two dtypes": (
        {
            "dense": {
                "kernel": KERNEL,
                "bias": gdmam.GradientPair(jnp.ones(2), jnp.ones(2, "bfloat16")),
            }
        },
        ValueError,
        r"dense/bias must agree.*float(32|64).*bfloat16",
    ),
    "integer gradients": (
        {"dense": {"kernel": KERNEL, "bias": gdmam.GradientPair(jnp.arange(2), jnp.arange(2))}},
        TypeError,
        r"dense/bias.*int(32|64); expected a real floating-point",
    ),
    "a leaf is missing": (
        {"dense": {"kernel": KERNEL}},
        ValueError,
        r"structure of the parameters.*missing: dense/bias",
    ),
    "a leaf is unknown": (
        {"dense": {"kernel": KERNEL, "bias": BIAS, "scale": BIAS}},
        ValueError,
        r"structure of the parameters.*unknown: dense/scale",
    ),
    "another shape than the parameter": (
        {"dense": {"kernel": KERNEL, "bias": gdmam.GradientPair(jnp.ones(5), jnp.ones(5))}},
        ValueError,
        r"array of shape \(5,\) at dense/bias; expected the parameter's \(2,\)",
    ),
}


@EVERY_FORM
@pytest.mark.parametrize("case", WRONG_UPDATES)
def test_wrong_updates_are_refused_while_tracing(form, case):
    updates, error, message = WRONG_UPDATES[case]
    optimizer = FORMS[form]()
    state = jax.eval_shape(optimizer.init, PARAMS)
    with pytest.raises(error, match=message):
        jax.eval_shape(optimizer.update, updates, state, PARAMS)


@EVERY_FORM
def test_parameters_of_another_structure_are_refused(form):
    optimizer = FORMS[form]()
    pairs = gdmam.pair_gradients(PARAMS, PARAMS)
    with pytest.raises(ValueError, match=r"params must have the structure .*unknown: other"):
        optimizer.update(pairs, optimizer.init(PARAMS), PARAMS | {"other": jnp.ones(1)})


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        *(
            ({name: np.float32(0.5)}, rf"{name} must be a function, .*0\.5\)?; .*static_args")
            for name in ("weighting", "gate", "momentum", "scope")
        ),
        ({"gate": "open"}, "gate must be a function, got 'open'$"),
        ({"momentum": 0.9}, r"momentum must be .*; write constant_momentum\(initial=0.9\)$"),
        ({"weighting": optax.adam(0.1)}, r"weighting must be .*write weighed\(optimizer, weight"),
    ],
)
def test_choices_must_be_functions(choices, message):
    with pytest.raises(TypeError, match=message):
        gdmam.scale_by_gdmam(**choices)


@EVERY_FORM
def test_plain_numbers_and_numpy_arrays_are_parameters(form):
    params = {"a": 2.0, "b": np.ones(2)}
    optimizer = FORMS[form]()
    pairs = {"a": gdmam.GradientPair(1.0, 0.5), "b": gdmam.GradientPair(np.ones(2), np.ones(2))}
    # As constants of a program, they reach the optimizer as they are.
    updates = jax.jit(lambda: optimizer.update(pairs, optimizer.init(params), params)[0])()
    assert all_finite(updates)
    assert updates["b"].dtype == jnp.result_type(float)


def test_updates_without_parameters_are_as_wide_as_the_momenta():
    optimizer = gdmam.scale_by_gdmam()
    gradient = jnp.ones(2, jnp.bfloat16)
    pair = gdmam.GradientPair(gradient, gradient)
    update, _ = optimizer.update(pair, optimizer.init(jnp.ones(2, jnp.float32)))
    assert update.dtype == jnp.float32


@EVERY_FORM
def test_integer_parameters_are_refused(form):
    params = {"w": jnp.ones(2), "table": {"index": jnp.arange(3)}}
    with pytest.raises(TypeError, match=r"table/index has dtype int(32|64); expected.*floating"):
        jax.eval_shape(FORMS[form]().init, params)


COMMON = [
    ({"statistics_decay": 1.0}, "statistics_decay"),
    ({"b2": 1.0}, "b2"),
    ({"b2": -0.1}, "b2"),
    ({"eps": 0.0}, "eps"),
]
DECAY = [({"weight_decay": -1e-4}, "weight_decay")]
MOMENTUM = [
    ({"initial": 1.0}, "initial"),
    ({"initial": -0.1}, "initial"),
    ({"minimum": 0.9, "maximum": 0.8}, "minimum.*maximum"),
    ({"maximum": 1.0}, "maximum"),
    ({"minimum": -0.5}, "minimum"),
    ({"sensitivity": -1.0}, "sensitivity"),
    ({"sensitivity": (0.1, float("nan"), 0.1)}, "sensitivity"),
    ({"sensitivity": (0.1, 0.1)}, "a number or three"),
    ({"sensitivity": {"prediction": 0.1}}, "must name prediction, parallel, orthogonal"),
]
RULES = (gdmam.ratcheted_momentum, gdmam.anchored_momentum, gdmam.relative_momentum)
RELEASED = [
    ({"initial_momentum": 1.0}, "initial"),
    ({"minimum_momentum": 0.9, "maximum_momentum": 0.8}, "minimum.*maximum"),
    ({"prediction_sensitivity": -1.0}, "sensitivity"),
    ({"bias_weight_decay": -0.1}, "bias_weight_decay"),
    ({"clip_factor": 0.0}, "factor"),
    ({"clip_window": 0}, "window"),
]
ALLOCATED = [
    ({"amsgrad": True, "b2": None}, "amsgrad"),
    ({"momenta": "three"}, "momenta must be"),
    ({"alignment_losses": 0}, "alignment_losses"),
    ({"alignment_losses": "data"}, "alignment_losses"),
    ({"alignment_losses": ["a", "a"]}, "alignment_losses"),
    ({"mu_dtype": jnp.int32}, "mu_dtype"),
]
OUT_OF_RANGE = [
    *((gdmam.scale_by_gdmam, *case) for case in COMMON + ALLOCATED),
    *((functools.partial(gdmam.gdmam, 0.1), *case) for case in COMMON + DECAY + ALLOCATED),
    *((gdmam.gdmam_released, *case) for case in COMMON + DECAY + RELEASED),
    *((rule, *case) for rule in RULES for case in MOMENTUM),
    (gdmam.constant_momentum, {"initial": 1.0}, "initial"),
    (gdmam.clip_by_recent_norm, {"factor": -1.0}, "factor"),
    (functools.partial(gdmam.summed, optax.sgd(1.0)), {"alignment_weight": -1.0}, "alignment"),
]


@pytest.mark.parametrize(("make", "arguments", "name"), OUT_OF_RANGE)
def test_hyperparameters_out_of_range_are_refused_by_name(make, arguments, name):
    with pytest.raises(ValueError, match=name):
        make(**arguments)


def test_both_ready_made_signatures_have_the_same_defaults():
    """But for the second moment, which `gdmam` has and the link has not, and the weights for it."""
    link, chain = (
        inspect.signature(function).parameters for function in (gdmam.scale_by_gdmam, gdmam.gdmam)
    )
    differing = {name for name in link if repr(link[name].default) != repr(chain[name].default)}
    assert differing == {"weighting", "b2"}
    assert set(chain) - set(link) == {"learning_rate", "weight_decay", "mask"}


NOTHING = gdmam.constant_momentum(initial=0.0)


def test_float16_updates_and_momenta_are_cut_and_not_infinite():
    """Twice the largest number that float16 holds, in the update and in the momentum."""
    optimizer = gdmam.scale_by_gdmam(
        weighting=gdmam.constant_weighting(1, 1), gate=gdmam.open_gate, momentum=NOTHING
    )
    pair = gdmam.GradientPair(jnp.full(2, 6e4, jnp.float16), jnp.full(2, 6e4, jnp.float16))
    update, state = optimizer.update(pair, optimizer.init(jnp.zeros(2, jnp.float16)))
    for found in (update, state.momenta[0]):
        np.testing.assert_array_equal(found, jnp.full(2, jnp.finfo(jnp.float16).max))


OTHER_STATES = {
    "b2": ({"b2": None}, "choice of b2"),
    "amsgrad": ({"amsgrad": True}, "choice of amsgrad"),
    "momenta": ({"momenta": "separate"}, "choice of momenta"),
    "scope": ({"scope": gdmam.leaf_scope}, "another scope"),
    "alignment_losses": ({"alignment_losses": 2}, "alignment_losses"),
}


@pytest.mark.parametrize("case", OTHER_STATES)
@pytest.mark.parametrize("swapped", [False, True])
def test_a_state_made_with_other_choices_is_refused(case, swapped):
    choices, message = OTHER_STATES[case]
    plain = gdmam.scale_by_gdmam(b2=0.99)
    other = gdmam.scale_by_gdmam(**{"b2": 0.99} | choices)
    first, second = (other, plain) if swapped else (plain, other)
    pairs = gdmam.pair_gradients(PARAMS, PARAMS)
    if swapped and case == "alignment_losses":
        pairs = gdmam.pair_gradients(PARAMS, PARAMS)
    elif case == "alignment_losses":
        pairs = gdmam.pair_gradients(PARAMS, (PARAMS, PARAMS))
    with pytest.raises(ValueError, match=message):
        second.update(pairs, first.init(PARAMS), PARAMS)


@EVERY_FORM
def test_strict_promotion_of_ranks_and_dtypes(form, x64):
    optimizer = FORMS[form]()
    params = {"w": jnp.ones((3, 2), jnp.float32), "b": jnp.ones(2, jnp.bfloat16)}
    params["scale"] = jnp.ones(2, jnp.float64)
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        pairs = gdmam.pair_gradients(params, params)
        updates, _ = jax.jit(optimizer.update)(pairs, optimizer.init(params), params)
        jax.eval_shape(gdmam.decompose, pairs)
    assert all_finite(updates)


@pytest.mark.parametrize("choices", OTHER_CHOICES)
def test_strict_promotion_with_scopes_and_several_losses(choices):
    k = int(choices[-1])
    optimizer = gdmam.gdmam(
        0.05,
        weighting=gdmam.unit_weighting if k in (2, 3) else WEIGHTINGS[k],
        gate=GATES[k],
        momentum=MOMENTA[k],
        momenta="separate",
        scope=gdmam.leaf_scope,
        alignment_losses=("a", "b"),
    )
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        pairs = gdmam.pair_gradients(PARAMS, {"a": PARAMS, "b": PARAMS})
        updates, state = jax.jit(optimizer.update)(pairs, optimizer.init(PARAMS), PARAMS)
        jax.eval_shape(functools.partial(gdmam.decompose, scope=gdmam.leaf_scope), pairs)
    assert all_finite(updates)
    assert "dense/kernel/cosine/a" in gdmam.diagnostics(state)


def test_a_wide_second_moment_follows_short_gradients_in_its_own_precision(x64):
    optimizer = gdmam.scale_by_gdmam(
        weighting=gdmam.sum_weighting, gate=gdmam.open_gate, b2=0.999, mu_dtype=jnp.float32
    )
    params, gradient = jnp.ones(2), np.array([0.1, 0.3], np.float32)
    pair = gdmam.GradientPair(gradient, gradient)
    _, state = jax.jit(optimizer.update)(pair, optimizer.init(params))
    expected = (1 - 0.999) * (2 * np.float64(gradient)) ** 2
    np.testing.assert_allclose(state.second_moment, expected, rtol=1e-12)
