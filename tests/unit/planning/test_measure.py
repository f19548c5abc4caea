"""Rates of this machine: what is fitted, and that a profile comes out that predicts."""

from collections.abc import Callable

import pytest
import torch

from kfac_dist.communicator.local import LocalCommunicator
from kfac_dist.planning import measure
from kfac_dist.planning.measure import Clock, measure_profile
from kfac_dist.planning.profile import create_profile
from kfac_dist.planning.simulate import Simulation
from tests.unit.planning.test_plan import configuration

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def in_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "_SECONDS", 0.001)
    monkeypatch.setattr(measure, "_PRODUCT_SIZES", {"cpu": (16, 32)})
    monkeypatch.setattr(measure, "_MATRIX_SIZES", {"cpu": (16, 64)})
    monkeypatch.setattr(measure, "_COPIED_VALUES", {"cpu": 1 << 16})


def test_a_fit_finds_a_line_and_has_no_negative_terms():
    assert measure._fit([1.0, 2.0, 4.0], [5.0, 7.0, 11.0]) == pytest.approx((3.0, 2.0))
    assert measure._fit([1.0, 2.0], [4.0, 3.0]) == (3.5, 0.0), "faster where it should be slower: the mean"
    constant, slope = measure._fit([1.0, 2.0], [1.0, 3.0])
    assert (constant, slope) == (1.0, 0.0), "no peak: the best that was seen"


def test_rates_of_a_known_machine_come_out(monkeypatch):
    """With seconds by formula in place of the clock's, the fit gives the rates of the formula."""
    rows, rate, row_seconds = 1 << 14, 1e9, 1e-6
    monkeypatch.setattr(measure, "_PRODUCT_SIZES", {"cpu": (16, 64, 256)})
    monkeypatch.setattr(measure, "_MATRIX_SIZES", {"cpu": (16, 64, 256)})
    sizes = iter((16, 64, 256) * 2)

    def product_seconds(clock: Clock, function: object) -> float:
        size = next(sizes)
        return 2 * size**2 * rows / rate * (1 + 32 / size)

    monkeypatch.setattr(Clock, "seconds", product_seconds)
    clock = Clock(LocalCommunicator(), CPU)
    found = clock.product_rate(torch.float32)
    assert found["teraflops"] == pytest.approx(1e-3)
    assert found["half_size"] == pytest.approx(32)

    def factorise_seconds(clock: Clock, function: object) -> float:
        size = next(sizes)
        return size**3 / 3 / rate + size * row_seconds

    monkeypatch.setattr(Clock, "seconds", factorise_seconds)
    found = clock.factorisation_rate()
    assert found["teraflops"] == pytest.approx(1e-3)
    assert found["row_seconds"] == pytest.approx(row_seconds)


def test_only_the_solves_themselves_are_timed(monkeypatch):
    """A factor brought into its layout in each call would make solves seem 1.2 to 2 times as slow."""
    monkeypatch.setattr(measure, "_MATRIX_SIZES", {"cpu": (64, 300)})
    names: list[list[str]] = []

    def record(clock: Clock, function: Callable[[], object]) -> float:
        with torch.profiler.profile() as profiler:
            function()
        names.append([event.name for event in profiler.events()])
        return 1.0

    monkeypatch.setattr(Clock, "seconds", record)
    Clock(LocalCommunicator(), CPU).solve_rate()
    small, large = names
    assert "aten::cholesky_solve" in small
    assert large.count("aten::linalg_solve_triangular") == 2
    assert "aten::contiguous" not in small + large


def test_a_profile_is_measured_and_predicts_what_it_was_measured_on():
    config = configuration()
    profile = measure_profile(config, LocalCommunicator(), CPU)
    assert (profile.device, profile.devices_per_node, profile.num_nodes) == ("cpu", 1, 1)
    assert "assumed, of one rank" in profile.network.intra_node.source
    assert profile.training.source == "measured: digits_cnn, 4 images, fp32"
    for rate in (profile.single, profile.factorise, profile.solve, profile.memory, profile.factors):
        assert rate.source.startswith("measured: ")
    assert create_profile(profile.model_dump(mode="json"), "again") == profile
    point = Simulation(config, profile).predict(1)
    training, _ = Clock(LocalCommunicator(), CPU).slot_seconds(config)
    expected = (point.stages["forward"] + point.stages["backward"]) / point.slots
    assert expected == pytest.approx(training, rel=3), "on a busy machine"


def test_a_profile_tells_which_part_of_the_samples_its_factors_were_measured_with(monkeypatch):
    monkeypatch.setattr(Clock, "slot_seconds", lambda clock, config: (2.0, 1.0))
    part = configuration().kfac.model_copy(update={"sample_fraction": 0.25})
    profile = measure_profile(configuration().model_copy(update={"kfac": part}), LocalCommunicator(), CPU)
    assert profile.training.source == "measured: digits_cnn, 4 images, fp32"
    assert profile.factors.source == "measured: digits_cnn, 4 images, fp32, sample_fraction 0.25"


def test_a_configuration_without_kfac_is_measured(monkeypatch):
    """With its factors, so that the profile serves for K-FAC too."""
    monkeypatch.setattr(Clock, "slot_seconds", lambda clock, config: (2.0, 1.0))
    sgd = configuration(kfac=None, optimizer={"name": "sgd", "learning_rate": 0.1, "momentum": 0.9})
    profile = measure_profile(sgd, LocalCommunicator(), CPU)
    assert profile.factors.source == profile.training.source == "measured: digits_cnn, 4 images, fp32"


def test_two_ranks_measure_the_network(monkeypatch):
    class Pair(LocalCommunicator):
        size = local_size = 2

    taken = iter([4e-6, 1.0, 3.0])  # an all-reduce of 2 steps; a small and a large collective
    monkeypatch.setattr(Clock, "seconds", lambda clock, function: next(taken))
    found = Clock(Pair(), CPU).network(1e9)
    first, second = measure._MESSAGE_VALUES["cpu"]
    link = found["intra_node"]
    assert link["latency_seconds"] == pytest.approx(2e-6)
    assert link["gigabytes_per_second"] == pytest.approx(2 * 4 * (second - first) / 2 / 2.0 / 1e9)
    assert found["inter_node"]["source"] == "not measured: all ranks were on one host"


@pytest.mark.parametrize("large", [1.0, 0.5, 1.000001])
def test_on_a_busy_machine_no_message_outruns_a_copy_in_memory(large: float, monkeypatch: pytest.MonkeyPatch) -> None:
    class Pair(LocalCommunicator):
        size = local_size = 2

    taken = iter([4e-6, 1.0, large])
    monkeypatch.setattr(Clock, "seconds", lambda clock, function: next(taken))
    found = Clock(Pair(), CPU).network(1e9)
    assert found["intra_node"]["gigabytes_per_second"] == pytest.approx(0.5)


def test_factors_that_took_less_than_the_noise_are_not_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Clock, "slot_seconds", lambda clock, config: (0.01, -0.001))
    profile = measure_profile(configuration(), LocalCommunicator(), CPU)
    assert profile.factors.ratio == profile.training.ratio
    assert "less than the noise" in profile.factors.source
