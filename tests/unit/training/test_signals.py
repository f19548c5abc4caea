"""Signals that stop a run in order; tests/faults sends them to real runs."""

import signal

import pytest

from kfac_dist.training.signals import StopSignals


@pytest.mark.parametrize("name", ["SIGUSR1", "SIGTERM", "SIGINT", "SIGHUP"])
def test_the_first_signal_is_remembered(name: str) -> None:
    number = signal.Signals[name]
    outer = signal.signal(number, signal.SIG_DFL)  # the tests may run under nohup
    try:
        with StopSignals() as stops:
            assert stops.received == ""
            signal.raise_signal(number)
            assert stops.received == name
        assert signal.getsignal(number) == signal.SIG_DFL
    finally:
        signal.signal(number, outer)


def test_a_run_under_nohup_outlives_its_terminal() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignals() as stops:
            signal.raise_signal(signal.SIGHUP)
            assert stops.received == ""
    finally:
        signal.signal(signal.SIGHUP, before)
