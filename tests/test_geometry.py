"""The geometry of a pair of gradients, at every scale and angle and in every dtype."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import gdmam_jax as gdmam
from gdmam_jax import _geometry
from gdmam_jax._geometry import Geometry, gramian
from gdmam_jax._scopes import Scopes
from tests.conftest import skipped_under

DTYPES = ("float64", "float32", "bfloat16", "float16")
# Few tree shapes: each compiles once a dtype.
TREES = (
    {"w": (7,)},
    {"w": (3, 4), "b": ()},
    {"deep": [{"w": (2, 3)}, {"w": (1,)}], "empty": (0,), "b": (5,)},
)
PROPERTY = settings(max_examples=30)

seeds = st.integers(0, 2**32 - 1)
scales = st.floats(-8, 18).map(lambda exponent: 10.0**exponent)


def is_shape(node):
    return isinstance(node, tuple)


def make_tree(shapes, vector, dtype):
    """A tree of the given shapes from one long vector, as far as the dtype reaches."""
    limit = float(jnp.finfo(dtype).max)
    leaves, structure = jax.tree.flatten(shapes, is_leaf=is_shape)
    ends = np.cumsum([int(np.prod(shape)) for shape in leaves])
    parts = np.split(np.clip(vector, -limit, limit), ends[:-1])
    return structure.unflatten(
        [jnp.asarray(part.reshape(shape), dtype) for part, shape in zip(parts, leaves, strict=True)]
    )


def size(shapes):
    return sum(int(np.prod(shape)) for shape in jax.tree.leaves(shapes, is_leaf=is_shape))


def flat(tree):
    """All elements in extended precision, where nothing below rounds or overflows."""
    return np.concatenate(
        [
            np.asarray(leaf, np.float64).astype(np.longdouble).ravel()
            for leaf in jax.tree.leaves(tree)
        ]
    )


def length(vector):
    return np.sqrt(np.sum(vector * vector))


def in_x64(test):
    """Runs a property with float64 switched on (a fixture would hold for all examples at once)."""

    @functools.wraps(test)
    def wrapped(*args, **kwargs):
        with jax.enable_x64(True):
            return test(*args, **kwargs)

    return wrapped


@st.composite
def gradient_trees(draw):
    """Two trees of random direction, scale and mutual angle, down to parallel to 1e-6."""
    shapes, dtype = draw(st.sampled_from(TREES)), draw(st.sampled_from(DTYPES))
    random = np.random.default_rng(draw(seeds))
    prediction, other = random.normal(size=(2, size(shapes)))
    sine = 10.0 ** draw(st.floats(-6, 0))
    sign = draw(st.sampled_from((-1, 1)))
    alignment = draw(scales) * (sign * np.sqrt(1 - sine**2) * prediction + sine * other)
    prediction = draw(scales) * prediction
    with jax.enable_x64(True):
        return make_tree(shapes, prediction, dtype), make_tree(shapes, alignment, dtype)


@PROPERTY
@given(gradient_trees())
@in_x64
def test_parts_add_up_to_the_alignment_gradient_and_are_orthogonal(trees):
    check_parts(*trees)


def shortest(dtype):
    """The shortest gradient whose square is a normal number, of the dtype of its inner products."""
    wide = jnp.float64 if jnp.dtype(dtype) == jnp.float64 else jnp.float32
    return float(jnp.finfo(wide).tiny) ** 0.5


def check_parts(prediction, alignment):
    parts = gdmam.decompose(gdmam.pair_gradients(prediction, alignment))
    g_p, g_a, parallel, orthogonal = map(
        flat, (prediction, alignment, parts.parallel, parts.orthogonal)
    )
    dtype = jax.tree.leaves(prediction)[0].dtype
    stored = float(jnp.finfo(dtype).eps)
    rounding = max(stored, float(jnp.finfo(dtype).tiny))
    limit = float(jnp.finfo(dtype).max)
    assert np.all(np.isfinite(np.concatenate([parallel, orthogonal]).astype(float)))
    if max(np.max(np.abs(parallel)), np.max(np.abs(orthogonal))) == limit:
        return  # cut at the largest number: finite, no more
    smallest = float(jnp.finfo(dtype).smallest_subnormal)
    np.testing.assert_array_less(
        np.abs(parallel + orthogonal - g_a),
        2 * rounding * (np.abs(g_a) + np.abs(parallel)) + 2 * smallest,
    )
    n_p, n_a = length(g_p), length(g_a)
    if n_p < 1e3 * shortest(dtype):
        return  # its square is no normal number
    across = np.abs(np.sum(orthogonal * g_p))
    assert across <= 16 * stored * n_a * n_p + len(g_p) * smallest * n_p


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sine", [1e-6, -1e-6, 1e-3, 0.0])
def test_orthogonal_also_when_nearly_parallel(dtype, sine, x64):
    random = np.random.default_rng(0)
    prediction, other = random.normal(size=(2, 1000))
    pairs = [
        make_tree({"w": (1000,)}, v, dtype) for v in (prediction, 3 * prediction + sine * other)
    ]
    check_parts(*pairs)


@pytest.mark.parametrize("angle", [1e-3, 3e-3, 0.03, 0.0999, 0.1003, 0.3, np.pi - 1e-3])
@pytest.mark.parametrize("count", [8, 1000, 1_000_000])
def test_the_orthogonal_norm_is_accurate_at_small_angles_in_float32(angle, count):
    random = np.random.default_rng(1)
    prediction = random.normal(size=count) + 1
    across = random.normal(size=count)
    across -= (across @ prediction) / (prediction @ prediction) * prediction
    alignment = np.cos(angle) * prediction / np.linalg.norm(prediction)
    alignment += np.sin(angle) * across / np.linalg.norm(across)
    pair = gdmam.GradientPair(jnp.float32(prediction), jnp.float32(alignment))
    found = gdmam.decompose(pair).geometry.orthogonal_norm
    g_p, g_a = np.float64(pair.prediction), np.float64(pair.alignment)
    expected = np.linalg.norm(g_a - (g_a @ g_p) / (g_p @ g_p) * g_p)
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    np.testing.assert_allclose(expected, np.sin(angle), rtol=1e-2)


@PROPERTY
@given(gradient_trees())
@in_x64
def test_scalars_are_those_of_extended_precision(trees):
    prediction, alignment = trees
    geometry = gdmam.decompose(gdmam.pair_gradients(prediction, alignment)).geometry
    rounding = 32 * float(jnp.finfo(geometry.cosine.dtype).eps)
    g_p, g_a = flat(prediction), flat(alignment)
    n_p, n_a = length(g_p), length(g_a)
    least = 1e3 * shortest(geometry.cosine.dtype)
    norms = [float(geometry.prediction_norm), float(geometry.alignment_norm)]
    np.testing.assert_allclose(norms, [float(n_p), float(n_a)], rtol=rounding, atol=least)
    if min(n_p, n_a) < least:
        return  # squares that are no normal numbers
    cosine = np.sum(g_p * g_a) / (n_p * n_a)
    np.testing.assert_allclose(float(geometry.cosine), float(cosine), rtol=0, atol=rounding)
    across = length(g_a - np.sum(g_p * g_a) / np.sum(g_p * g_p) * g_p) if np.any(g_p) else n_a
    np.testing.assert_allclose(
        float(geometry.orthogonal_norm),
        float(across),
        rtol=1e-3,
        atol=float(n_a) * rounding,
    )


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_inner_products_of_short_floats_accumulate_in_float32(dtype):
    """Ones summed in bfloat16 stop at 256, in float16 at 2048; their squares overflow at 256."""
    for value in (1.0, 300.0):
        ones = jnp.full(5000, value, dtype)
        geometry = gdmam.decompose(gdmam.GradientPair(ones, ones)).geometry
        assert geometry.prediction_norm.dtype == jnp.float32
        expected = float(ones[0]) * np.sqrt(5000)
        np.testing.assert_allclose(geometry.prediction_norm, expected, rtol=1e-6)
        np.testing.assert_allclose(geometry.parallel_norm, expected, rtol=1e-6)


@pytest.mark.parametrize("split", [[24], [1, 23], [8, 8, 8], [5, 0, 7, 12], [1] * 24])
def test_nothing_depends_on_how_parameters_are_split_into_leaves(split, x64):
    random = np.random.default_rng(3)
    g_p, g_a = random.normal(size=(2, 24))

    def leaves(vector):
        return [jnp.asarray(part) for part in np.split(vector, np.cumsum(split)[:-1])]

    whole = gdmam.decompose(gdmam.GradientPair(jnp.asarray(g_p), jnp.asarray(g_a)))
    parts = gdmam.decompose(gdmam.pair_gradients(leaves(g_p), leaves(g_a)))
    for expected, found in zip(
        jax.tree.leaves(whole.geometry), jax.tree.leaves(parts.geometry), strict=True
    ):
        np.testing.assert_allclose(found, expected, rtol=1e-14)
    np.testing.assert_allclose(np.concatenate(parts.orthogonal), whole.orthogonal, atol=1e-14)


@PROPERTY
@given(seeds, st.floats(-6, 6), st.sampled_from(["float32", "float64"]))
@in_x64
def test_scaling_both_losses_scales_norms_and_leaves_the_rest(seed, exponent, dtype):
    random = np.random.default_rng(seed)
    g_p, g_a = random.normal(size=(2, 7))
    before, after = (
        gdmam.decompose(
            gdmam.GradientPair(jnp.asarray(s * g_p, dtype), jnp.asarray(s * g_a, dtype))
        ).geometry
        for s in (1.0, 10.0**exponent)
    )
    rounding = 32 * float(jnp.finfo(dtype).eps)
    for name in ("prediction", "alignment", "parallel", "orthogonal"):
        ratio = getattr(after, f"{name}_norm") / getattr(before, f"{name}_norm")
        cancelled = float(before.alignment_norm / getattr(before, f"{name}_norm"))
        np.testing.assert_allclose(ratio, 10.0**exponent, rtol=rounding * (1 + cancelled) ** 2)
    np.testing.assert_allclose(after.cosine, before.cosine, atol=rounding)


SCALES = [0.0, 1e-30, 1e-8, 1e18]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("scale_p", SCALES)
@pytest.mark.parametrize("scale_a", SCALES)
def test_finite_at_every_scale_whose_squares_the_dtype_holds(dtype, scale_p, scale_a):
    g_p, g_a = jnp.array([1.0, -0.5, 0.25, 0.1]), jnp.array([0.3, 1.0, -0.2, 0.7])
    pair = gdmam.GradientPair((scale_p * g_p).astype(dtype), (scale_a * g_a).astype(dtype))
    parts = gdmam.decompose(pair)
    assert all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves(parts))
    for name in ("prediction", "alignment"):
        found = float(getattr(parts.geometry, f"{name}_norm"))
        expected = np.linalg.norm(np.float64(getattr(pair, name).astype(jnp.float32)))
        # Of 1e-30 the square is 0 in float32.
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=shortest("float32"))


@skipped_under("jax_debug_nans", "forbids what is not a number")
@pytest.mark.parametrize("value", [1e30, np.inf, np.nan])
def test_norms_of_gradients_too_long_to_square_are_not_finite(value):
    """As in Optax: what to do with such a step is not the geometry's business."""
    ones = jnp.ones(3, jnp.float32)
    pair = gdmam.GradientPair(ones, ones.at[1].set(value))
    geometry = gdmam.decompose(pair).geometry
    np.testing.assert_allclose(geometry.prediction_norm, np.sqrt(3), rtol=1e-6)
    assert not np.isfinite(geometry.alignment_norm)
    assert np.isnan(geometry.alignment_norm) == np.isnan(value)
    assert not np.isfinite(geometry.orthogonal_norm)


