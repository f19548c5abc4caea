"""What a user types before training: --help, --print-config, --explain."""

import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml

from kfac_dist.commands import table
from kfac_dist.commands.train import main
from kfac_dist.config.load import load_config
from kfac_dist.training.command_line import Parse, parse_evaluate, parse_explain, parse_train
from tests.paths import CONFIGS, ROOT
from tests.system.conftest import Outcome

QUICKSTART = ROOT / "configs" / "quickstart.yaml"
LAYERS = ("0", "1", "4", "5", "9")  # of digits_cnn: convolution, BatchNorm, convolution, BatchNorm, linear

Command = Callable[..., Any]
Kfac = Callable[..., Outcome]


def test_help(command: Command) -> None:
    finished = command("--help")
    assert finished.code == 0
    for word in ("CONFIG.yaml", "--print-config", "--explain", "--ranks", "dotted.key=value"):
        assert word in finished.out


def test_print_config_shows_the_resolved_whole(command: Command, tmp_path: Path) -> None:
    finished = command(QUICKSTART, "--print-config", "optimizer.momentum=0.8")
    assert finished.code == 0
    settings = yaml.safe_load(finished.out)
    assert settings["optimizer"]["momentum"] == 0.8
    assert settings["run"]["output_dir"] == "runs"  # a default
    path = tmp_path / "resolved.yaml"
    path.write_text(finished.out, encoding="utf-8")
    assert load_config(path) == load_config(QUICKSTART, ["optimizer.momentum=0.8"])


@pytest.mark.parametrize(
    "order",
    [
        ["--print-config", "CONFIG", "train.epochs=3", "batch.per_rank=32"],
        ["CONFIG", "--print-config", "train.epochs=3", "batch.per_rank=32"],
        ["CONFIG", "train.epochs=3", "--print-config", "batch.per_rank=32"],
        ["CONFIG", "train.epochs=3", "batch.per_rank=32", "--print-config"],
    ],
)
def test_options_stand_anywhere(order: list[str], command: Command) -> None:
    finished = command(*(QUICKSTART if word == "CONFIG" else word for word in order))
    assert finished.code == 0, finished.err
    settings = yaml.safe_load(finished.out)
    assert (settings["train"]["epochs"], settings["batch"]["per_rank"]) == (3, 32)


def owner_column(text: str) -> dict[str, list[int]]:
    """Owners by layer, from the table of --explain."""
    lines = text.splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("layer "))
    end = lines.index("", start)
    return {line.split()[0]: [int(rank) for rank in line.split()[-1].split(",")] for line in lines[start + 1 : end]}


def num_bytes(text: str, stage: str) -> int:
    found = re.search(rf"\({stage}\): [\d.]+ MiB \(([\d,]+) bytes\)", text)
    assert found, text
    return int(found[1].replace(",", ""))


def test_explain_tells_how_many_samples_make_a_and_g(command: Command) -> None:
    finished = command(QUICKSTART, "--explain", "kfac.sample_fraction=0.3")
    assert finished.code == 0, finished.err
    assert "A and G from the first 20 of the 64 images of each slot" in finished.out.splitlines()
    assert "A and G from" not in command(QUICKSTART, "--explain").out


def test_explain_on_3_ranks(command: Command, tmp_path: Path) -> None:
    output_dir = tmp_path / "runs"
    finished = command(QUICKSTART, "--explain", "--ranks", "3", "batch.global_size=192", f"run.output_dir={output_dir}")
    assert finished.code == 0, finished.err
    assert "3 ranks" in finished.out
    assert "1 slot of 64 a rank" in finished.out
    owners = owner_column(finished.out)
    assert tuple(owners) == LAYERS
    assert all(len(ranks) == 1 for ranks in owners.values())
    assert {rank for ranks in owners.values() for rank in ranks} == {0, 1, 2}
    assert "A 144, G 32" in finished.out  # the second convolution
    assert "A 129, G 10" in finished.out
    assert "every trained parameter is covered" in finished.out
    # Iterations 0, 22 and 44 of ceil(6 x 1438 / 192) = 45: learning rate 0.03 (1 - e / 6)^2, momentum in ratio.
    table = finished.out[finished.out.index("iteration ") :].splitlines()[1:4]
    rows = [line.split() for line in table]
    assert [row[0] for row in rows] == ["0", "22", "44"]
    for row in rows:
        epoch = int(row[0]) * 192 / 1438
        learning_rate = 0.03 * (1 - epoch / 6) ** 2
        assert float(row[1]) == pytest.approx(epoch, abs=0.006)
        assert float(row[2]) == pytest.approx(learning_rate, rel=1e-3)
        assert float(row[3]) == pytest.approx(0.9 * learning_rate / 0.03, rel=1e-3)
    assert float(rows[0][4]) == 0.025
    assert not output_dir.exists()


