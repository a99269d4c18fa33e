"""One trajectory, whatever the parameters' sharding, and nothing but scalars sent for it."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import gdmam_jax as gdmam

OPTIMIZERS = {
    "gdmam": lambda: gdmam.gdmam(1e-2),
    "released": lambda: gdmam.gdmam_released(1e-2),
    "allocate": lambda: optax.chain(gdmam.allocate(), optax.adamw(1e-2)),
}
SHAPES = {"embed": (16, 32), "up": (32, 64), "bias": (64,), "down": (64, 8)}
# Mesh shape over (data, model), and how each parameter lies on it.
LAYOUTS = {
    "data parallel": ((8, 1), {}),
    "fully sharded": ((8, 1), dict.fromkeys(SHAPES, P("data"))),
    "tensor parallel": (
        (1, 8),
        {"up": P(None, "model"), "bias": P("model"), "down": P("model", None)},
    ),
    "mixed": (
        (4, 2),
        {
            "embed": P("data"),
            "up": P("data", "model"),
            "bias": P("model"),
            "down": P("model", "data"),
        },
    ),
}


def mesh_of(shape, axis_type=AxisType.Auto):
    return jax.make_mesh(shape, ("data", "model"), axis_types=(axis_type,) * 2)


@functools.cache
def drawn():
    """Parameters and a batch, on the host, from where they are laid out without a program."""
    shapes = {**SHAPES, "batch": (32, 16)}
    ends = np.cumsum([math.prod(shape) for shape in shapes.values()])
    draw = jax.jit(lambda: jax.random.normal(jax.random.key(0), (ends[-1],), jnp.float32))
    pieces = np.split(np.asarray(draw()), ends[:-1])
    return {name: x.reshape(shapes[name]) for name, x in zip(shapes, pieces, strict=True)}


def parameters(dtype=jnp.float32):
    return {name: drawn()[name].astype(dtype) / 4 for name in SHAPES}


def batch(dtype=jnp.float32):
    return drawn()["batch"].astype(dtype)


def losses(params, x):
    hidden = jnp.tanh(x @ params["embed"] @ params["up"] + params["bias"])
    out = hidden @ params["down"]
    return jnp.mean((out - x[:, :8]) ** 2), jnp.mean(jnp.cos(3 * out)) + jnp.mean(hidden**2)


def make_step(optimizer, loss=losses):
    def step(params, state, x):
        _, pairs = gdmam.value_and_paired_grad(loss)(params, x)
        updates, state = optimizer.update(pairs, state, params)
        return optax.apply_updates(params, updates), state

    return step


def place(tree, mesh, specs):
    return {
        name: jax.device_put(leaf, NamedSharding(mesh, specs.get(name, P())))
        for name, leaf in tree.items()
    }


def train(optimizer, params, x, loss=losses, steps=4):
    state = jax.jit(optimizer.init)(params)
    step = jax.jit(make_step(optimizer, loss))
    for _ in range(steps):
        params, state = step(params, state, x)
    return params, state


def assert_same(found, expected, tolerance):
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(expected), strict=True
    ):
        np.testing.assert_allclose(
            a, b, rtol=tolerance, atol=tolerance, err_msg=jax.tree_util.keystr(path)
        )


@pytest.fixture(scope="module")
def single():
    """The trajectory on one device, by optimizer and dtype."""
    cache = {}

    def of(name, dtype):
        if (name, dtype) not in cache:
            cache[name, dtype] = train(OPTIMIZERS[name](), parameters(dtype), batch(dtype))
        return cache[name, dtype]

    return of


@pytest.mark.parametrize(
    ("name", "layout"), [*(("gdmam", layout) for layout in LAYOUTS), ("released", "mixed")]
)
def test_every_layout_gives_the_trajectory_of_one_device(x64, single, name, layout):
    shape, specs = LAYOUTS[layout]
    mesh = mesh_of(shape)
    params = place(parameters(jnp.float64), mesh, specs)
    x = jax.device_put(batch(jnp.float64), NamedSharding(mesh, P("data")))
    found = train(OPTIMIZERS[name](), params, x)
    assert_same(found, single(name, jnp.float64), tolerance=1e-12)


def test_float32_stays_within_rounding_of_one_device(single):
    shape, specs = LAYOUTS["mixed"]
    mesh = mesh_of(shape)
    x = jax.device_put(batch(), NamedSharding(mesh, P("data")))
    found, _ = train(OPTIMIZERS["gdmam"](), place(parameters(), mesh, specs), x)
    # Four steps of 1e-2 each, divided by the root of a second moment: rounding of the gradients
    # (a few 1e-7) enters the parameters scaled by the step.
    assert_same(found, single("gdmam", jnp.float32)[0], tolerance=3e-6)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("name", ["gdmam", "released"])  # Of Optax's own states it says nothing.
def test_the_state_is_sharded_like_the_parameters(name, compiled, axis_type):
    shape, specs = LAYOUTS["mixed"]
    mesh = mesh_of(shape, axis_type)
    with jax.set_mesh(mesh):
        params = place(parameters(), mesh, specs)
        optimizer = OPTIMIZERS[name]()
        init = jax.jit(optimizer.init) if compiled else optimizer.init
        seen = optax.tree.map_params(
            optimizer,
            lambda leaf, param: leaf.sharding.is_equivalent_to(param.sharding, leaf.ndim),
            init(params),
            params,
            transform_non_params=lambda leaf: leaf.sharding.is_fully_replicated,
        )
    unlike = [
        jax.tree_util.keystr(path)
        for path, alike in jax.tree_util.tree_leaves_with_path(seen)
        if not alike
    ]
    assert not unlike


def collectives(program):
    """``(computation, kind, shapes)`` of every collective in a compiled program's text."""
    found, computation = [], ""
    for line in program.splitlines():
        if header := re.match(r"(ENTRY )?%?([\w.-]+) .*\{$", line):
            computation = "main" if header[1] else header[2]
        kinds = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"
        if call := re.search(rf"= (.*?) ({kinds})(-start)?\(", line):
            found.append((computation, call[2], re.findall(r"\w+\[[\d,]*\]", call[1])))
    return found


