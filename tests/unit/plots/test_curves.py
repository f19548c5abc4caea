"""Reading runs and drawing them; the figures are checked by the data in their axes."""

import json
import math

import numpy as np
import pytest

from kfac_dist import plots
from kfac_dist.errors import InputError
from kfac_dist.timing import STAGES

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
CONFIG = "model: {name: resnet20}\ndata: {name: cifar10}\nbatch: {global_size: 512}\n"


def train(iteration, **fields):
    defaults = {
        "loss": 2.0 - iteration,
        "learning_rate": 0.1,
        "stage_seconds": {"forward": 0.5, "backward": 1.0},
    }
    return {"kind": "train", "iteration": iteration, "epoch": (iteration + 1) / 2, **defaults, **fields}


def evaluation(epoch, top1):
    return {
        "kind": "eval",
        "iteration": int(2 * epoch),
        "epoch": epoch,
        "loss": 1.0,
        "top1": top1,
        "top5": 99.0,
    }


def write_run(directory, records, config=CONFIG):
    directory.mkdir()
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (directory / "metrics.jsonl").write_text(lines)
    if config is not None:
        (directory / "config.yaml").write_text(config)
    return directory


@pytest.fixture
def run(tmp_path):
    return write_run(
        tmp_path / "kfac-bs512",
        [train(0), train(1), evaluation(1.0, 40.0), train(2), train(3), evaluation(2.0, 55.5)],
    )


def test_figure_shows_the_recorded_values(run):
    figure = plots.draw_curves([plots.read_run(run, "K-FAC")], "resnet20")
    accuracy, rate, loss, stages = figure.get_axes()
    (line,) = accuracy.get_lines()
    np.testing.assert_array_equal(line.get_xydata(), [[1.0, 40.0], [2.0, 55.5]])
    assert line.get_marker() == "o"
    assert line.get_label() == "K-FAC: 55.5 %"
    (line,) = rate.get_lines()
    np.testing.assert_array_equal(line.get_xydata(), [[0, 1], [0.5, 1], [1, 1], [1.5, 1]])  # where iterations start
    assert line.get_label() == "peak 0.1"
    np.testing.assert_array_equal(loss.get_lines()[0].get_xydata(), [[0.5, 2], [1, 1], [1.5, 0], [2, -1]])
    assert [patch.get_width() for patch in stages.patches] == [0.5, 1.0]
    assert [patch.get_x() for patch in stages.patches] == [0.0, 0.5]  # stacked
    assert "1.50 s" in [text.get_text() for text in stages.texts]
    units = [axes.get_ylabel() for axes in (accuracy, rate, loss)] + [stages.get_xlabel()]
    assert [any(unit in label for unit in ("%", "÷", "nats", "seconds")) for label in units] == [True] * 4


@pytest.mark.parametrize(("last", "scale"), [(0.19, "log"), (0.21, "linear"), ("NaN", "linear"), (0.0, "linear")])
def test_losses_over_more_than_a_decade_are_shown_logarithmically(tmp_path, last, scale):
    run = plots.read_run(write_run(tmp_path / "run", [train(0, loss=2.0), train(1, loss=last)]))
    assert plots.draw_curves([run], "title").get_axes()[2].get_yscale() == scale


def test_short_stages_are_given_in_milliseconds(tmp_path):
    run = plots.read_run(write_run(tmp_path / "run", [train(0, stage_seconds={"forward": 0.002, "backward": 0.0105})]))
    stages = plots.draw_curves([run], "title").get_axes()[3]
    np.testing.assert_allclose([patch.get_width() for patch in stages.patches], [2.0, 10.5])
    assert [text.get_text() for text in stages.texts] == ["2.0", "10.5", "12.5 ms"]
    assert stages.get_xlabel() == "milliseconds per iteration (median)"


