"""Shallow water on a rotating sphere: a simulator of a strip of latitudes, and a data set of its fields and tendencies.

A layer of fluid of depth h and velocity (u, v), between two walls along circles of latitude and periodic in longitude:

    dh/dt = -div(h u)      du/dt = -(zeta + f) k x u - grad(g h + u^2/2) + nu laplace(u)

On an Arakawa C-grid by the scheme of Sadourny (J. Atmos. Sci. 32, 1975) that conserves energy, with fourth-order
Runge-Kutta in time. Depth changes by fluxes through faces alone, so mass is conserved to rounding.

Shape suffixes: Y rows from south to north, X columns from west to east, N states side by side. Depth lies at the
centres of cells, u on their eastern faces, v on their northern faces; on the walls v is zero, and not stored.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

RADIUS, GRAVITY, ROTATION = 6.371e6, 9.80616, 7.292e-5

# The variables of the data set, by id. Of the last one there is no tendency: it does not change.
VARIABLES = ("depth", "u", "v", "vorticity", "kinetic energy", "sine of latitude")
PROGNOSTIC, CHANGING = 3, 5


def add_arguments(parser: argparse.ArgumentParser, *, patch: int, weathers: int) -> None:
    """What scripts that train a vision transformer on this data ask for; `patch` and `weathers` are their defaults."""
    parser.add_argument("--attention", choices=("axial", "full"), default="axial")
    parser.add_argument("--patch", type=int, default=patch, help="side of a patch, in pixels")
    parser.add_argument("--registers", type=int, default=0, help="learned tokens in front, under full attention")
    parser.add_argument("--rows", type=int, default=32, help="pixels from south to north")
    parser.add_argument("--columns", type=int, default=64, help="pixels from west to east")
    parser.add_argument("--weathers", type=int, default=weathers, help="simulations to train on")
    parser.add_argument("--hours", type=float, default=3.0, help="ahead that the model predicts")


class State(NamedTuple):
    """Fluid on the grid.

    Attributes:
        h: depth in m, [..., Y, X].
        u: eastward velocity in m/s, [..., Y, X].
        v: northward velocity in m/s, [..., Y - 1, X].
    """

    h: np.ndarray
    u: np.ndarray
    v: np.ndarray

    def plus(self, other: State, factor: float) -> State:
        """This state plus `factor` times the other."""
        return State(*(mine + factor * theirs for mine, theirs in zip(self, other, strict=True)))


def to_east(x: np.ndarray) -> np.ndarray:
    """The neighbours to the east."""
    return np.roll(x, -1, axis=-1)


def to_west(x: np.ndarray) -> np.ndarray:
    """The neighbours to the west."""
    return np.roll(x, 1, axis=-1)


def with_walls(x_yX: np.ndarray) -> np.ndarray:
    """What lies on the faces between rows, [..., Y - 1, X], with zeros on both walls, [..., Y + 1, X]."""
    return np.pad(x_yX, [(0, 0)] * (x_yX.ndim - 2) + [(1, 1), (0, 0)])


@dataclass(frozen=True)
class ShallowWater:
    """The equations on one grid.

    Attributes:
        rows: Y. columns: X.
        south: latitude of one wall in degrees. north: of the other.
        sector: degrees of longitude after which everything repeats.
        depth: mean depth in m, which sets the speed of gravity waves.
        rotation: of the sphere, in 1/s.
        viscosity: nu in m^2/s.
    """

    rows: int = 32
    columns: int = 64
    south: float = 20.0
    north: float = 65.0
    sector: float = 120.0
    depth: float = 1000.0
    rotation: float = ROTATION
    viscosity: float = 1e5

    @cached_property
    def _faces(self) -> np.ndarray:
        """Latitudes of the walls and of the faces between rows, in radians, [Y + 1]."""
        return np.deg2rad(np.linspace(self.south, self.north, self.rows + 1))

    @cached_property
    def latitudes(self) -> np.ndarray:
        """Of the centres of rows, in radians, [Y]."""
        return (self._faces[1:] + self._faces[:-1]) / 2

    @cached_property
    def _cosine(self) -> np.ndarray:
        return np.cos(self.latitudes)[:, None]

    @cached_property
    def _face_cosine(self) -> np.ndarray:
        return np.cos(self._faces[1:-1])[:, None]

    @cached_property
    def _coriolis(self) -> np.ndarray:
        """At the faces between rows, in 1/s, [Y - 1, 1]."""
        return 2 * self.rotation * np.sin(self._faces[1:-1])[:, None]

    @cached_property
    def dx(self) -> np.ndarray:
        """Widths of the cells of each row, in m, [Y, 1]."""
        return RADIUS * self._cosine * np.deg2rad(self.sector) / self.columns

    @cached_property
    def _face_dx(self) -> np.ndarray:
        return RADIUS * self._face_cosine * np.deg2rad(self.sector) / self.columns

    @cached_property
    def dy(self) -> float:
        """Height of a cell, in m."""
        return RADIUS * float(np.deg2rad(self.north - self.south)) / self.rows

    def longest_step(self, speed: float = 60.0) -> float:
        """Seconds that a step may take while no fluid is faster than `speed`: 0.8 of where Runge-Kutta diverges."""
        fastest = np.sqrt(GRAVITY * self.depth) + speed
        # The highest frequency of centred differences on a C-grid, where rows are shortest.
        frequency = 2 * fastest * np.hypot(1 / self.dx.min(), 1 / self.dy)
        return float(0.8 * 2.8 / frequency)

    def vorticity(self, state: State) -> np.ndarray:
        """Relative vorticity in 1/s at the corners between rows, [..., Y - 1, X], north-east of cell centres."""
        around = np.diff(state.u * self._cosine, axis=-2)
        return (to_east(state.v) - state.v) / self._face_dx - around / (self.dy * self._face_cosine)

    def divergence(self, u: np.ndarray, v: np.ndarray) -> np.ndarray:
        """Divergence [..., Y, X] of what goes through faces."""
        northward = np.diff(with_walls(v * self._face_cosine), axis=-2)
        return (u - to_west(u)) / self.dx + northward / (self.dy * self._cosine)

    def kinetic_energy(self, state: State) -> np.ndarray:
        """Of unit mass in m^2/s^2 at centres, [..., Y, X]."""
        east = (state.u**2 + to_west(state.u) ** 2) / 2
        faces = with_walls(state.v**2 * self._face_cosine)
        return (east + (faces[..., 1:, :] + faces[..., :-1, :]) / (2 * self._cosine)) / 2

    def tendency(self, state: State) -> State:
        """What changes per second."""
        h, u, v = state
        h_east = (h + to_east(h)) / 2
        h_north = (h[..., 1:, :] + h[..., :-1, :]) / 2
        flux_u, flux_v = h_east * u, h_north * v
        zeta = self.vorticity(state)
        potential = (zeta + self._coriolis) / ((h_north + to_east(h_north)) / 2)
        head = GRAVITY * h + self.kinetic_energy(state)

        turned_v = potential * (flux_v + to_east(flux_v)) / 2 * self._face_cosine
        faces = with_walls(turned_v)
        du = (faces[..., 1:, :] + faces[..., :-1, :]) / (2 * self._cosine) - (to_east(head) - head) / self.dx
        turned_u = potential * (flux_u[..., 1:, :] + flux_u[..., :-1, :]) / 2
        dv = -(turned_u + to_west(turned_u)) / 2 - np.diff(head, axis=-2) / self.dy
        if self.viscosity:
            spread = self.divergence(u, v)
            shear = with_walls(zeta)
            du = du + self.viscosity * ((to_east(spread) - spread) / self.dx - np.diff(shear, axis=-2) / self.dy)
            dv = dv + self.viscosity * (np.diff(spread, axis=-2) / self.dy + (zeta - to_west(zeta)) / self._face_dx)
        return State(-self.divergence(flux_u, flux_v), du, dv)

    def step(self, state: State, seconds: float) -> State:
        """One step of fourth-order Runge-Kutta."""
        k1 = self.tendency(state)
        k2 = self.tendency(state.plus(k1, seconds / 2))
        k3 = self.tendency(state.plus(k2, seconds / 2))
        k4 = self.tendency(state.plus(k3, seconds))
        return state.plus(k1, seconds / 6).plus(k2, seconds / 3).plus(k3, seconds / 3).plus(k4, seconds / 6)

    def run(self, state: State, seconds: float) -> State:
        """The state so much later, by as many equal steps as that takes."""
        steps = int(np.ceil(seconds / self.longest_step()))
        for _ in range(steps):
            state = self.step(state, seconds / steps)
        return state

    def mass(self, state: State) -> np.ndarray:
        """Volume of the fluid in m^3, [...]."""
        return (state.h * self.dx).sum((-2, -1)) * self.dy

    def energy(self, state: State) -> np.ndarray:
        """Kinetic and potential energy over density, in m^5/s^2, [...]."""
        density = state.h * self.kinetic_energy(state) + GRAVITY * state.h**2 / 2
        return (density * self.dx).sum((-2, -1)) * self.dy

    def balanced(self, u_NY: np.ndarray) -> State:
        """The steady flow whose eastward velocity is `u_NY` all around, [..., Y]: depth balances it, in the scheme."""
        u = np.repeat(u_NY[..., None], self.columns, axis=-1)
        at_rest = State(np.full(u.shape, self.depth), u, np.zeros((*u.shape[:-2], self.rows - 1, self.columns)))
        kinetic = self.kinetic_energy(at_rest)[..., 0]
        absolute = self.vorticity(at_rest)[..., 0] + self._coriolis[:, 0]
        area = self._cosine[:, 0] / self._cosine.sum()
        h = np.full(u_NY.shape, self.depth)
        # Force and depth depend on each other across a row, and the first row's depth on the mean.
        for _ in range(60):
            turned = absolute * (h * u_NY)[..., 1:] + absolute * (h * u_NY)[..., :-1]
            slope = turned / (h[..., 1:] + h[..., :-1]) + np.diff(kinetic, axis=-1) / self.dy
            h[..., 1:] = h[..., :1] - np.cumsum(slope, axis=-1) * self.dy / GRAVITY
            h += self.depth - (h * area).sum(-1, keepdims=True)
        return at_rest._replace(h=np.repeat(h[..., None], self.columns, axis=-1))

    def random_weather(self, states: int, seed: int) -> State:
        """A jet in balance in each of the states, with highs and lows around it in geostrophic balance, all of them
        drawn by `seed`."""
        draw = np.random.default_rng(seed)
        shape = (states, 1, 1)
        latitude = self.latitudes[:, None]
        across = (latitude - self._faces[0]) / (self._faces[-1] - self._faces[0])
        # Nothing blows at the walls, whatever is drawn.
        edge = np.sin(np.pi * across) ** 2
        centre, width = draw.uniform(0.35, 0.65, shape), draw.uniform(0.1, 0.16, shape)
        jet = draw.uniform(20, 45, shape) * np.exp(-(((across - centre) / width) ** 2)) * edge
        flow = self.balanced(jet[..., 0])
        around = np.linspace(0, 2 * np.pi, self.columns, endpoint=False)
        highs = np.zeros((states, self.rows, self.columns))
        for wave in range(1, 6):
            for row in range(1, 4):
                phase = draw.uniform(0, 2 * np.pi, shape)
                highs += draw.normal(0, 40, shape) * np.cos(wave * around + phase) * np.sin(np.pi * row * across)
        highs *= edge
        slope = with_walls(np.diff(highs, axis=-2) / self.dy / self._coriolis)
        slope = (slope[..., 1:, :] + slope[..., :-1, :]) / 2
        east = (highs[..., 1:, :] + highs[..., :-1, :]) / 2
        return State(
            flow.h + highs,
            flow.u - GRAVITY * (slope + to_east(slope)) / 2,
            GRAVITY * (to_east(east) - to_west(east)) / (2 * self._face_dx * self._coriolis),
        )

    def fields(self, state: State) -> np.ndarray:
        """The variables of `VARIABLES` at centres, [..., 6, Y, X], in the units of the others' docstrings."""
        north = with_walls(state.v)
        corners = with_walls(self.vorticity(state))
        spin = (corners[..., 1:, :] + corners[..., :-1, :]) / 2
        sine = np.broadcast_to(np.sin(self.latitudes)[:, None], state.h.shape)
        return np.stack(
            [
                state.h,
                (state.u + to_west(state.u)) / 2,
                (north[..., 1:, :] + north[..., :-1, :]) / 2,
                (spin + to_west(spin)) / 2,
                self.kinetic_energy(state),
                sine,
            ],
            axis=-3,
        )


