"""What comes out of a run can be evaluated, loaded elsewhere, and trained on."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from safetensors.torch import load_file, save_file

from kfac_dist.config.load import load_config
from kfac_dist.errors import InputError
from kfac_dist.models import create_model
from kfac_dist.training.pretrained import load_pretrained
from tests.paths import QUICKSTART

Command = Callable[..., Any]
RESNET18 = (
    "data={name: synthetic, synthetic: {shape: [3, 32, 32], num_classes: 4, num_train: 16, num_eval: 8}}",
    "model.name=resnet18",
    "batch={global_size: 8, per_rank: 8}",
    "train.epochs=1",
    "optimizer.name=sgd",
    "kfac=null",
)


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KFAC_DIST_PROGRESS", "off")


def weights_of(run: Path) -> Path:
    return max((run / "checkpoints").glob("iteration-*")) / "model.safetensors"


def test_evaluate_says_what_the_run_said(command: Command, tmp_path: Path) -> None:
    place = f"run.output_dir={tmp_path}"
    trained = command(QUICKSTART, "train.epochs=1", place)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    top1 = re.search(r"test accuracy (\d+\.\d+) %", trained.out)
    assert top1 is not None
    checkpoint = weights_of(tmp_path / "quickstart").parent
    for wanted in (tmp_path / "quickstart", checkpoint):
        shown = command(QUICKSTART, place, "--evaluate", wanted)
        assert shown.code == 0
        assert f"{checkpoint}: top-1 {top1[1]} %, top-5 " in shown.out
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--evaluate", "{tmp}/nowhere"], "--evaluate must be the folder of a run or of a checkpoint, got"),
        (["--evaluate", "{tmp}"], "has no checkpoint that is whole"),
        (["--evaluate", "{tmp}", "--resume", "auto"], "not allowed with argument --resume"),
        (["model.pretrained={tmp}/nothing"], "model.pretrained must be a safetensors file, got"),
    ],
)
def test_what_cannot_be_used(command: Command, tmp_path: Path, arguments: list[str], problem: str) -> None:
    refused = command(QUICKSTART, f"run.output_dir={tmp_path}", *[text.format(tmp=tmp_path) for text in arguments])
    assert refused.code == 2
    assert problem in refused.err


def test_another_network_is_refused(command: Command, tmp_path: Path) -> None:
    place = f"run.output_dir={tmp_path}"
    assert command(QUICKSTART, "train.epochs=0.1", place).code == 0
    refused = command(QUICKSTART, "model.name=resnet20", place, "--evaluate", tmp_path / "quickstart")
    assert refused.code == 2
    assert "the checkpoint is of another network" in refused.err


def test_weights_go_into_torchvisions_class_and_back(command: Command, tmp_path: Path) -> None:
    trained = command(QUICKSTART, *RESNET18, f"run.output_dir={tmp_path}")
    assert trained.code == 0, trained.err
    path = weights_of(tmp_path / "quickstart")
    theirs = torchvision.models.resnet18(num_classes=4)
    theirs.load_state_dict(load_file(path))  # strict: every name and shape

    torchvisions = tmp_path / "torchvision.safetensors"
    save_file(theirs.state_dict(), torchvisions)
    ours = create_model("resnet18", 4, (3, 32, 32), seed=5)
    load_pretrained(ours, str(torchvisions))
    for name, value in ours.state_dict().items():
        assert torch.equal(value, theirs.state_dict()[name]), name


def test_a_head_of_another_shape_begins_anew(
    command: Command, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_file(torchvision.models.resnet18(num_classes=7).state_dict(), tmp_path / "seven.safetensors")
    caplog.set_level("INFO")
    tuned = command(
        QUICKSTART, *RESNET18, f"model.pretrained={tmp_path}/seven.safetensors", f"run.output_dir={tmp_path}"
    )
    assert tuned.code == 0, tuned.err
    assert "seven.safetensors: its fc.bias and fc.weight is of another shape and begins anew" in caplog.text
    assert load_file(weights_of(tmp_path / "quickstart"))["fc.weight"].shape == (4, 512)


def test_pretrained_weights_are_what_training_begins_with(tmp_path: Path) -> None:
    model, other = (create_model("digits_cnn", 10, (1, 8, 8), seed) for seed in (0, 1))
    save_file(other.state_dict(), tmp_path / "weights.safetensors")
    load_pretrained(model, str(tmp_path / "weights.safetensors"))
    for name, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda state: state.pop("0.weight"), "0.weight is missing"),
        (lambda state: state.update({"x": torch.zeros(1)}), "x is unknown to the model"),
        (
            lambda state: state.update({"0.weight": torch.zeros(3)}),
            r"0.weight has the shape \[3\], the model's \[16, 1",
        ),
        (lambda state: state.pop("9.weight"), "9.weight is missing"),
    ],
)
def test_anything_but_the_head_must_fit(change: Callable[[Any], object], problem: str, tmp_path: Path) -> None:
    state = create_model("digits_cnn", 10, (1, 8, 8), 1).state_dict()
    change(state)
    save_file(state, tmp_path / "weights.safetensors")
    model = create_model("digits_cnn", 10, (1, 8, 8), 0)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(InputError, match=f"must hold the weights of this model.name: {problem}"):
        load_pretrained(model, str(tmp_path / "weights.safetensors"))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("content", [b"", b"\x80\x04K\x01.", b"\xff" * 64])
def test_a_file_that_is_none_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    path.write_bytes(content)
    with pytest.raises(InputError, match="is not a readable safetensors file"):
        load_pretrained(create_model("digits_cnn", 10, (1, 8, 8), 0), str(path))


def test_a_run_goes_on_without_the_file_it_began_with(tmp_path: Path) -> None:
    """The key may change on --resume; see `MAY_CHANGE`."""
    from kfac_dist.config.load import check_resumable

    saved = load_config(QUICKSTART, [f"model.pretrained={tmp_path}/gone"]).to_yaml()
    check_resumable(saved, load_config(QUICKSTART))