def test_a_run_without_stage_seconds_is_drawn(tmp_path):
    run = plots.read_run(write_run(tmp_path / "run", [train(0, stage_seconds={})]))
    stages = plots.draw_curves([run], "title").get_axes()[3]
    assert not stages.patches
    assert stages.get_legend() is None


def test_stage_seconds_is_the_median_for_a_stage_that_always_runs():
    records = [train(i, stage_seconds={"forward": seconds}) for i, seconds in enumerate([1.0, 1.5, 90.0])]
    assert plots.stage_seconds(records) == {**dict.fromkeys(STAGES, 0.0), "forward": 1.5}


def test_stage_seconds_spreads_a_stage_that_runs_now_and_then():
    records = [train(i, stage_seconds={"inverse": 8.0 if i % 4 == 0 else 0.0}) for i in range(8)]
    assert plots.stage_seconds(records)["inverse"] == 2.0


def test_smoothing_keeps_length_level_and_ends():
    np.testing.assert_allclose(plots.smooth(np.full(7, 3.0), 4), np.full(7, 3.0))
    np.testing.assert_allclose(plots.smooth(np.array([0.0, 3.0, 6.0, 9.0]), 3), [1.5, 3.0, 6.0, 7.5])
    np.testing.assert_array_equal(plots.smooth(np.array([5.0, 1.0]), 1), [5.0, 1.0])


def test_values_that_json_lacks_are_read_as_floats():
    values = plots.column([{"loss": 1.5}, {"loss": "NaN"}, {"loss": "Infinity"}, {}], "loss")
    assert values[0] == 1.5
    assert math.isnan(values[1])
    assert values[2] == math.inf
    assert math.isnan(values[3])


def test_title_names_what_all_runs_share(tmp_path, run):
    other = write_run(tmp_path / "sgd", [train(0)], config=CONFIG.replace("512", "1024"))
    without = write_run(tmp_path / "old", [train(0)], config=None)
    assert plots.describe_runs([run]) == "resnet20 on cifar10, batch 512"
    assert plots.describe_runs([run, other]) == "resnet20 on cifar10"
    assert plots.describe_runs([run, without]) == "Training curves"


def test_command_draws_runs_also_diverged_or_unevaluated_or_cut_off(tmp_path, run, capsys):
    diverged = write_run(tmp_path / "sgd", [train(0), train(1, loss="NaN"), train(2, loss="Infinity")])
    with (diverged / "metrics.jsonl").open("a") as stream:
        stream.write('{"kind": "train", "itera')
    output = tmp_path / "figures" / "curves.png"
    assert plots.main(["curves", str(run), str(diverged), "--output", str(output), "--labels", "K-FAC", "SGD"]) == 0
    assert output.read_bytes().startswith(PNG_SIGNATURE)
    assert capsys.readouterr().out == f"{output}\n"


def test_label_is_the_folder_name_unless_given(run):
    assert plots.read_run(run).label == "kfac-bs512"
    assert plots.read_run(run, "mine").label == "mine"


def test_a_run_without_an_iteration_is_refused(tmp_path):
    folder = write_run(tmp_path / "new", [evaluation(1.0, 1.0)])
    with pytest.raises(InputError, match=r"new: no training iteration"):
        plots.read_run(folder)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{tmp}", "--output", "{tmp}/x.png"], "no readable metrics.jsonl"),
        (["{run}", "--output", "{tmp}/x.jpgg"], "--output must end in one of"),
        (["{run}", "--output", "{run}/metrics.jsonl/x.png"], "--output: cannot write"),
        (["{run}", "--output", "{tmp}/x.png", "--labels", "a", "b"], "each of the 1 runs, got 2 labels"),
    ],
)
def test_bad_input_gives_one_line_and_exit_code_2(tmp_path, run, capsys, arguments, message):
    arguments = [argument.format(tmp=tmp_path, run=run) for argument in arguments]
    assert plots.main(["curves", *arguments]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("error: ")
    assert message in printed.err
    assert printed.err.count("\n") == 1
    assert not (tmp_path / "x.png").exists()
