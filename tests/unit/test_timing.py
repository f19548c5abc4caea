"""Stage seconds, against a clock that the test moves by hand."""

import time

import pytest
import torch

from kfac_dist import timing
from kfac_dist.timing import STAGES, StageTimer


class ManualClock:
    def __init__(self) -> None:
        self.now = 100.0

    def mark(self) -> float:
        return self.now

    def seconds(self, start: float, end: float) -> float:
        return end - start


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


def test_stage_names_are_those_of_algorithm_1_and_data():
    assert STAGES == (
        "data",
        "forward",
        "backward",
        "reduce_scatter",
        "inverse",
        "precondition",
        "all_gather",
        "update",
    )


def test_repeated_stages_accumulate_and_gaps_belong_to_nobody(clock):
    timer = StageTimer(clock)
    for _ in range(3):
        clock.now += 50  # between stages
        with timer.stage("forward"):
            clock.now += 2
        with timer.stage("backward"):
            clock.now += 3
    assert timer.lap() == {**dict.fromkeys(STAGES, 0.0), "forward": 6.0, "backward": 9.0}


def test_inner_stage_is_subtracted_from_the_outer_one(clock):
    timer = StageTimer(clock)
    with timer.stage("backward"):
        clock.now += 1
        with timer.stage("reduce_scatter"):
            clock.now += 10
            with timer.stage("backward"):  # a name may appear again further in
                clock.now += 100
            clock.now += 20
        clock.now += 4
    seconds = timer.lap()
    assert seconds["backward"] == 105.0
    assert seconds["reduce_scatter"] == 30.0
    assert sum(seconds.values()) == 135.0  # the wall time


def test_take_resets_and_splits_an_open_stage(clock):
    timer = StageTimer(clock)
    with timer.stage("update"):
        clock.now += 1
        assert timer.lap()["update"] == 1.0
        clock.now += 5
    assert timer.lap()["update"] == 5.0
    assert sum(timer.lap().values()) == 0.0


def test_a_stage_that_raises_is_charged_and_closed(clock):
    timer = StageTimer(clock)

    def fail_in_stage():
        with timer.stage("inverse"):
            clock.now += 7
            raise RuntimeError("singular")

    with timer.stage("update"):
        with pytest.raises(RuntimeError, match="singular"):
            fail_in_stage()
        clock.now += 2
    seconds = timer.lap()
    assert (seconds["inverse"], seconds["update"]) == (7.0, 2.0)


def test_unknown_stage_is_refused_by_name(clock):
    timer = StageTimer(clock)
    with pytest.raises(ValueError, match=r"unknown stage 'invert'.*inverse"), timer.stage("invert"):
        pass


def test_default_clock_measures_real_seconds():
    timer = StageTimer()
    with timer.stage("data"):
        time.sleep(0.02)
    assert 0.019 <= timer.lap()["data"] < 5.0


def test_marks_are_compared_only_when_the_seconds_are_read():
    class LateClock(ManualClock):
        num_compared = 0

        def seconds(self, start: float, end: float) -> float:
            self.num_compared += 1
            return super().seconds(start, end)

    clock = LateClock()
    timer = StageTimer(clock)
    with timer.stage("forward"):
        clock.now += 2
    first = timer.snapshot()
    with timer.stage("forward"):
        clock.now += 7
    assert clock.num_compared == 0
    assert first.read()["forward"] == 2.0
    assert timer.lap()["forward"] == 7.0


def test_a_gpus_marks_stand_in_its_own_stream(monkeypatch):
    """Defect: they stood in that of torch's current device, and so measured another GPU."""
    recorded = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self, stream="of the current device"):
            recorded.append(stream)

    monkeypatch.setattr(timing.torch.cuda, "Event", Event)
    monkeypatch.setattr(timing.torch.cuda, "current_stream", lambda device=None: f"of {device}")
    with StageTimer.on(torch.device("cuda", 1)).stage("forward"):
        pass
    assert recorded == ["of cuda:1"] * 2


@pytest.mark.gpu
def test_on_a_gpu_a_stage_lasts_as_long_as_its_kernels():
    timer = StageTimer.on(torch.device("cuda"))
    with timer.stage("forward"):
        torch.cuda._sleep(200_000_000)  # about a tenth of a second of GPU cycles; the host returns at once
    with timer.stage("backward"):
        pass
    seconds = timer.lap()
    assert seconds["forward"] > 0.02
    assert seconds["backward"] < 0.01
