"""`kfac-dist plan`: table, JSON, files, and one line for what the user can fix."""

import json
import re
from pathlib import Path

import pytest

from kfac_dist.commands.plan import main
from kfac_dist.errors import InputError

RECIPE = ["quickstart", "batch={global_size: 64, per_rank: 16}"]


def test_a_table_and_its_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "plan"
    assert main([*RECIPE, "--ranks", "2,1,2", "--profile", "a100", "--output", str(folder)]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("quickstart: digits_cnn on digits, kfac, fp32, 135 iterations\nprofile a100: 8 NVIDIA A100")
    assert (folder / "plan.txt").read_text(encoding="utf-8") == shown
    assert (folder / "plan.png").stat().st_size > 10_000
    record = json.loads((folder / "plan.json").read_text(encoding="utf-8"))
    assert [point["num_ranks"] for point in record["points"]] == [1, 2]
    assert record["profile"]["single"]["teraflops"] == 19.5


def test_json_in_place_of_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*RECIPE, "--ranks", "4", "--grow-batch", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    (point,) = record["points"]
    assert (point["num_ranks"], point["batch"]) == (4, 64)
    assert point["seconds"] == pytest.approx(sum(point["stages"].values()))
    assert record["profile"]["description"].startswith("8 NVIDIA H100"), "without --profile"


@pytest.mark.parametrize("numbers", ["1,2,4", "1 2 4", "1, 2, 4", "1 ,2 , 4", "1,2 4"])
def test_ranks_are_read_with_commas_and_spaces(numbers: str, capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["--ranks", *numbers.split(), *RECIPE], [*RECIPE, "--ranks", *numbers.split(), "--grow-batch"]):
        assert main([*words, "--json"]) == 0, capsys.readouterr().err
        record = json.loads(capsys.readouterr().out)
        assert [point["num_ranks"] for point in record["points"]] == [1, 2, 4]


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    assert "--grow-batch" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            [*RECIPE, "--ranks", "1,zero"],
            "argument --ranks: must be integers from 1 to 65536 between commas or spaces, such as 1,2,4; got 'z",
        ),
        (
            [*RECIPE, "--ranks", "65537", "--grow-batch"],
            "argument --ranks: must be integers from 1 to 65536 between commas or spaces",
        ),
        (
            [*RECIPE, "--ranks", 5000 * "9"],
            "argument --ranks: must be integers from 1 to 65536 between commas or spaces",
        ),
        (
            [*RECIPE, "--ranks", "0"],
            "argument --ranks: must be integers from 1 to 65536 between commas or spaces, such as 1,2,4; got '0'",
        ),
        ([*RECIPE, "--ranks", "3"], "--ranks 3: batch.global_size must be a multiple of batch.per_rank x ranks"),
        ([*RECIPE, "--profile", "b200"], "--profile must be one of a100, h100, h200, v100, or a file that --measure"),
        ([*RECIPE, "--profile", "a100", "--measure", "x.yaml"], "argument --measure: not allowed with argument --prof"),
        (["nosuch"], "nosuch"),
        ([], "the following arguments are required: config"),
        ([*RECIPE, "model.name=resnet19", "--ranks", "1"], "model.name must be a known model, got 'resnet19'"),
        ([*RECIPE, "batch.global_size=0"], "quickstart: 1 problem in this configuration"),
    ],
)
def test_bad_input_is_told_once(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = [word for word in words if not (word.startswith("batch=") and "batch.global_size=0" in words)]
    assert main(words) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert re.match(rf"error: {re.escape(message)}", shown.err), shown.err


def test_output_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    assert main([*RECIPE, "--ranks", "1", "--output", str(tmp_path / "file")]) == 2
    assert "error: --output: cannot write" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["file/here.yaml", "folder"])
def test_a_profile_that_cannot_be_written_is_refused_before_measuring(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("kfac_dist.planning.measure.measure_profile", lambda *_: pytest.fail("measured"))
    (tmp_path / "file").write_text("", encoding="utf-8")
    (tmp_path / "folder").mkdir()
    assert main([*RECIPE, "--measure", str(tmp_path / name)]) == 2
    assert f"error: --measure: cannot write {tmp_path / name} (" in capsys.readouterr().err


def test_looking_whether_a_profile_can_be_written_leaves_everything_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise InputError("nothing measured")

    monkeypatch.setattr("kfac_dist.planning.measure.measure_profile", fail)
    old, new = tmp_path / "old.yaml", tmp_path / "new.yaml"
    old.write_text("kept", encoding="utf-8")
    for path in (old, new):
        with pytest.raises(InputError, match="nothing measured"):
            main([*RECIPE, "--measure", str(path)])
    assert old.read_text(encoding="utf-8") == "kept"
    assert not new.exists()


def test_wrong_ranks_are_refused_before_measuring(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def measure(*arguments: object) -> None:
        raise AssertionError("measured, which takes half a minute")

    monkeypatch.setattr("kfac_dist.planning.measure.measure_profile", measure)
    assert main([*RECIPE, "--measure", str(tmp_path / "here.yaml"), "--ranks", "3"]) == 2
    assert "--ranks 3: batch.global_size must be a multiple of batch.per_rank x ranks" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