def test_float16_is_cut_at_its_largest_number():
    """The projection on one long element can exceed every element of the alignment gradient."""
    g_p = jnp.ones(200, jnp.float16).at[0].set(10)
    parts = gdmam.decompose(gdmam.GradientPair(g_p, jnp.full(200, 6e4, jnp.float16)))
    assert float(parts.parallel[0]) == float(jnp.finfo(jnp.float16).max)
    assert float(parts.orthogonal[0]) == float(jnp.finfo(jnp.float16).min)


@pytest.mark.parametrize("zero", ["prediction", "alignment", "both"])
def test_a_zero_gradient_projects_to_nothing(zero):
    g_p = jnp.zeros(3) if zero != "alignment" else jnp.ones(3)
    g_a = jnp.zeros(3) if zero != "prediction" else jnp.ones(3)
    parts = gdmam.decompose(gdmam.GradientPair(g_p, g_a))
    np.testing.assert_array_equal(parts.parallel, jnp.zeros(3))
    np.testing.assert_array_equal(parts.orthogonal, g_a)
    assert float(parts.geometry.cosine) == 0
    assert float(parts.geometry.parallel_norm) == 0


def test_each_scope_has_a_geometry_of_its_own():
    random = np.random.default_rng(5)
    trees = [
        {name: {"w": jnp.float32(random.normal(size=4))} for name in ("encoder", "head")}
        for _ in range(2)
    ]
    pairs = gdmam.pair_gradients(*trees)
    scoped = gdmam.decompose(pairs, scope=lambda path: path.split("/")[0])
    for number, name in enumerate(("encoder", "head")):
        alone = gdmam.decompose(pairs[name])
        np.testing.assert_allclose(scoped.parallel[name]["w"], alone.parallel["w"], rtol=1e-6)
        np.testing.assert_allclose(scoped.geometry.cosine[number], alone.geometry.cosine, rtol=1e-6)


