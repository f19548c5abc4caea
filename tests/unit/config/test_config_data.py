"""The section `data`: each data set takes its own keys and refuses the others'."""

from pathlib import Path

import pytest

from kfac_dist.config.load import load_config
from kfac_dist.errors import InputError
from tests.paths import CONFIGS, QUICKSTART

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


@pytest.mark.parametrize(
    ("override", "keys"),
    [
        ("data={name: digits}", {"name", "train_limit", "eval_limit"}),
        ("data={name: cifar10, root: r}", {"name", "root", "train_limit", "eval_limit", "downsample"}),
        ("data={name: svhn, root: r}", {"name", "root", "train_limit", "eval_limit", "downsample"}),
        (f"data={{name: synthetic, synthetic: {MADE}}}", {"name", "synthetic"}),
    ],
)
def test_other_data_sets_have_their_own_keys_only(override: str, keys: set[str]) -> None:
    assert set(load_config(QUICKSTART, [override]).data.model_dump()) == keys


def test_a_null_leaves_out_what_belongs_to_another_data_set() -> None:
    cifar = CONFIGS / "cifar10" / "kfac_resnet20.yaml"
    made = ["data.name=synthetic", f"data.synthetic={MADE}", "augment={}"]
    with pytest.raises(InputError, match=r"data\.root must be left out"):
        load_config(cifar, made)
    data = load_config(cifar, [*made, "data.root=null"]).data
    assert data.name == "synthetic"
    # as a run's config.yaml had it when all data sets shared their keys
    nulls = "root: null, synthetic: null, loader: null, mean_image: null, workers: null"
    assert load_config(QUICKSTART, [f"data={{name: digits, {nulls}}}"]) == load_config(QUICKSTART)
    with pytest.raises(InputError, match=r"data\.rot is not a known key; did you mean data\.root"):
        load_config(cifar, ["data.rot=null"])


@pytest.mark.parametrize("override", [IMAGENET, f"data={{name: synthetic, synthetic: {MADE}}}"])
def test_the_resolved_configuration_reads_back_as_the_same(override: str, tmp_path: Path) -> None:
    config = load_config(QUICKSTART, [override])
    (tmp_path / "config.yaml").write_text(config.to_yaml(), encoding="utf-8")
    assert load_config(tmp_path / "config.yaml") == config


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (["data.name=cifar10"], "data.root must name the folder that holds cifar10 (cifar-10-batches-py), got null"),
        (
            ["data.name=imagenet", "data.mean_image=m"],
            "data.root must name the folder that holds imagenet (train/<class>/*, val/<class>/*), got null",
        ),
        (["data.name=cifar11"], "data.name must be one of 'digits', 'cifar10', 'svhn', 'imagenet', 'synthetic', got"),
        (
            ["data={name: cifar10, root: r, downsample: 3}"],
            "data.downsample must divide 32, the side of an image, got 3",
        ),
        (["data={}"], "data.name is required; it has no default"),
        (["data.name=null"], "data.name must be one of 'digits', 'cifar10', 'svhn', 'imagenet', 'synthetic', got"),
        (["data=3"], "data must be a section, got 3"),
        ([IMAGENET, "data.rot=r"], "data.rot is not a known key; did you mean data.root?"),
        (["data.shape=[1, 8, 8]"], "data.shape is not a known key; did you mean data.synthetic.shape?"),
        (["data.xyz=1"], "data.xyz is not a known key; known keys of data: name, train_limit, eval_limit"),
        (
            ["data.root=~nobody-of-this-name", "data.name=svhn"],
            "data.root must not start with the home folder of a user whom this machine does not know, got",
        ),
        (
            ["data={name: imagenet, root: here}"],
            "data.mean_image must name the mean image that data.preprocessing=paper subtracts; make it with: "
            "python -m kfac_dist.data.mean_image here --output FILE, got null",
        ),
        (
            ["data={name: imagenet, root: here, image_size: 64}"],
            "data.mean_image must name the mean image that data.preprocessing=paper subtracts; make it with: "
            "python -m kfac_dist.data.mean_image here --output FILE --image-size 64, got null",
        ),
        (
            [IMAGENET, "data.mean_image=m"],
            "data.mean_image must be left out: it belongs to data.name=imagenet with data.preprocessing=paper, got 'm'",
        ),
        ([IMAGENET, "data.loader=pil"], "data.loader must be 'dali' or 'torchvision', got 'pil'"),
        ([IMAGENET, "data.image_size=7"], "data.image_size must be >= 8, got 7"),
        ([IMAGENET, "data.workers=0"], "data.workers must be > 0, got 0"),
        *(
            (
                [f"data.{key}={value}"],
                f"data.{key} must be left out (data.{key}=null) when data.name is digits: it belongs to {owner}, got ",
            )
            for key, value, owner in (
                ("loader", "dali", "imagenet"),
                ("on_error", "skip", "imagenet"),
                ("image_size", "8", "imagenet"),
                ("mean_image", "m", "imagenet"),
                ("synthetic", MADE, "synthetic"),
            )
        ),
        (
            ["data.name=synthetic"],
            "data.synthetic must be given for data.name synthetic: shape, num_classes, num_train, num_eval, got null",
        ),
        (
            [f"data={{name: synthetic, synthetic: {MADE}}}", "data.train_limit=3"],
            "data.train_limit must be left out (data.train_limit=null) when data.name is synthetic:"
            " data.synthetic.num_train says it, got 3",
        ),
        (
            [f"data={{name: synthetic, synthetic: {MADE}}}", "data.root=r"],
            "data.root must be left out (data.root=null) when data.name is synthetic: its images are made up, got 'r'",
        ),
        (
            [f"data={{name: synthetic, synthetic: {MADE}}}", "data.synthetic.shape=[3, 8]"],
            "data.synthetic.shape[2] is missing from the list",
        ),
        (
            [f"data={{name: synthetic, synthetic: {MADE}}}", "augment.flip=true"],
            "augment.flip must be left out when data.name is synthetic: images that are made up are not augmented,"
            " got true",
        ),
        (
            [IMAGENET, "augment.pad_crop=4"],
            "augment.pad_crop must be left out when data.name is imagenet: data.preprocessing says how images are"
            " cropped, got 4",
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
