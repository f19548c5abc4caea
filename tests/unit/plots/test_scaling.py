"""Figure 2, and what the scaling sweep runs for it."""

import json
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import numpy as np
import pytest

from kfac_dist import plots
from kfac_dist.config.load import load_config
from kfac_dist.errors import InputError
from tests.paths import QUICKSTART, ROOT


def write_run(folder: Path, num_ranks: int, batch_size: int, seconds: list[float]) -> Path:
    folder.mkdir()
    records = [
        {
            "kind": "train",
            "iteration": iteration,
            "epoch": 1.0,
            "images_per_second": batch_size / each,
            "stage_seconds": {"forward": each / 4, "inverse": each / 2},
        }
        for iteration, each in enumerate(seconds)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (folder / "config.yaml").write_text(f"batch: {{global_size: {batch_size}}}\n")
    (folder / "environment.json").write_text(json.dumps({"num_ranks": num_ranks}))
    return folder


def test_figure2_shows_medians_without_the_first_iterations(tmp_path: Path) -> None:
    four = plots.read_scaling_point(write_run(tmp_path / "4", 4, 128, [9.0, 9.0, *[0.4] * 3, *[0.5] * 3, *[0.8] * 2]))
    one = plots.read_scaling_point(write_run(tmp_path / "1", 1, 32, [9.0, 1.0]))
    assert (four.num_ranks, four.batch_size) == (4, 128)
    np.testing.assert_allclose(four.seconds, (0.4, 0.5, 0.575))
    figure = plots.draw_scaling([four, one], "a title")
    line, bars = figure.get_axes()
    np.testing.assert_allclose(line.get_lines()[0].get_xydata(), [[1, 1.0], [4, 0.5]])
    heights = [bar.get_height() for bar in bars.patches]
    np.testing.assert_allclose(heights, [0.25, 0.125, 0.5, 0.25])  # forward of both, inverse of both


def test_figure2_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "2", 2, 64, [0.5, 0.5])
    assert plots.main(["figure2", str(run), "--output", str(tmp_path / "figure2.png")]) == 0
    (run / "environment.json").unlink()
    assert plots.main(["figure2", str(run), "--output", str(tmp_path / "x.png")]) == 2
    assert "environment.json the ranks" in capsys.readouterr().err


def test_a_run_of_one_iteration_tells_nothing(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="two iterations or more, got 1"):
        plots.read_scaling_point(write_run(tmp_path / "1", 1, 32, [1.0]))


@pytest.mark.parametrize(
    ("overrides", "batch", "limit"),
    [([], 192, 256), (["batch.global_size=384"], 384, 256), (["batch={global_size: 12, per_rank: 4}"], 12, 256)],
)
def test_settings_of_a_point(
    run_python: Callable[..., CompletedProcess[str]], overrides: list[str], batch: int, limit: int
) -> None:
    shown = run_python([ROOT / "benchmarks/scaling.py", "settings", "3", "7", QUICKSTART, *overrides])
    assert shown.returncode == 0, shown.stderr
    config = load_config(str(QUICKSTART), shown.stdout.splitlines())
    assert config.batch.global_size == batch
    assert np.ceil(config.train.epochs * 1438 / batch) == 7
    assert (config.data.eval_limit, config.checkpoint.every_minutes) == (limit, None)


def test_settings_refuse_a_bad_configuration(run_python: Callable[..., CompletedProcess[str]]) -> None:
    shown = run_python([ROOT / "benchmarks/scaling.py", "settings", "3", "7", QUICKSTART, "batch.per_rank=0"])
    assert shown.returncode == 2
    assert "batch.per_rank" in shown.stderr
