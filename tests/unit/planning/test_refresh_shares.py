"""What share of a run's iterations refreshes what, by hand."""

import pytest
from torch import nn

from kfac_dist.curvature.blocks.create import create_blocks
from kfac_dist.curvature.inversion import MIN_INTERVAL_FOR_INVERSE
from kfac_dist.curvature.refresh_schedule import AdaptiveRefresh, IntervalRefresh, eq21_interval
from kfac_dist.planning.refresh_shares import refresh_shares
from kfac_dist.planning.work import Refresh

NET = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
BLOCKS = create_blocks(NET, list(NET.parameters()), "diagonal")
ALL = ("A", "G", "F")


def every(interval):
    return dict.fromkeys(ALL, interval)


def test_every_tenth_iteration_refreshes_and_inverts():
    shares = refresh_shares(IntervalRefresh(lambda iteration: 10), BLOCKS, 100)
    assert shares == {Refresh.of(ALL, every(10)): 0.1, Refresh.of((), every(10)): 0.9}


def test_a_last_interval_that_the_run_cuts_short():
    shares = refresh_shares(IntervalRefresh(lambda iteration: 5), BLOCKS, 12)
    assert shares == {
        Refresh.of(ALL, every(5)): pytest.approx(3 / 12),
        Refresh.of((), every(5)): pytest.approx(9 / 12),
    }


def test_a_multiplier_is_of_its_matrix_alone():
    shares = refresh_shares(IntervalRefresh(lambda iteration: 2, {"A": 2}), BLOCKS, 8)
    served = {"A": 4, "G": 2, "F": 2}
    assert shares == {
        Refresh.of(ALL, served): 0.25,
        Refresh.of(("G", "F"), served): 0.25,
        Refresh.of((), served): 0.5,
    }


def test_eq21_over_a_run():
    # 20 epochs of 10 iterations: 130 with a refresh each; then, from the last of these, every 20th and inverses
    shares = refresh_shares(IntervalRefresh(lambda iteration: eq21_interval(iteration / 10)), BLOCKS, 200)
    assert shares[Refresh.of(ALL, every(1))] == pytest.approx(130 / 200)
    assert shares[Refresh.of(ALL, every(20))] == pytest.approx(3 / 200)
    assert sum(shares.values()) == pytest.approx(1.0)


def test_an_adaptive_schedule_grows_as_fast_as_it_can():
    shares = refresh_shares(AdaptiveRefresh(0.1, max_interval=20), BLOCKS, 400)
    refreshed = sum(share for refresh, share in shares.items() if refresh.due)
    assert sum(shares.values()) == pytest.approx(1.0)
    assert 1 / 20 < refreshed < 1 / 10
    assert all(refresh.interval(matrix) == MIN_INTERVAL_FOR_INVERSE for refresh in shares for matrix in ALL)
    early = refresh_shares(AdaptiveRefresh(0.1, max_interval=20, after_iteration=400), BLOCKS, 400)
    assert early == {Refresh.of(ALL, every(1)): 1.0}