def compiled_update(optimizer, layout, axis_type=AxisType.Auto):
    shape, specs = LAYOUTS[layout]
    mesh = mesh_of(shape, axis_type)
    params = place(parameters(), mesh, specs)
    pairs = jax.tree.map(gdmam.GradientPair, params, params)
    with jax.set_mesh(mesh):
        update = jax.jit(optimizer.update)
        return update.lower(pairs, jax.jit(optimizer.init)(params), params).compile().as_text()


# The released form's clipping needs no sum of its own. Where types do not tell shardings, XLA
# merges the sums over the same groups of devices: "mixed" has parameters sharded over data, over
# model, and over both.
@pytest.mark.parametrize(
    ("name", "layout", "axis_type", "expected"),
    [
        ("gdmam", "data parallel", AxisType.Auto, 0),
        ("gdmam", "fully sharded", AxisType.Auto, 1),
        ("gdmam", "mixed", AxisType.Auto, 3),
        ("released", "fully sharded", AxisType.Auto, 1),
        ("gdmam", "mixed", AxisType.Explicit, 1),
    ],
)
def test_the_update_sends_nothing_but_sums(name, layout, axis_type, expected):
    found = collectives(compiled_update(OPTIMIZERS[name](), layout, axis_type))
    assert {kind for _, kind, _ in found} <= {"all-reduce"}
    assert {shape for _, _, shapes in found for shape in shapes} <= {"f32[]", "f32[1]", "f32[3]"}
    usual = [shapes for computation, _, shapes in found if computation == "main"]
    print(f"{name}, {layout}, {axis_type}:", *[", ".join(shapes) for shapes in usual], sep="\n  ")
    assert len(usual) == expected
    if axis_type == AxisType.Explicit:
        assert usual == [["f32[3]"]]