def test_a_nearly_parallel_scope_beside_an_ordinary_one_keeps_its_accuracy():
    g_p = {"near": jnp.array([3.0, 4.0]), "far": jnp.array([1.0, 0.0])}
    across = {"near": 1e-3 * jnp.array([-0.8, 0.6]), "far": jnp.array([0.0, 2.0])}
    pairs = gdmam.pair_gradients(g_p, jax.tree.map(lambda g, a: 2 * g + a, g_p, across))
    geometry = gdmam.decompose(pairs, scope=gdmam.leaf_scope).geometry
    np.testing.assert_allclose(geometry.orthogonal_norm, [2, 1e-3], rtol=1e-3)
    np.testing.assert_allclose(geometry.parallel_norm, [2, 10], rtol=1e-6)
    np.testing.assert_allclose(geometry.projection, [2, 2], rtol=1e-6)
    np.testing.assert_allclose(geometry.cosine, [np.sqrt(0.5), 1], rtol=1e-6)


def test_the_gramians_own_orthogonal_norm_is_good_enough_for_statistics():
    """3e-4 of the alignment norm in float32, at every angle."""
    random = np.random.default_rng(7)
    for angle in (1e-6, 1e-3, 0.1, 1.0, np.pi - 1e-4):
        g_p, other = random.normal(size=(2, 1000))
        other -= other @ g_p / (g_p @ g_p) * g_p
        g_a = np.cos(angle) * g_p / np.linalg.norm(g_p)
        g_a += np.sin(angle) * other / np.linalg.norm(other)
        pair = gdmam.GradientPair(jnp.float32(g_p), jnp.float32(g_a))
        found = Geometry.of(gramian([pair], Scopes())).orthogonal_norm
        np.testing.assert_allclose(found, [np.sin(angle)], atol=1e-3)


