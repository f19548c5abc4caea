"""The section `data`: each data set takes its own keys and refuses the others'."""

from pathlib import Path

import pytest

from kfac_dist.config.data import DataConfig
from kfac_dist.config.load import load_config
from kfac_dist.errors import InputError
from tests.paths import QUICKSTART

IMAGENET = "data={name: imagenet, root: r, preprocessing: random_resized_crop}"
MADE = "{shape: [3, 8, 8], num_classes: 4, num_train: 10, num_eval: 5}"


def test_defaults_of_imagenet() -> None:
    data = load_config(QUICKSTART, ["data={name: imagenet, root: r, mean_image: m}"]).data
    assert (data.loader, data.preprocessing, data.image_size, data.workers, data.on_error) == (
        "torchvision",
        "paper",
        224,
        4,
        "raise",
    )


def test_other_data_sets_have_none_of_them() -> None:
    for override in ("data.name=digits", f"data={{name: synthetic, synthetic: {MADE}}}"):
        data = load_config(QUICKSTART, [override]).data
        own = {"name", "synthetic"}
        assert all(getattr(data, key) is None for key in DataConfig.model_fields if key not in own)


@pytest.mark.parametrize("override", [IMAGENET, f"data={{name: synthetic, synthetic: {MADE}}}"])
def test_the_resolved_configuration_reads_back_as_the_same(override: str, tmp_path: Path) -> None:
    config = load_config(QUICKSTART, [override])
    (tmp_path / "config.yaml").write_text(config.to_yaml(), encoding="utf-8")
    assert load_config(tmp_path / "config.yaml") == config


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (["data.name=imagenet", "data.mean_image=m"], "data.root must name the folder that holds imagenet, got null"),
        (
            ["data={name: imagenet, root: here}"],
            "data.mean_image must name the mean image that data.preprocessing=paper subtracts; make it with: "
            "python -m kfac_dist.data.mean_image here --output FILE, got null",
        ),
        (
            [IMAGENET, "data.mean_image=m"],
            "data.mean_image must be left out: it belongs to data.name=imagenet with data.preprocessing=paper, got 'm'",
        ),
        ([IMAGENET, "data.loader=pil"], "data.loader must be 'dali' or 'torchvision', got 'pil'"),
        ([IMAGENET, "data.image_size=7"], "data.image_size must be >= 8, got 7"),
        ([IMAGENET, "data.workers=0"], "data.workers must be > 0, got 0"),
        (["data.loader=dali"], "data.loader must be left out for digits: it belongs to imagenet, got 'dali'"),
        (["data.on_error=skip"], "data.on_error must be left out for digits: it belongs to imagenet, got 'skip'"),
        (["data.image_size=8"], "data.image_size must be left out for digits: it belongs to imagenet, got 8"),
        (
            [f"data.synthetic={MADE}"],
            "data.synthetic must be left out for digits: it belongs to synthetic, got {'num_classes': 4, ",
        ),
        (
            ["data.name=synthetic"],
            "data.synthetic must be given for data.name synthetic: shape, num_classes, num_train, num_eval, got null",
        ),
        (
            [f"data={{name: synthetic, synthetic: {MADE}}}", "data.train_limit=3"],
            "data.train_limit must be left out for synthetic: data.synthetic.num_train says it, got 3",
        ),
        (
            [f"data={{name: synthetic, synthetic: {MADE}}}", "data.root=r"],
            "data.root must be left out for synthetic, which is made up, got 'r'",
        ),
        (
            [f"data={{name: synthetic, synthetic: {MADE}}}", "data.synthetic.shape=[3, 8]"],
            "data.synthetic.shape[2] is missing from the list",
        ),
        (
            [f"data={{name: synthetic, synthetic: {MADE}}}", "augment.flip=true"],
            "augment must be without pad_crop and flip for synthetic, which is not augmented, got {'flip': True}",
        ),
        (
            [IMAGENET, "augment.pad_crop=4"],
            "augment must be without pad_crop for imagenet: data.preprocessing says how it is cropped, got {'pad_crop'",
        ),
        (["train.label_smoothing=1"], "train.label_smoothing must be < 1, got 1"),
        (["model.variant=v2"], "model.variant must be 'v1' or 'v1.5', got 'v2'"),
    ],
)
def test_one_problem(overrides: list[str], problem: str) -> None:
    with pytest.raises(InputError) as caught:
        load_config(QUICKSTART, overrides)
    lines = str(caught.value).splitlines()
    assert len(lines) == 2, lines
    assert lines[1].strip().startswith(problem)
