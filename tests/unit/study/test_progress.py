"""How far a study is, on the screen."""

import pytest

from kfac_dist.study.launch import StudyProgress


def test_trials_that_are_taken_back_end_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("KFAC_DIST_PROGRESS", "lines")
    progress = StudyProgress(total=20, done=10)
    for done in (5, 10):  # `retry` while the study runs
        progress.show(done)
    assert capsys.readouterr().err.startswith("10 of 20 trials, ")
