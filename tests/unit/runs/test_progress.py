"""Progress in a terminal and in a log."""

import io

import pytest

from kfac_dist.errors import InputError
from kfac_dist.runs import progress
from kfac_dist.runs.progress import Progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def manual_time(monkeypatch):
    monkeypatch.delenv(progress.PROGRESS_VARIABLE, raising=False)
    now = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def run_progress(total, now, seconds_per_iteration, stream):
    progress = Progress(total, True, stream)
    for iteration in range(total):
        now[0] += seconds_per_iteration
        progress.update(epoch=iteration / 10, loss=2.0, top1=12.34, images_per_second=4321.0)
    progress.close()
    return stream.getvalue().splitlines()


def test_lines_come_every_five_percent_with_time_left(manual_time):
    lines = run_progress(400, manual_time, 0.1, io.StringIO())
    assert len(lines) == 20
    assert lines[4].split("  ") == [
        " 25 %",
        "iteration 100/400",
        "epoch 9.90",
        "loss 2.0000",
        "top-1 12.3 %",
        "4,321 images/s",
        "elapsed 0:00:10",
        "remaining 0:00:30",
    ]
    assert lines[-1].startswith("100 %")
    assert lines[-1].endswith("remaining 0:00:00")


@pytest.mark.parametrize(("total", "num_lines"), [(1, 1), (3, 3), (20, 20), (21, 20), (1000, 20)])
def test_short_runs_get_a_line_an_iteration_and_long_ones_twenty(manual_time, total, num_lines):
    assert len(run_progress(total, manual_time, 0.01, io.StringIO())) == num_lines


def test_a_slow_run_tells_every_few_seconds_at_first_and_every_minute_later(manual_time):
    lines = run_progress(4000, manual_time, 1.0, io.StringIO())
    told = [int(line.split("iteration ")[1].split("/")[0]) for line in lines]
    gaps = [after - before for before, after in zip([0, *told], told, strict=False)]
    assert told[:10] == [5 * number for number in range(1, 11)]
    assert max(gaps) == 60
    assert all(gap <= max(5, time / 10 + 1) for gap, time in zip(gaps, told, strict=True))
    assert len(lines) < 120


def test_a_line_is_whole_when_it_is_written(manual_time):
    stream = io.StringIO()
    run_progress(3, manual_time, 7.0, stream)
    assert stream.getvalue().endswith("\n")  # Open MPI hands on whole lines only
    assert "\r" not in stream.getvalue()


def test_a_terminal_gets_a_bar(manual_time):
    stream = Terminal()
    progress = Progress(2, True, stream)
    progress.update(epoch=0.5, loss=1.5, top1=40.0, images_per_second=100.0)
    progress.say("evaluated: top-1 99.0 %")
    progress.update(epoch=1.0, loss=1.0, top1=50.0, images_per_second=100.0)
    progress.close()
    assert "2/2" in stream.getvalue()
    assert "loss 1.0000" in stream.getvalue()
    assert "evaluated: top-1 99.0 %\n" in stream.getvalue()


def test_the_environment_overrules_the_guess(manual_time, monkeypatch):
    monkeypatch.setenv(progress.PROGRESS_VARIABLE, "lines")
    assert len(run_progress(20, manual_time, 0.1, Terminal())) == 20
    monkeypatch.setenv(progress.PROGRESS_VARIABLE, "bar")
    assert "20/20" in run_progress(20, manual_time, 0.1, io.StringIO())[-1]
    monkeypatch.setenv(progress.PROGRESS_VARIABLE, "off")
    assert run_progress(20, manual_time, 0.1, Terminal()) == []
    monkeypatch.setenv(progress.PROGRESS_VARIABLE, "loud")
    with pytest.raises(InputError, match=r"KFAC_DIST_PROGRESS must be bar, lines or off, got 'loud'"):
        Progress(1, True)


@pytest.mark.parametrize("stream", [io.StringIO(), Terminal()])
def test_other_ranks_show_nothing(manual_time, stream):
    progress = Progress(1, False, stream)
    progress.update(epoch=1.0, loss=1.0, top1=1.0, images_per_second=1.0)
    progress.say("evaluated")
    progress.close()
    assert stream.getvalue() == ""
