"""The simulator against what fluid must do, and its data set."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from dsp_plugin.launch.examples.shallow_water import (
    CHANGING,
    GRAVITY,
    PROGNOSTIC,
    RADIUS,
    VARIABLES,
    ShallowWater,
    State,
    Weather,
    batch_of_some_variables,
)

pytestmark = pytest.mark.timeout(60)
HOUR = 3600.0
WATER = ShallowWater(rows=16, columns=24)


def test_mass_is_conserved_to_rounding_and_energy_nearly():
    water = replace(WATER, viscosity=0.0)
    start = water.random_weather(2, seed=3)
    end = water.run(start, 24 * HOUR)
    assert np.abs(end.h - start.h).max() > 50.0
    np.testing.assert_allclose(water.mass(end), water.mass(start), rtol=1e-13)
    np.testing.assert_allclose(water.energy(end), water.energy(start), rtol=2e-4)
    sticky = replace(WATER, viscosity=1e5)
    end = sticky.run(start, 24 * HOUR)
    np.testing.assert_allclose(sticky.mass(end), sticky.mass(start), rtol=1e-13)
    assert (sticky.energy(end) < sticky.energy(start)).all()


def strip_at_the_equator(columns: int = 64) -> ShallowWater:
    return ShallowWater(
        rows=4, columns=columns, south=-2.0, north=2.0, sector=90.0, rotation=0.0, viscosity=0.0, depth=500.0
    )


def test_a_small_wave_travels_at_the_root_of_g_times_depth():
    water = strip_at_the_equator()
    around = np.linspace(0, 2 * np.pi, water.columns, endpoint=False)
    speed, length = np.sqrt(GRAVITY * water.depth), RADIUS * np.deg2rad(water.sector)
    small = 0.1 * np.cos(around) * np.ones((water.rows, 1))
    half_a_cell = np.pi / water.columns
    east = 0.1 * speed / water.depth * np.cos(around + half_a_cell) * np.ones((water.rows, 1))
    state = State(water.depth + small, east, np.zeros((water.rows - 1, water.columns)))
    seconds = 0.7 * length / speed
    end = water.run(state, seconds)
    phases = -np.angle(np.fft.rfft(end.h, axis=-1)[:, 1])
    travelled = np.mod(phases, 2 * np.pi) / (2 * np.pi) * length
    np.testing.assert_allclose(travelled / seconds, speed, rtol=0.01)
    # It goes one way only, and keeps its height.
    np.testing.assert_allclose(np.ptp(end.h, axis=-1), 0.2, rtol=0.01)


def test_a_jet_in_balance_stays():
    water = replace(WATER, viscosity=0.0)
    flow = water.balanced(np.array([40.0 * np.exp(-(((np.rad2deg(water.latitudes) - 45) / 7) ** 2))]))
    # Depth falls towards the pole across a westerly jet: f u = -g dh/dy.
    assert np.ptp(flow.h) > 100.0
    slope = np.gradient(flow.h[0, :, 0], water.dy)
    coriolis = 2 * water.rotation * np.sin(water.latitudes)
    middle = np.abs(flow.u[0, :, 0]).argmax()
    assert slope[middle] == pytest.approx(-coriolis[middle] * flow.u[0, middle, 0] / GRAVITY, rel=0.1)
    end = water.run(flow, 48 * HOUR)
    for name in State._fields:
        np.testing.assert_allclose(getattr(end, name), getattr(flow, name), atol=1e-9, err_msg=name)
    # Without rotation nothing holds it.
    still = replace(water, rotation=0.0).run(flow, HOUR)
    assert np.abs(still.v).max() > 1.0


def test_highs_turn_clockwise_and_nearly_keep_their_balance():
    water = replace(WATER, viscosity=0.0)
    state = water.random_weather(4, seed=0)
    wind, height = water.fields(state)[:, 3], state.h - state.h.mean(-1, keepdims=True)
    assert np.corrcoef(wind.ravel(), height.ravel())[0, 1] < -0.3
    # Winds out of balance would shed their energy as gravity waves, in hours.
    end = water.run(state, 6 * HOUR)
    assert np.abs(water.divergence(end.u, end.v)).max() < 0.3 * np.abs(water.vorticity(end)).max()


def test_waves_that_are_not_resolved_do_not_grow():
    water = replace(WATER, viscosity=0.0)
    noise = np.random.default_rng(0).normal(size=(1, water.rows, water.columns))
    state = water.balanced(np.full((1, water.rows), 0.0))
    end = water.run(state._replace(h=state.h + noise), 48 * HOUR)
    assert np.abs(end.h - water.depth).max() < 5.0


def test_vorticity_of_a_solid_turn_is_twice_its_rate_times_the_sine_of_latitude():
    water = ShallowWater(rows=64, columns=8)
    rate = 1e-5
    u = rate * RADIUS * np.cos(water.latitudes)[:, None] * np.ones((1, water.columns))
    state = State(np.full(u.shape, 1e3), u, np.zeros((water.rows - 1, water.columns)))
    faces = (water.latitudes[1:] + water.latitudes[:-1]) / 2
    np.testing.assert_allclose(water.vorticity(state)[:, 0], 2 * rate * np.sin(faces), rtol=1e-3)
    np.testing.assert_allclose(water.kinetic_energy(state)[:, 0], u[:, 0] ** 2 / 2, rtol=1e-12)
    assert np.abs(water.divergence(u, state.v)).max() < 1e-18


@pytest.fixture(scope="module")
def weather() -> Weather:
    return Weather(WATER, states=2, times=4, hours=3.0, seed=5)


def test_moments_follow_from_each_other(weather):
    assert len(weather) == 6
    assert len(list(weather)) == 6
    scale = weather.scale
    first, second = weather[3], weather[4]
    now, later = (item["fields"].numpy() * scale.deviation[:, None, None] for item in (first, second))
    change = first["target"].numpy() * scale.change[:, None, None]
    for variable in range(CHANGING):
        np.testing.assert_allclose(
            now[variable] + change[variable], later[variable], atol=1e-5 * np.abs(later[variable]).max()
        )
    assert np.array_equal(first["fields"][-1], second["fields"][-1])
    assert first["fields"].dtype == first["target"].dtype == torch.float32


def test_fields_have_mean_0_and_deviation_1_in_training_and_another_draw_is_in_the_same_units(weather):
    assert float(weather.fields.mean((0, 1, 3, 4)).abs().max()) < 1e-5
    torch.testing.assert_close(weather.fields.std((0, 1, 3, 4)), torch.ones(len(VARIABLES)), rtol=1e-3, atol=0)
    other = Weather(WATER, states=1, times=2, seed=6, scale=weather.scale)
    assert other.scale is weather.scale
    depth = other.fields[0, 0, 0].numpy() * weather.scale.deviation[0] + weather.scale.mean[0]
    assert 300.0 < depth.min() < depth.max() < 2000.0
    assert not torch.equal(other.fields[0, 0], weather.fields[0, 0])


def test_equal_arguments_make_equal_data(weather):
    again = Weather(WATER, states=2, times=2, seed=5, scale=weather.scale)
    assert torch.equal(again.fields, weather.fields[:, :2])


def test_batches_bring_depth_and_winds_and_some_derived_variables(weather):
    met = set()
    for first in range(len(weather)):
        batch = batch_of_some_variables([weather[first], weather[0]])
        ids, wanted = batch["variables"].tolist(), batch["wanted"].tolist()
        met.add(tuple(ids))
        assert set(range(PROGNOSTIC)) <= set(ids) <= set(range(len(VARIABLES)))
        assert wanted == [variable for variable in ids if variable < CHANGING]
        for place, variable in enumerate(ids):
            assert torch.equal(batch["fields"][1, place], weather[0]["fields"][variable])
        for place, variable in enumerate(wanted):
            assert torch.equal(batch["target"][0, place], weather[first]["target"][variable])
        again = batch_of_some_variables([weather[first], weather[1]])
        assert torch.equal(again["variables"], batch["variables"])
    assert len(met) > 2