def test_vmap_gives_what_each_pair_gives_alone():
    """Also where one pair of a batch is nearly parallel, one long and one zero."""
    random = np.random.default_rng(6)
    g_p = np.float32(random.normal(size=(4, 9)))
    g_a = np.float32(random.normal(size=(4, 9)))
    g_a[1] = 2 * g_p[1] + 1e-4 * g_a[1]
    g_a[2] *= 1e15
    g_p[3] = 0
    batch = jax.vmap(gdmam.decompose)(gdmam.GradientPair(jnp.asarray(g_p), jnp.asarray(g_a)))
    for row in range(4):
        alone = gdmam.decompose(gdmam.GradientPair(jnp.asarray(g_p[row]), jnp.asarray(g_a[row])))
        for part in ("parallel", "orthogonal"):
            found, expected = getattr(batch, part)[row], getattr(alone, part)
            tolerance = 1e-6 * np.max(np.abs(g_a[row]))
            np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance)
        for expected, found in zip(
            jax.tree.leaves(alone.geometry), jax.tree.leaves(batch.geometry), strict=True
        ):
            np.testing.assert_allclose(found[row], expected, rtol=1e-3, atol=1e-6)


def test_several_alignment_losses_are_decomposed_one_by_one(x64):
    random = np.random.default_rng(8)
    g_p, first, second = (jnp.asarray(random.normal(size=6)) for _ in range(3))
    tree = {"w": g_p[:4], "b": g_p[4:]}
    others = {name: {"w": g[:4], "b": g[4:]} for name, g in (("first", first), ("second", second))}
    together = gdmam.decompose(gdmam.pair_gradients(tree, others))
    for number, name in enumerate(("first", "second")):
        alone = gdmam.decompose(gdmam.pair_gradients(tree, others[name]))
        np.testing.assert_allclose(together.parallel["w"][name], alone.parallel["w"], rtol=1e-14)
        np.testing.assert_allclose(
            together.orthogonal["b"][name], alone.orthogonal["b"], rtol=1e-13
        )
        for scalar in ("alignment_norm", "cosine", "projection", "orthogonal_norm"):
            found = getattr(together.geometry, scalar)[number]
            np.testing.assert_allclose(found, getattr(alone.geometry, scalar), rtol=1e-14)
    named = gdmam.decompose(gdmam.pair_gradients(tree, {"first": others["first"]}))
    np.testing.assert_array_equal(
        named.parallel["w"]["first"],
        gdmam.decompose(gdmam.pair_gradients(tree, others["first"])).parallel["w"],
    )


