"""Equations, their losses, points and references."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.integrate import solve_ivp
from scipy.interpolate import CubicSpline

from benchmarks.physics import equations
from benchmarks.physics.equations import EQUATIONS, derivatives, differentiable

GRIDS = {
    "allen-cahn": equations.allen_cahn_grid,
    "korteweg-de-vries": equations.korteweg_de_vries_grid,
    "kuramoto-sivashinsky": equations.kuramoto_sivashinsky_grid,
}
EXACT = [name for name in EQUATIONS if name not in ("burgers", "schroedinger", *GRIDS)]


def sample(equation):
    return jax.device_get(jax.jit(lambda key: equation.sample(key, 200, 100))(jax.random.key(0)))


@pytest.mark.parametrize("name", EXACT)
def test_the_exact_solution_has_no_loss_and_a_wrong_one_has(name, x64):
    equation = EQUATIONS[name]

    def exact(points):
        return equation.values(points, jnp)

    def inexact(points):
        return exact(points) + 0.1 * jnp.cos(2.5 * points[:, :1] + 1)

    @jax.jit
    def found(key):
        points = equation.sample(key, 200, 100)
        losses = [equation.losses(differentiable(each), points) for each in (exact, inexact)]
        return losses, points["residual"], exact(points["residual"])

    (right, wrong), inside, values = jax.device_get(found(jax.random.key(0)))
    assert set(right) == {"residual", "boundary"} | ({"initial"} if equation.timed else set())
    for part, loss in right.items():
        assert float(loss) < 1e-18, part
    assert all(float(loss) > 1e-5 for loss in wrong.values())
    np.testing.assert_allclose(values, equation.solution(inside), atol=1e-12)


def test_the_quadrature_of_burgers_equation_converges():
    points, _ = EQUATIONS["burgers"].reference
    coarse, fine = (equations.burgers_solution(points, nodes) for nodes in (100, 200))
    assert np.max(np.abs(coarse - fine)) < 1e-3
    finer = equations.burgers_solution(points, 300)
    assert np.max(np.abs(fine - finer)) < np.max(np.abs(coarse - finer)) + 1e-12
    at_first = np.stack([np.linspace(-1, 1, 50), np.zeros(50)], axis=1)
    np.testing.assert_allclose(
        equations.burgers_solution(at_first)[:, 0], -np.sin(np.pi * at_first[:, 0]), atol=1e-12
    )


def test_the_reference_of_burgers_equation_satisfies_it():
    """By central differences, away from the shock."""
    random = np.random.default_rng(0)
    points = random.uniform([0.1, 0.05], [0.9, 0.95], (200, 2))
    h = 1e-4

    def at(dx, dt):
        return equations.burgers_solution(points + h * np.array([dx, dt]), 300)

    here, left, right = at(0, 0), at(-1, 0), at(1, 0)
    slope, speed = (right - left) / (2 * h), (at(0, 1) - at(0, -1)) / (2 * h)
    curvature = (right - 2 * here + left) / h**2
    residual = speed + here * slope - equations.VISCOSITY * curvature
    assert np.max(np.abs(residual)) < 1e-4


def test_the_reference_of_schroedingers_equation_converges_and_keeps_what_it_must():
    grids = {steps: equations.schroedinger_grid(128, steps)[2][-1] for steps in (1000, 2000, 4000)}
    errors = [np.max(np.abs(grids[steps] - grids[4000])) for steps in (1000, 2000)]
    assert errors[1] < errors[0] / 3  # second order: a quarter, but for the reference's own
    assert errors[1] < 1e-3
    _, _, rows = equations.schroedinger_grid()
    mass = np.sum(np.abs(rows) ** 2, axis=1)
    np.testing.assert_allclose(mass, mass[0], rtol=1e-10)


def test_the_reference_of_schroedingers_equation_is_that_of_another_integrator():
    """An adaptive Runge-Kutta method of order eight, on the same Fourier modes."""
    x, moments, rows = equations.schroedinger_grid(128, 4000)
    square = (2 * np.pi * np.fft.fftfreq(128, d=10 / 128)) ** 2

    def slope(_, h):
        return -0.5j * np.fft.ifft(square * np.fft.fft(h)) + 1j * np.abs(h) ** 2 * h

    found = solve_ivp(
        slope, (0, np.pi / 2), 2 / np.cosh(x) + 0j, method="DOP853", rtol=1e-8, atol=1e-8
    ).y[:, -1]
    assert np.max(np.abs(found - rows[-1])) < 1e-3
    np.testing.assert_allclose(moments[-1], np.pi / 2)


def test_between_the_grid_the_reference_of_schroedingers_equation_is_smooth():
    equation = EQUATIONS["schroedinger"]
    x, moments, rows = equations.schroedinger_grid()
    on_grid = np.stack(np.meshgrid(x[::16], moments[::100]), axis=-1).reshape(-1, 2)
    found = equation.solution(on_grid) @ [1, 1j]
    np.testing.assert_allclose(found, rows[::100, ::16].ravel(), atol=1e-10)
    at_first = np.stack([np.linspace(-5, 5, 40, endpoint=False), np.zeros(40)], axis=1)
    np.testing.assert_allclose(
        equation.solution(at_first), equation.values(at_first, np), atol=1e-3
    )


def test_the_reference_of_the_allen_cahn_equation_converges():
    grids = {
        (points, steps): equations.allen_cahn_grid(points, steps)[2][-1].real
        for points, steps in ((512, 250), (512, 500), (512, 2000), (1024, 2000))
    }
    finest = grids[512, 2000]
    errors = [np.max(np.abs(grids[512, steps] - finest)) for steps in (250, 500)]
    assert errors[1] < errors[0] / 3  # second order
    assert errors[1] < 1e-4
    assert np.max(np.abs(finest - grids[1024, 2000][::2])) < 1e-3


def test_the_reference_of_the_allen_cahn_equation_is_that_of_another_integrator():
    """Finite differences and an adaptive Runge-Kutta method, on the same positions."""
    x, moments, rows = equations.allen_cahn_grid(512, 500)
    spacing = x[1] - x[0]

    def slope(_, u):
        curvature = (np.roll(u, -1) - 2 * u + np.roll(u, 1)) / spacing**2
        return equations.DIFFUSION * curvature + 5 * (u - u**3)

    found = solve_ivp(slope, (0, 1), x**2 * np.cos(np.pi * x), rtol=1e-6, atol=1e-8).y[:, -1]
    assert np.max(np.abs(found - rows[-1])) < 5e-3
    np.testing.assert_allclose(moments[-1], 1)
    points = np.stack([x[::16], np.ones(32)], axis=1)
    np.testing.assert_allclose(
        EQUATIONS["allen-cahn"].solution(points)[:, 0], rows[-1][::16].real, atol=1e-4
    )


@pytest.mark.parametrize("name", GRIDS)
def test_the_references_on_grids_satisfy_the_residual_and_a_wrong_one_does_not(name, x64):
    """Derivatives in space by the FFT, by time of a spline through all moments."""
    equation = EQUATIONS[name]
    x, moments, rows = GRIDS[name]()
    waves = 2j * np.pi * np.fft.fftfreq(len(x), d=x[1] - x[0])
    inside = slice(10, -10, 20)
    values = rows.real[inside]
    speed = CubicSpline(moments, rows.real)(moments[inside], 1)
    by_x = [np.fft.ifft(waves**k * np.fft.fft(values)).real for k in range(equation.orders[0] + 1)]

    def size(by_time):
        along = [[each.reshape(-1, 1) for each in terms] for terms in (by_x, [values, by_time])]
        residual = equation.residual(along, np.zeros((values.size, 2)))
        return np.linalg.norm(residual) / np.linalg.norm(speed)

    assert size(speed) < 1e-2
    assert size(1.1 * speed) > 0.09


@pytest.mark.parametrize(
    ("name", "points", "end"),
    [("korteweg-de-vries", 128, 0.3), ("kuramoto-sivashinsky", 128, 0.2)],
)
def test_the_waves_references_are_those_of_another_integrator(name, points, end):
    """An adaptive Runge-Kutta method of order eight, on fewer Fourier modes."""
    x, _, rows = GRIDS[name]()
    coarse, start = x[:: len(x) // points], rows[0, :: len(x) // points]
    waves = 2 * np.pi * np.fft.fftfreq(points, d=coarse[1] - coarse[0])
    if name == "korteweg-de-vries":
        speed, symbol = 1, 1j * equations.DISPERSION * waves**3
    else:
        speed = equations.STEEPENING
        symbol = equations.GROWTH * waves**2 - equations.DAMPING * waves**4

    def slope(_, u):
        modes = np.fft.fft(u)
        return np.fft.ifft(symbol * modes).real - speed * u * np.fft.ifft(1j * waves * modes).real

    found = solve_ivp(slope, (0, end), start, method="DOP853", rtol=1e-6, atol=1e-6).y[:, -1]
    wanted = EQUATIONS[name].solution(np.stack([coarse, np.full(points, end)], axis=1))[:, 0]
    assert np.max(np.abs(found - wanted)) < 5e-3 * np.max(np.abs(wanted))
    at_first = np.stack([coarse, np.zeros(points)], axis=1)
    np.testing.assert_allclose(
        EQUATIONS[name].solution(at_first), EQUATIONS[name].values(at_first, np), atol=1e-12
    )


def test_the_references_of_the_waves_converge_and_keep_what_they_must():
    for grid in ("korteweg-de-vries", "kuramoto-sivashinsky"):
        coarse, fine, finest = (GRIDS[grid](128, steps)[2][-1] for steps in (1000, 2000, 4000))
        error = np.max(np.abs(fine - finest))
        assert error < np.max(np.abs(coarse - finest)) / 4  # fourth order, less where it is stiff
        assert error < 1e-3
    _, _, rows = equations.korteweg_de_vries_grid()
    np.testing.assert_allclose(np.sum(rows**2, axis=1), np.sum(rows[0] ** 2), rtol=1e-5)
    np.testing.assert_allclose(np.sum(rows, axis=1), 0, atol=1e-9)


def test_until_its_end_the_kuramoto_sivashinsky_equation_is_regular():
    """A disturbance grows by a few hundred at most, so that the start determines the end."""
    x, _, rows = equations.kuramoto_sivashinsky_grid()
    waves = 2 * np.pi * np.fft.fftfreq(len(x), d=x[1] - x[0])
    symbol = equations.GROWTH * waves**2 - equations.DAMPING * waves**4
    disturbed = equations._carried(
        x, rows[0] + 1e-6 * np.cos(3 * x + 1), equations.REGULAR, 2000, equations.STEEPENING, symbol
    )[2]
    assert np.max(np.abs(disturbed[-1] - rows[-1])) < 3e-4


def test_every_equation_with_trivial_solutions_has_them(x64):
    constants = {"reaction": (0, 1), "allen-cahn": (-1, 0, 1), "fisher": (0, 1), "membrane": (0,)}
    for name, values in constants.items():

        @jax.jit
        def found(value, key, equation=EQUATIONS[name]):
            points = equation.sample(key, 200, 100)
            return equation.losses(differentiable(lambda x: 0 * x[:, :1] + value), points)

        for value in values:
            losses = jax.device_get(found(float(value), jax.random.key(0)))
            assert losses["residual"] == 0
            assert losses["boundary"] + losses.get("initial", 0) > 1e-2


@pytest.mark.parametrize("name", EQUATIONS)
def test_points_lie_where_they_should(name):
    equation = EQUATIONS[name]
    points = sample(equation)
    lower, upper = np.float32(equation.lower), np.float32(equation.upper)
    for part in points.values():
        assert np.all((part >= lower) & (part <= upper))
    space = len(lower) - equation.timed
    on_wall = (points["boundary"] == lower) | (points["boundary"] == upper)
    assert np.all(np.any(on_wall[:, :space], axis=1))
    assert len(np.unique(points["residual"][:, 0])) > 190
    if equation.timed:
        assert np.all(points["initial"][:, -1] == lower[-1])
        assert len(points["initial"]) == len(points["boundary"]) == 50


def test_derivatives_are_those_of_a_polynomial(x64):
    points = np.array([[2.0, 3.0], [-1.0, 0.5]])
    found = jax.jit(lambda at: derivatives(lambda x: x[:, :1] ** 3 * x[:, 1:], at, 0, 3))(points)
    x, y = points[:, :1], points[:, 1:]
    for value, expected in zip(found, [x**3 * y, 3 * x**2 * y, 6 * x * y, 6 * y], strict=True):
        np.testing.assert_allclose(value, expected, rtol=1e-14)