def test_a_step_moves_no_more_arrays_than_the_summed_loss():
    shape, specs = LAYOUTS["fully sharded"]
    mesh = mesh_of(shape)
    params = place(parameters(), mesh, specs)
    x = jax.device_put(batch(), NamedSharding(mesh, P("data")))

    def arrays_moved(optimizer):
        step = jax.jit(make_step(optimizer))
        program = step.lower(params, jax.jit(optimizer.init)(params), x).compile().as_text()
        return sorted(
            (kind, shape)
            for _, kind, shapes in collectives(program)
            for shape in shapes
            if shape != "f32[]"
        )

    assert arrays_moved(OPTIMIZERS["gdmam"]()) == arrays_moved(gdmam.summed(optax.adamw(1e-2)))


def test_explicit_sharding_types_give_the_trajectory_of_one_device(x64, single):
    mesh = mesh_of((4, 2), AxisType.Explicit)
    specs = LAYOUTS["tensor parallel"][1]

    def explicit_losses(params, x):
        hidden = jnp.tanh(x @ params["embed"] @ params["up"] + params["bias"])
        out = jnp.dot(hidden, params["down"], out_sharding=P("data", None))
        return jnp.mean((out - x[:, :8]) ** 2), jnp.mean(jnp.cos(3 * out)) + jnp.mean(hidden**2)

    with jax.set_mesh(mesh):
        params = place(parameters(jnp.float64), mesh, specs)
        x = jax.device_put(batch(jnp.float64), NamedSharding(mesh, P("data", None)))
        found = train(OPTIMIZERS["gdmam"](), params, x, loss=explicit_losses)
    assert_same(found, single("gdmam", jnp.float64), tolerance=1e-12)


# Leaves that are whole on an axis, as biases are in tensor parallelism, count once there.
@pytest.mark.parametrize("form", [gdmam.gdmam, gdmam.gdmam_released])
def test_inside_shard_map_the_axis_names_sum_the_inner_products(x64, form):
    mesh = mesh_of((4, 2))
    specs = {"embed": P("data", "model"), "up": P("model"), "bias": P(), "down": P("data")}
    params = parameters(jnp.float64)
    prediction = jax.tree.map(np.sin, params)
    alone = form(1e-2)
    state, update_alone = jax.jit(alone.init)(params), jax.jit(alone.update)
    inside = form(1e-2, axis_name=("data", "model"))
    state_specs = optax.tree.map_params(
        inside, lambda _, spec: spec, state, specs, transform_non_params=lambda _: P()
    )
    pair_specs = {name: gdmam.GradientPair(spec, spec) for name, spec in specs.items()}
    update = jax.jit(
        jax.shard_map(
            inside.update,
            mesh=mesh,
            in_specs=(pair_specs, state_specs, specs),
            out_specs=(specs, state_specs),
        )
    )
    for noise in (1.0, 1e-3):  # also nearly parallel
        alignment = jax.tree.map(lambda g, noise=noise: noise * g**2 - 0.3 * g, prediction)
        pairs = gdmam.pair_gradients(prediction, alignment)
        expected = update_alone(pairs, state, params)
        # What is left of nearly parallel gradients has the rounding of what was taken off.
        tolerance = max(1e-12, 1e-15 / noise**2)
        assert_same(update(pairs, state, params), expected, tolerance)
    program = update.lower(pairs, state, params).compile().as_text()
    usual = [found[1:] for found in collectives(program) if found[0] == "main"]
    assert usual == [("all-reduce", ["f64[3]"])]


def test_shard_map_catches_a_forgotten_axis_name():
    def update(gradient):
        return gdmam.decompose(gdmam.GradientPair(gradient, gradient)).geometry.cosine

    mapped = jax.shard_map(update, mesh=mesh_of((8, 1)), in_specs=P("data"), out_specs=P())
    with pytest.raises(ValueError, match="varying"):
        jax.eval_shape(mapped, np.ones(8))
