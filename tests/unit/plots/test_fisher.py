"""Figures 5 and 6, checked by the data in their axes."""

import json

import numpy as np
import pytest

from kfac_dist import plots
from kfac_dist.errors import InputError
from kfac_dist.plots.accuracy import fisher_label
from kfac_dist.plots.command import main


def diff(iteration, layer, matrix, value):
    return {"kind": "fisher", "iteration": iteration, "layer": layer, "matrix": matrix, "diff": value}


def write_run(directory, records, config=""):
    directory.mkdir()
    (directory / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (directory / "config.yaml").write_text(config)
    return directory


def test_percentiles_are_over_layers_at_each_refresh():
    records = [diff(1, f"layer{number}", "A", float(number)) for number in range(101)]
    records += [diff(7, "layer0", "A", 3.0), diff(7, "layer0", "G", 9.0)]
    spectrum = {"kind": "fisher", "iteration": 9, "layer": "layer0", "matrix": "A", "effective_rank": 2.0}
    iterations, percentiles = plots.diff_percentiles([*records, spectrum], "A")
    assert iterations.tolist() == [1, 7]
    np.testing.assert_allclose(percentiles, [[5, 25, 50, 75, 95], [3, 3, 3, 3, 3]])


def test_figure_5_has_a_panel_for_each_kind_and_marks_iteration_500(tmp_path):
    records = [diff(i, layer, m, 0.1 + i / 1000) for i in (1, 400, 600) for layer in "ab" for m in "AG"]
    figure = plots.draw_fisher_change(write_run(tmp_path / "run", records))
    panels = figure.get_axes()
    assert [panel.get_title() for panel in panels] == ["input factors A", "output factors G"]
    median, mark = panels[0].get_lines()
    np.testing.assert_allclose(median.get_xydata(), [[1, 0.101], [400, 0.5], [600, 0.7]])
    assert list(mark.get_xdata()) == [500, 500]


def test_a_run_without_diff_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"no Diff is recorded; train with kfac\.monitor\.diff=true"):
        plots.draw_fisher_change(write_run(tmp_path / "run", []))


@pytest.mark.parametrize(
    ("config", "label"),
    [
        ("kfac: {batchnorm: full, refresh: {schedule: every, interval: 5}}", "full, every 5"),
        ("kfac: {batchnorm: diagonal, refresh: {schedule: eq21, after_iteration: 500}}", "diagonal, eq21"),
        ("kfac: null", None),
    ],
)
def test_figure_6_names_runs_by_their_fisher(tmp_path, config, label):
    assert fisher_label(write_run(tmp_path / "run", [], config)) == label


def test_commands_write_images(tmp_path, capsys):
    train = {"kind": "train", "iteration": 0, "epoch": 1.0, "loss": 1.0, "learning_rate": 0.1, "stage_seconds": {}}
    evaluation = {"kind": "eval", "iteration": 0, "epoch": 1.0, "loss": 1.0, "top1": 50.0, "top5": 90.0}
    run = write_run(tmp_path / "run", [train, evaluation, diff(0, "a", "F", 0.5), diff(1, "a", "F", 0.25)])
    for command in ("figure5", "figure6"):
        output = tmp_path / f"{command}.png"
        assert main([command, str(run), "--output", str(output)]) == 0
        assert output.read_bytes().startswith(b"\x89PNG")
    assert main(["figure5", str(tmp_path), "--output", str(tmp_path / "x.png")]) == 2
    assert "metrics.jsonl" in capsys.readouterr().err
