"""Partial differential equations with their losses, points and reference solutions.

A network maps points of shape ``(N, inputs)`` to ``(N, outputs)``; the last input is time where
there is one. Every reference is exact, or computed here in float64.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Network = Callable[[jax.Array], jax.Array]
PI = np.pi


def derivatives(network: Network, points: jax.Array, axis: int, order: int) -> list[jax.Array]:
    """The network and its derivatives along one input, up to ``order``: forward over forward."""
    direction = jnp.zeros_like(points).at[:, axis].set(1)

    def raised(function: Callable[[jax.Array], list[jax.Array]]) -> Any:
        def higher(x: jax.Array) -> list[jax.Array]:
            values, slopes = jax.jvp(function, (x,), (direction,))
            return [*values, slopes[-1]]

        return higher

    function = lambda x: [network(x)]  # noqa: E731
    for _ in range(order):
        function = raised(function)
    return function(points)


@dataclasses.dataclass(frozen=True, eq=False)
class Equation:
    """One equation, its domain and what is known of its solution.

    Attributes:
        name: on the command line.
        lower: the domain's lower corner.
        upper: its upper corner.
        outputs: how many the network has.
        residual: ``(network, points) -> (N, equations)``, 0 for a solution.
        values: what the solution is at given points of the boundary or of the first moment,
            ``(points, numpy or jax.numpy) -> (N, outputs)``.
        solution: the reference anywhere, float64: ``points -> (N, outputs)``.
        timed: whether the last input is time.
        periodic: whether the solution repeats in space, instead of having values at its ends.
        velocity: whether the first moment prescribes the derivative by time, 0, too.
    """

    name: str
    lower: tuple[float, ...]
    upper: tuple[float, ...]
    outputs: int
    residual: Callable[[Network, jax.Array], jax.Array]
    values: Callable[[Any, Any], Any]
    solution: Callable[[np.ndarray], np.ndarray]
    timed: bool = True
    periodic: bool = False
    velocity: bool = False

    def sample(self, key: jax.Array, residual: int, data: int) -> dict[str, jax.Array]:
        """Points of one step: inside, on the boundary, and at the first moment."""
        keys = jax.random.split(key, 3)
        lower, upper = jnp.array(self.lower), jnp.array(self.upper)

        def inside(key: jax.Array, count: int) -> jax.Array:
            return jax.random.uniform(key, (count, len(lower)), minval=lower, maxval=upper)

        walls = [(axis, end) for axis in range(len(lower) - self.timed) for end in (0, 1)]
        count = data // (2 if self.timed else 1)
        boundary = inside(keys[1], count)
        for number, (axis, end) in enumerate(walls):
            rows = np.arange(count) % len(walls) == number
            boundary = boundary.at[rows, axis].set((self.lower, self.upper)[end][axis])
        points = {"residual": inside(keys[0], residual), "boundary": boundary}
        if self.timed:
            points["initial"] = inside(keys[2], count).at[:, -1].set(self.lower[-1])
        return points

    def losses(self, network: Network, points: dict[str, jax.Array]) -> dict[str, jax.Array]:
        """Mean squares of the residual and of the errors on the boundary and at first."""
        found = {"residual": _mean_square(self.residual(network, points["residual"]))}
        boundary = points["boundary"]
        if self.periodic:
            left = derivatives(network, boundary.at[:, 0].set(self.lower[0]), 0, 1)
            right = derivatives(network, boundary.at[:, 0].set(self.upper[0]), 0, 1)
            found["boundary"] = sum(_mean_square(a - b) for a, b in zip(left, right, strict=True))
        else:
            wrong = network(boundary) - self.values(boundary, jnp)
            found["boundary"] = _mean_square(wrong)
        if self.timed:
            at_first = derivatives(network, points["initial"], -1, int(self.velocity))
            wrong = at_first[0] - self.values(points["initial"], jnp)
            found["initial"] = _mean_square(wrong)
            if self.velocity:
                found["initial"] += _mean_square(at_first[1])
        return found

    @functools.cached_property
    def reference(self) -> tuple[np.ndarray, np.ndarray]:
        """2,000 points of the domain, and the solution there."""
        random = np.random.default_rng(0)
        points = random.uniform(self.lower, self.upper, (2000, len(self.lower)))
        return points, self.solution(points)


def _mean_square(values: jax.Array) -> jax.Array:
    """The sum over the outputs of their mean squares over the points."""
    return jnp.sum(jnp.mean(values**2, axis=0))


def _exact(formula: Callable[[Any, Any], Any]) -> dict[str, Any]:
    """Boundary values and reference from one formula of (points, numpy or jax.numpy)."""
    return {"values": formula, "solution": lambda points: formula(points, np)}


# Burgers' equation.

VISCOSITY = 0.01 / PI


def _burgers(u: Network, points: jax.Array) -> jax.Array:
    value, slope, curvature = derivatives(u, points, 0, 2)
    return derivatives(u, points, 1, 1)[1] + value * slope - VISCOSITY * curvature


def burgers_solution(points: np.ndarray, nodes: int = 200) -> np.ndarray:
    """By the Cole-Hopf transformation, with Gauss-Hermite quadrature."""
    roots, weights = np.polynomial.hermite.hermgauss(nodes)
    x, t = points[:, :1], points[:, 1:]
    y = x - np.sqrt(4 * VISCOSITY * t) * roots
    exponent = -np.cos(PI * y) / (2 * PI * VISCOSITY)
    mass = weights * np.exp(exponent - exponent.max(axis=1, keepdims=True))
    return -(np.sin(PI * y) * mass).sum(1, keepdims=True) / mass.sum(1, keepdims=True)


# The nonlinear Schroedinger equation: real and imaginary part.


def _schroedinger(h: Network, points: jax.Array) -> jax.Array:
    value, _, curvature = derivatives(h, points, 0, 2)
    slope = derivatives(h, points, 1, 1)[1]
    square = jnp.sum(value**2, axis=1, keepdims=True)
    right = 0.5 * curvature + square * value
    return jnp.stack([-slope[:, 1] + right[:, 0], slope[:, 0] + right[:, 1]], axis=1)


@functools.cache
def schroedinger_grid(
    points: int = 256, steps: int = 4000
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Positions, moments and the solution on them, by Strang splitting and the FFT."""
    x = np.linspace(-5, 5, points, endpoint=False)
    wave = 2 * PI * np.fft.fftfreq(points, d=10 / points)
    step = (PI / 2) / steps
    half = np.exp(-0.25j * wave**2 * step)
    h = 2 / np.cosh(x) + 0j
    rows, kept = [h], max(1, steps // 1000)
    for number in range(1, steps + 1):
        h = np.fft.ifft(half * np.fft.fft(h))
        h = h * np.exp(1j * step * np.abs(h) ** 2)
        h = np.fft.ifft(half * np.fft.fft(h))
        if number % kept == 0:
            rows.append(h)
    return x, np.linspace(0, PI / 2, len(rows)), np.array(rows)


def _schroedinger_solution(points: np.ndarray) -> np.ndarray:
    """Between the moments of the grid by cubic interpolation, in space by its Fourier series."""
    from scipy.interpolate import CubicSpline

    _, moments, rows = schroedinger_grid()
    coefficients = CubicSpline(moments, np.fft.fft(rows, axis=1))(points[:, 1])
    wave = 2 * PI * np.fft.fftfreq(rows.shape[1], d=10 / rows.shape[1])
    phases = np.exp(1j * (points[:, :1] + 5) * wave)
    h = (coefficients * phases).sum(1) / rows.shape[1]
    return np.stack([h.real, h.imag], axis=1)


# Steady and unsteady flows with exact solutions.

REYNOLDS = 40.0
_RATE = REYNOLDS / 2 - np.sqrt(REYNOLDS**2 / 4 + 4 * PI**2)


def _kovasznay_flow(points: Any, xp: Any) -> Any:
    grown, y = xp.exp(_RATE * points[:, 0]), 2 * PI * points[:, 1]
    u, v = 1 - grown * xp.cos(y), _RATE / (2 * PI) * grown * xp.sin(y)
    return xp.stack([u, v, 0.5 * (1 - grown**2)], axis=1)


def _flow(network: Network, points: jax.Array, viscosity: float, timed: bool) -> jax.Array:
    """The incompressible Navier-Stokes equations; outputs are velocities, then pressure."""
    dimensions = points.shape[1] - timed
    along = [derivatives(network, points, axis, 2) for axis in range(dimensions)]
    velocity = along[0][0][:, :dimensions]
    momentum = sum(
        velocity[:, axis : axis + 1] * slope[:, :dimensions] - viscosity * curvature[:, :dimensions]
        for axis, (_, slope, curvature) in enumerate(along)
    )
    momentum += jnp.stack([slope[:, -1] for _, slope, _ in along], axis=1)
    if timed:
        momentum += derivatives(network, points, dimensions, 1)[1][:, :dimensions]
    divergence = sum(slope[:, axis] for axis, (_, slope, _) in enumerate(along))
    return jnp.concatenate([momentum, divergence[:, None]], axis=1)


def _beltrami_flow(points: Any, xp: Any) -> Any:
    x, y, z, t = (points[:, axis] for axis in range(4))
    decay = xp.exp(-t)

    def component(a: Any, b: Any, c: Any) -> Any:
        return -(xp.exp(a) * xp.sin(b + c) + xp.exp(c) * xp.cos(a + b)) * decay

    def mixed(a: Any, b: Any, c: Any) -> Any:
        return 2 * xp.sin(a + b) * xp.cos(c + a) * xp.exp(b + c)

    squares = xp.exp(2 * x) + xp.exp(2 * y) + xp.exp(2 * z)
    pressure = -0.5 * (squares + mixed(x, y, z) + mixed(y, z, x) + mixed(z, x, y)) * decay**2
    velocities = [component(x, y, z), component(y, z, x), component(z, x, y)]
    return xp.stack([*velocities, pressure], axis=1)


# Scalar equations with exact solutions.


def _helmholtz_wave(points: Any, xp: Any) -> Any:
    return xp.sin(PI * points[:, :1]) * xp.sin(2 * PI * points[:, 1:])


def _helmholtz(u: Network, points: jax.Array) -> jax.Array:
    value, _, by_x = derivatives(u, points, 0, 2)
    source = (1 - 5 * PI**2) * _helmholtz_wave(points, jnp)
    return by_x + derivatives(u, points, 1, 2)[2] + value - source


def _klein_gordon_wave(points: Any, xp: Any) -> Any:
    x, t = points[:, :1], points[:, 1:]
    return x * xp.cos(5 * PI * t) + (x * t) ** 3


def _klein_gordon(u: Network, points: jax.Array) -> jax.Array:
    x, t = points[:, :1], points[:, 1:]
    value, _, by_x = derivatives(u, points, 0, 2)
    exact = _klein_gordon_wave(points, jnp)
    source = -25 * PI**2 * x * jnp.cos(5 * PI * t) + 6 * x**3 * t - 6 * x * t**3 + exact**3
    return derivatives(u, points, 1, 2)[2] - by_x + value**3 - source


def _soliton_wave(points: Any, xp: Any) -> Any:
    return 2 / xp.cosh(points[:, :1] - 4 * points[:, 1:] + 2) ** 2


def _soliton(u: Network, points: jax.Array) -> jax.Array:
    value, slope, _, third = derivatives(u, points, 0, 3)
    return derivatives(u, points, 1, 1)[1] + 6 * value * slope + third


def _standing_wave(points: Any, xp: Any) -> Any:
    x, t = PI * points[:, :1], PI * points[:, 1:]
    return xp.sin(x) * xp.cos(2 * t) + 0.5 * xp.sin(4 * x) * xp.cos(8 * t)


def _wave(u: Network, points: jax.Array) -> jax.Array:
    return derivatives(u, points, 1, 2)[2] - 4 * derivatives(u, points, 0, 2)[2]


def _cooling(points: Any, xp: Any) -> Any:
    return xp.sin(3 * PI * points[:, :1]) * xp.exp(-0.45 * PI**2 * points[:, 1:])


def _heat(u: Network, points: jax.Array) -> jax.Array:
    return derivatives(u, points, 1, 1)[1] - 0.05 * derivatives(u, points, 0, 2)[2]


def _travelling(points: Any, xp: Any) -> Any:
    return xp.sin(points[:, :1] - 10 * points[:, 1:])


def _advection(u: Network, points: jax.Array) -> jax.Array:
    return derivatives(u, points, 1, 1)[1] + 10 * derivatives(u, points, 0, 1)[1]


EQUATIONS = {
    equation.name: equation
    for equation in (
        Equation(
            "burgers", (-1.0, 0.0), (1.0, 1.0), 1, _burgers,
            values=lambda points, xp: xp.where(points[:, 1:] == 0, -xp.sin(PI * points[:, :1]), 0),
            solution=burgers_solution,
        ),
        Equation(
            "schroedinger", (-5.0, 0.0), (5.0, PI / 2), 2, _schroedinger,
            values=lambda points, xp: xp.stack(
                [2 / xp.cosh(points[:, 0]), xp.zeros_like(points[:, 0])], axis=1
            ),
            solution=_schroedinger_solution, periodic=True,
        ),
        Equation(
            "kovasznay", (-0.5, -0.5), (1.0, 1.5), 3,
            lambda network, points: _flow(network, points, 1 / REYNOLDS, timed=False),
            **_exact(_kovasznay_flow), timed=False,
        ),
        Equation(
            "beltrami", (-1.0, -1.0, -1.0, 0.0), (1.0, 1.0, 1.0, 1.0), 4,
            lambda network, points: _flow(network, points, 1.0, timed=True),
            **_exact(_beltrami_flow),
        ),
        Equation(
            "helmholtz", (-1.0, -1.0), (1.0, 1.0), 1, _helmholtz,
            **_exact(_helmholtz_wave), timed=False,
        ),
        Equation(
            "klein-gordon", (0.0, 0.0), (1.0, 1.0), 1, _klein_gordon,
            **_exact(_klein_gordon_wave), velocity=True,
        ),
        Equation("soliton", (-5.0, 0.0), (5.0, 1.0), 1, _soliton, **_exact(_soliton_wave)),
        Equation(
            "wave", (0.0, 0.0), (1.0, 1.0), 1, _wave, **_exact(_standing_wave), velocity=True
        ),
        Equation("heat", (0.0, 0.0), (1.0, 1.0), 1, _heat, **_exact(_cooling)),
        Equation("advection", (0.0, 0.0), (2 * PI, 1.0), 1, _advection, **_exact(_travelling)),
    )
}  # fmt: skip