def test_axis_names_may_be_a_list_and_a_leaf_whole_on_the_axis_counts_once():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    pairs = {
        "w": gdmam.GradientPair(jnp.arange(8.0), jnp.ones(8)),
        "b": gdmam.GradientPair(jnp.array([20.0, -1.0]), jnp.array([1.0, 3.0])),
    }
    specs = {"w": jax.sharding.PartitionSpec("data"), "b": jax.sharding.PartitionSpec()}
    found = jax.shard_map(
        lambda pairs: gdmam.decompose(pairs, axis_name=["data"]).parallel,
        mesh=mesh,
        in_specs=(specs,),
        out_specs=specs,
    )(pairs)
    for name, expected in gdmam.decompose(pairs).parallel.items():
        np.testing.assert_allclose(found[name], expected, rtol=1e-6)


def test_scopes_are_equal_by_labels_and_leaves_and_those_without_leaves_to_any():
    scopes = Scopes(("a", "b"), (0, 1))
    assert scopes == Scopes(("a", "b"), (0, 1))
    assert scopes == Scopes()
    assert scopes != Scopes(("a", "b"), (1, 0))
    assert scopes != Scopes(("a", "c"), (0, 1))
    assert scopes != ("a", "b")


@pytest.mark.parametrize("count", [2, 4])
def test_large_gradients_have_the_inner_products_of_small_ones(count, x64):
    rng = np.random.default_rng(count)
    size = _geometry.LARGE // (1 if count == 2 else 8)
    gradients = rng.normal(1, 1, (count, 3, size // 3 + 7)).astype(np.float32)

    def inner_products(*gradients):
        first, *others = gradients
        return gramian([gdmam.GradientPair(first, tuple(others))], Scopes())

    rows = gradients.reshape(count, -1).astype(np.float64)
    exact = rows @ rows.T
    np.testing.assert_allclose(jax.jit(inner_products)(*gradients), exact, rtol=1e-6)
    moved = jax.jit(jax.vmap(inner_products))(*np.stack([gradients, 2 * gradients], axis=1))
    np.testing.assert_allclose(moved, [exact, 4 * exact], rtol=1e-6)
    square = jax.grad(lambda *each: inner_products(*each)[-1, -1], argnums=(0, count - 1))
    slopes = jax.jit(square)(*gradients)
    np.testing.assert_allclose(slopes[0], np.zeros_like(gradients[0]), atol=0)
    np.testing.assert_allclose(slopes[1], 2 * gradients[-1], rtol=1e-6)
    mixed = jax.jit(jax.grad(lambda *each: inner_products(*each)[0, 1]))(*gradients)
    np.testing.assert_allclose(mixed, gradients[1], rtol=1e-6)

    def loops(function):
        program = jax.jit(function).lower(*gradients).compile().as_text()
        large = rf"reduce\w*[\d.]* = \(f32\[{gradients[0].size // _geometry.BLOCK}\]"
        return len(re.findall(large, program[program.index("\nENTRY ") :]))

    # One loop reads all of them, a second one what only some weightings ask for.
    assert loops(inner_products) == (1 if count == 2 else 2)
    assert loops(lambda *each: Geometry.of(inner_products(*each))) == 1