@dataclass(frozen=True)
class Scale:
    """What the fields of a data set are measured in: mean and deviation of each variable, deviation of each change."""

    mean: np.ndarray
    deviation: np.ndarray
    change: np.ndarray

    @classmethod
    def of(cls, fields: np.ndarray) -> Scale:
        """That of fields [states, times, 6, Y, X]."""
        over = (0, 1, 3, 4)
        return cls(fields.mean(over), fields.std(over), np.diff(fields[:, :, :CHANGING], axis=1).std(over))


class Weather(Dataset[dict[str, Tensor]]):
    """Fields of simulated weather, and by how much they change in the hours that follow.

    Args:
        water: the simulator.
        states: how many weathers, which start apart. times: moments of each, of which the last is only a target.
        hours: from one moment to the next.
        seed: of what is drawn; equal arguments make equal data, in whichever process.
        scale: of the training data, for data to test on; that of these data when None.
    """

    def __init__(
        self,
        water: ShallowWater,
        states: int,
        times: int,
        hours: float = 3.0,
        seed: int = 0,
        scale: Scale | None = None,
    ) -> None:
        # The winds drawn at first are not quite in balance, and radiate gravity waves for some hours.
        state = water.run(water.random_weather(states, seed), 12 * 3600)
        fields = [water.fields(state)]
        for _ in range(times - 1):
            state = water.run(state, hours * 3600)
            fields.append(water.fields(state))
        raw = np.stack(fields, axis=1)
        self.scale = scale or Scale.of(raw)
        scaled = (raw - self.scale.mean[:, None, None]) / self.scale.deviation[:, None, None]
        changes = np.diff(raw[:, :, :CHANGING], axis=1) / self.scale.change[:, None, None]
        self.fields = torch.from_numpy(scaled).float()
        self.changes = torch.from_numpy(changes).float()

    def __len__(self) -> int:
        return self.changes.shape[0] * self.changes.shape[1]

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """One moment.

        Returns:
            fields: [6, Y, X], fp32, of mean 0 and deviation 1.
            target: [5, Y, X], fp32, the changes of all variables but the last, of deviation 1.
            index: int64.

        Raises:
            IndexError: past the end, which is how iteration over a sequence stops.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} in a data set of {len(self)} moments")
        state, time = divmod(index, self.changes.shape[1])
        return {
            "fields": self.fields[state, time],
            "target": self.changes[state, time],
            "index": torch.tensor(index),
        }


def batch_of_some_variables(samples: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """A batch in which the derived variables are there or not, in any order: as a `VisionTransformer` takes it.

    Depth and winds are always there. What else is, hangs on the first sample alone, so all processes that load the
    batch agree.

    Returns:
        fields: [B, V, Y, X]. variables: int64 [V]. wanted: int64 [W], those of them that change.
        target: [B, W, Y, X].
    """
    draw = np.random.default_rng(int(samples[0]["index"]))
    derived = [variable for variable in range(PROGNOSTIC, len(VARIABLES)) if draw.random() < 0.5]
    variables = torch.from_numpy(draw.permutation([*range(PROGNOSTIC), *derived]))
    wanted = variables[variables < CHANGING]
    return {
        "fields": torch.stack([sample["fields"] for sample in samples])[:, variables],
        "variables": variables,
        "wanted": wanted,
        "target": torch.stack([sample["target"] for sample in samples])[:, wanted],
    }