def test_explain_on_more_ranks_than_layers(command: Command) -> None:
    finished = command(QUICKSTART, "--explain", "--ranks=64", "batch.global_size=4096")
    assert finished.code == 0, finished.err
    owners = owner_column(finished.out)
    assert tuple(owners) == LAYERS
    owning = sorted(rank for ranks in owners.values() for rank in ranks)
    assert len(LAYERS) < len(owning) < 64  # copies of the large layers would add too much to what travels
    assert owning == list(range(len(owning)))
    assert f"{64 - len(owning)} of 64 ranks own no layer" in finished.out
    assert len(owners["4"]) == 1  # the largest layer: one copy alone is more than a quarter of everything


def test_explain_names_what_is_not_covered_and_why(command: Command) -> None:
    finished = command(QUICKSTART, "--explain", 'kfac.skip=["1", "9"]')
    uncovered = finished.out.partition("not covered, plain gradient:\n")[2].split("\n\n")[0].splitlines()
    assert uncovered == ["  1: skipped by pattern", "  9: skipped by pattern"]


@pytest.mark.parametrize(
    "overrides", [[], ["train.precision=fp64"], ["kfac.batchnorm=full", "kfac.refresh={schedule: every, interval: 2}"]]
)
def test_explained_bytes_are_those_of_a_run(overrides: list[str], command: Command, tmp_path: Path) -> None:
    settings = [*overrides, "train.epochs=0.15", f"run.output_dir={tmp_path}"]  # two iterations
    explained = command(QUICKSTART, "--explain", *settings).out
    assert command(QUICKSTART, *settings).code == 0
    lines = (tmp_path / "quickstart" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    first, second = [record for record in map(json.loads, lines) if record["kind"] == "train"]
    expected = num_bytes(explained, "ReduceScatterV") + num_bytes(explained, "AllGatherV")
    assert first["communication_bytes"] == expected
    stale = re.search(r"with a refresh, [\d.]+ MiB \(([\d,]+) bytes\) without", explained)
    assert stale
    if "interval: 2" in " ".join(overrides):
        expected = int(stale[1].replace(",", "")) + num_bytes(explained, "AllGatherV")
    assert second["communication_bytes"] == expected


@pytest.mark.parametrize(
    "path", sorted(set(CONFIGS.rglob("*.yaml")) - set(CONFIGS.glob("study/*"))), ids=lambda path: path.stem
)
def test_every_recipe_is_explained(path: Path, command: Command) -> None:
    """The configurations that come with the project are valid, and their models and schedules exist."""
    settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    overrides = [] if settings["data"]["name"] == "digits" else ["data.root=/nonexistent"]
    finished = command(path, "--explain", *overrides)
    assert finished.code == 0, finished.err
    assert settings["model"]["name"] in finished.out


def test_an_explained_number_of_ranks_that_does_not_fit_names_one_that_does(command: Command) -> None:
    recipe = ROOT / "configs/cifar10/kfac_resnet20.yaml"
    refused = command(recipe, "--explain", "--ranks", "64")
    assert refused.code == 2
    (ranks,) = re.findall(r"numbers of ranks that work with 512: (\d+)", refused.err)
    assert command(recipe, "--explain", "--ranks", ranks).code == 0


def test_the_commands_of_kfac_dist_are_those_of_train_py(command: Command, tmp_path: Path, run: Kfac) -> None:
    expected = command(QUICKSTART, "--explain", "--ranks", "2", "batch.per_rank=32")
    assert run(parse_explain, "--ranks", "2", QUICKSTART, "batch.per_rank=32") == expected
    folder = tmp_path / "runs"
    trained = command(QUICKSTART, "train.epochs=1", f"run.output_dir={folder}")
    (top1,) = re.findall(r"test accuracy ([\d.]+) %", trained.out)
    (checkpoint,) = (folder / "quickstart/checkpoints").iterdir()
    for place in (folder / "quickstart", checkpoint):
        evaluated = run(parse_evaluate, place)
        assert evaluated.code == 0, evaluated.err
        assert f"top-1 {top1} %" in evaluated.out


@pytest.mark.parametrize(
    ("parse", "words", "said"),
    [
        (parse_explain, [], "the following arguments are required: config"),
        (parse_explain, ["quickstart", "--ranks", "0"], "argument --ranks: must be >= 1, got 0"),
        (parse_explain, ["quickstart", "--resume", "auto"], "unrecognized arguments: --resume"),
        (parse_evaluate, [], "the following arguments are required: RUN"),
        (
            parse_evaluate,
            ["/nonexistent"],
            "RUN must be a run's folder, which holds config.yaml, or a checkpoint in one",
        ),
    ],
)
def test_what_they_refuse(parse: Parse, words: list[str], said: str, run: Kfac) -> None:
    refused = run(parse, *words)
    assert (refused.code, said in refused.err) == (2, True), refused.err
    assert "usage: kfac-dist" in refused.err or "RUN must" in said


@pytest.mark.parametrize(
    ("parse", "usage"),
    [
        (parse_explain, "usage: kfac-dist explain [--ranks P] CONFIG.yaml"),
        (parse_evaluate, "usage: kfac-dist evaluate RUN"),
        (partial(parse_train, program="kfac-dist train"), "usage: kfac-dist train [options] CONFIG.yaml"),
    ],
)
def test_their_help(parse: Parse, usage: str, run: Kfac) -> None:
    shown = run(parse, "--help")
    assert (shown.code, shown.out.startswith(usage)) == (0, True), shown.out


@pytest.fixture
def run(command: Command, capsys: pytest.CaptureFixture[str]) -> Kfac:
    """``run(parse, *words)`` does what the command of `kfac-dist` does that reads its words with `parse`."""

    def run_words(parse: Parse, *words: str | Path) -> Outcome:
        code = main([str(word) for word in words], parse)
        captured = capsys.readouterr()
        return Outcome(code, captured.out, captured.err)

    return run_words


@pytest.mark.parametrize("name", [name for name in table.COMMANDS if name not in ("train", "evaluate", "explain")])
def test_usage_names_the_command(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        table.main([name, "--help"])
    assert end.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: kfac-dist {name} ")


@pytest.mark.parametrize(
    ("word", "meant"), [("--evalute=x", "--evaluate"), ("--rsume", "--resume"), ("--print_config", "--print-config")]
)
def test_a_mistyped_option(word: str, meant: str, command: Command) -> None:
    finished = command(QUICKSTART, word)
    assert finished.code == 2
    assert finished.err.startswith(f"error: unrecognized arguments: {word}; did you mean {meant}?\nusage: ")
    assert "did you mean" not in command(QUICKSTART, "--qqq").err


@pytest.mark.parametrize("option", ["--resume", "--evaluate"])
def test_an_empty_path_is_not_a_new_run(option: str, command: Command) -> None:
    finished = command(QUICKSTART, option, "")
    assert finished.code == 2
    assert finished.err.startswith(f"error: argument {option}: must not be empty\nusage: ")


def test_one_rank_is_one(command: Command) -> None:
    assert "on digits with kfac, 1 rank\n" in command(QUICKSTART, "--explain", "--ranks", "1").out
    assert "on digits with kfac, 2 ranks\n" in command(QUICKSTART, "--explain", "--ranks", "2").out
