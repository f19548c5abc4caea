"""Single images, folders of them, and the geometry of what is cut out."""

import io
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import ImageFolder

from kfac_dist.data.imagenet import image_file
from kfac_dist.data.imagenet.crops import Crop, Crops, resized_side, upper_left_crop
from kfac_dist.data.imagenet.folder import list_images
from kfac_dist.data.imagenet.image_file import decode, read_image_file
from kfac_dist.errors import ImageError, InputError
from tests.image_tree import CLASSES, NUM_EVAL, NUM_TRAIN, make_image, write_tree

ROWS, COLUMNS = np.mgrid[250:0:29j, 0:250:37j]
SMOOTH = Image.fromarray(np.stack([COLUMNS, ROWS, np.full_like(ROWS, 90)], axis=2).astype(np.uint8))


def saved(path: Path, image: Image.Image, form: str, **settings: object) -> Path:
    image.save(path, form, **settings)
    return path


@pytest.mark.parametrize(
    ("mode", "form", "is_plain", "tolerance"),
    [
        ("RGB", "JPEG", True, 12),
        ("L", "JPEG", True, 4),
        ("CMYK", "JPEG", False, 14),
        ("RGB", "PNG", False, 0),
        ("P", "PNG", False, 60),  # 256 colours for all
        ("RGBA", "PNG", False, 0),
        ("RGB", "WEBP", False, 20),
    ],
)
def test_formats_whatever_the_name_says(tmp_path: Path, mode: str, form: str, is_plain: bool, tolerance: int) -> None:
    found = read_image_file(saved(tmp_path / "a.JPEG", SMOOTH.convert(mode), form))
    assert (found.height, found.width, found.is_plain_jpeg) == (29, 37, is_plain)
    pixels = decode(found)
    assert pixels.shape == (29, 37, 3)
    assert pixels.dtype == np.uint8
    expected = np.asarray(SMOOTH.convert("L").convert("RGB") if mode == "L" else SMOOTH).astype(int)
    assert np.abs(pixels - expected).max() <= tolerance


GREY_LEVELS = np.linspace(0, 65_535, 256).round().astype(np.uint16).reshape(16, 16)  # those of 0 ... 255, times 257


@pytest.mark.parametrize("form", ["PNG", "TIFF", "PPM"])
def test_grey_values_of_16_bits_are_scaled(tmp_path: Path, form: str) -> None:
    pixels = decode(read_image_file(saved(tmp_path / "a.png", Image.fromarray(GREY_LEVELS), form)))
    assert pixels.dtype == np.uint8
    np.testing.assert_array_equal(pixels, np.repeat(np.arange(256).reshape(16, 16, 1), 3, axis=2))
    nearly = Image.fromarray(np.array([[128, 129, 65_406, 65_407]], dtype=np.uint16))  # half a level, and more
    assert decode(read_image_file(saved(tmp_path / "b.png", nearly, form)))[0, :, 0].tolist() == [0, 1, 254, 255]


def test_the_largest_value_of_a_pgm_is_white(tmp_path: Path) -> None:
    (tmp_path / "a.pgm").write_bytes(b"P5 3 1 1000\n" + np.array([0, 500, 1000], dtype=">u2").tobytes())
    assert decode(read_image_file(tmp_path / "a.pgm"))[0, :, 0].tolist() == [0, 128, 255]


@pytest.mark.parametrize(
    ("values", "settings", "mode"),
    [
        (GREY_LEVELS.astype(np.float32) / 65_535, {}, "F"),
        (GREY_LEVELS.astype(np.int32), {}, "I"),
        (GREY_LEVELS, {"tiffinfo": {262: 0}}, "I;16"),  # its zero is white
    ],
)
def test_values_without_a_known_range_are_refused(
    tmp_path: Path, values: np.ndarray, settings: dict[str, object], mode: str
) -> None:
    path = saved(tmp_path / "a.tiff", Image.fromarray(values), "TIFF", **settings)
    with pytest.raises(ImageError, match=rf"a\.tiff cannot be used \(TIFF of mode {mode}, whose values have no known"):
        read_image_file(path)


def test_orientation_tags_are_ignored(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    turned = decode(read_image_file(saved(tmp_path / "a.JPEG", SMOOTH, "JPEG", exif=exif)))
    plain = decode(read_image_file(saved(tmp_path / "b.JPEG", SMOOTH, "JPEG")))
    np.testing.assert_array_equal(turned, plain)


def test_empty_missing_and_foreign_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "empty.JPEG").write_bytes(b"")
    with pytest.raises(ImageError, match=r"empty\.JPEG cannot be used \(the file is empty\).*data\.on_error=skip"):
        read_image_file(tmp_path / "empty.JPEG")
    (tmp_path / "text.JPEG").write_bytes(b"<html>not found</html>")
    with pytest.raises(ImageError, match=r"text\.JPEG cannot be used \(no image in a known format\)"):
        read_image_file(tmp_path / "text.JPEG")
    with pytest.raises(ImageError, match=r"gone\.JPEG cannot be used"):
        read_image_file(tmp_path / "gone.JPEG")


@pytest.mark.parametrize("form", ["JPEG", "PNG"])
@pytest.mark.parametrize("kept", [0.3, 0.6, 0.95])
def test_truncated_images_are_named(tmp_path: Path, form: str, kept: float) -> None:
    path = saved(tmp_path / "cut.JPEG", make_image(2, 0).resize((300, 300)), form)
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content))])
    with pytest.raises(ImageError, match=r"cut\.JPEG cannot be used"):
        decode(read_image_file(path))


def test_huge_images_are_refused_before_they_are_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert image_file.MAX_PIXELS == Image.MAX_IMAGE_PIXELS
    path = saved(tmp_path / "a.JPEG", SMOOTH, "JPEG")
    monkeypatch.setattr(image_file, "MAX_PIXELS", 29 * 37)
    read_image_file(path)
    monkeypatch.setattr(image_file, "MAX_PIXELS", 29 * 37 - 1)
    with pytest.raises(ImageError, match=r"37x29 pixels, more than 1,072"):
        read_image_file(path)


def test_a_large_image_works(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.JPEG", Image.new("RGB", (6000, 4000), (10, 200, 30)), "JPEG")
    found = read_image_file(path)
    square = upper_left_crop(224)(found.height, found.width).apply(decode(found))
    assert square.shape == (3, 224, 224)
    assert (square.float().mean(dim=(1, 2)) - torch.tensor([10.0, 200.0, 30.0])).abs().max() < 2


# Folders -----------------------------------------------------------------------------------------------------


def test_listing(tmp_path: Path) -> None:
    root = write_tree(tmp_path)
    (root / "train/n01/notes.txt").write_text("no image")
    train = list_images(root, "train")
    assert (len(train), train.class_names) == (NUM_TRAIN, CLASSES)
    assert train.labels.tolist() == sorted(number % 3 for number in range(NUM_TRAIN))
    assert train.path(8) == root / "train/n02/004.JPEG"
    assert all(train.path(index).is_file() for index in range(len(train)))
    few = train.evenly(6)
    assert np.bincount(few.labels).tolist() == [2, 2, 2]
    assert train.evenly(None) is train


def test_listing_is_that_of_torchvision(tmp_path: Path) -> None:
    root = write_tree(tmp_path)
    elsewhere = tmp_path / "elsewhere"
    for folder in (root / "train/n01/b/deep", root / "train/n01/b-c", root / "train/n03/x.jpg", elsewhere):
        folder.mkdir(parents=True)
        for ending in ("JPG", "png", "ppm", "bmp", "pgm", "tif", "tiff", "webp", "gif", "txt"):
            (folder / f"1.{ending}").touch()
    (root / "train/n02/linked").symlink_to(elsewhere)
    train, theirs = list_images(root, "train"), ImageFolder(str(root / "train"))
    ours = [(str(train.path(index)), int(train.labels[index])) for index in range(len(train))]
    assert train.class_names == tuple(theirs.classes)
    assert sorted(ours) == sorted(theirs.samples)
    assert len(ours) == NUM_TRAIN + 4 * 8
    assert [label for _, label in ours] == sorted(label for _, label in ours)


def test_a_link_to_a_folder_around_it_is_refused(tmp_path: Path) -> None:
    root = write_tree(tmp_path)
    (root / "train/n01/loop").symlink_to(root / "train/n01")
    with pytest.raises(InputError, match=r"train/n01/loop is a link to a folder around it: delete it"):
        list_images(root, "train")


def test_what_is_left_out_is_told_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = write_tree(tmp_path)
    list_images(root, "train")
    list_images(root, "val", CLASSES)
    assert caplog.messages == []
    for name in ("n01/b.gif", "n01/a.GIF", "n02/sub/c.gif", "n03/notes.txt", "readme.JPEG"):
        (root / "train" / name).parent.mkdir(exist_ok=True)
        (root / "train" / name).touch()
    assert len(list_images(root, "train")) == NUM_TRAIN
    outside, endings = caplog.messages
    assert outside == f"{root}/train: left out what lies in no class folder: 1 file (readme.JPEG)"
    assert endings.startswith(f"{root}/train: left out what does not end in one of .jpg .jpeg .png")
    assert endings.endswith("4 files (n01/a.GIF, n01/b.gif, n02/sub/c.gif and 1 more)")


def test_training_classes_without_evaluation_images_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = write_tree(tmp_path)
    list_images(root, "val", ("n00", *CLASSES, "n04"))
    assert caplog.messages == [f"{root}/val: no images of 2 of the training classes: n00, n04"]


def test_labels_of_evaluation_are_the_training_classes(tmp_path: Path) -> None:
    root = write_tree(tmp_path)
    for path in (root / "val/n01").iterdir():
        path.unlink()
    (root / "val/n01").rmdir()
    evaluation = list_images(root, "val", CLASSES)
    assert set(evaluation.labels) == {1, 2}
    assert len(list_images(root, "val", CLASSES)) == NUM_EVAL - 4


def test_bad_trees_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"data\.root must contain the folder train, got .*, which does not: the lay"):
        list_images(tmp_path, "train")
    (tmp_path / "train").mkdir()
    with pytest.raises(InputError, match=r"train holds no class folders"):
        list_images(tmp_path, "train")
    root = write_tree(tmp_path)
    (root / "train/n09").mkdir()
    with pytest.raises(InputError, match=r"no images in the class folder n09: fill or delete it"):
        list_images(root, "train")
    (root / "val/n04").mkdir()
    (root / "val/n05").mkdir()
    with pytest.raises(InputError, match=r"n04, n05 are no classes of the training data \(3 classes in"):
        list_images(root, "val", CLASSES)


def test_fingerprint_follows_names_and_sizes(tmp_path: Path) -> None:
    root = write_tree(tmp_path)
    first = list_images(root, "train").fingerprint()
    assert first == list_images(root, "train").fingerprint()
    path = root / "train/n01/000.JPEG"
    content = path.read_bytes()
    path.write_bytes(content + b"\0")
    assert list_images(root, "train").fingerprint() != first
    path.unlink()
    assert list_images(root, "train").fingerprint() != first
    (root / "train/n01/0000.JPEG").write_bytes(content)
    assert list_images(root, "train").fingerprint() != first


# Crops -------------------------------------------------------------------------------------------------------


def test_resized_side_is_the_papers() -> None:
    assert [resized_side(side) for side in (224, 112, 64, 32)] == [256, 128, 73, 37]


def test_paper_crop_is_resize_crop_and_flip(tmp_path: Path) -> None:
    pixels = decode(read_image_file(saved(tmp_path / "a.JPEG", make_image(0, 1), "JPEG")))
    resized = torch.from_numpy(pixels).permute(2, 0, 1)[None]
    resized = torch.nn.functional.interpolate(resized, size=(37, 37), mode="bilinear", antialias=True)[0]
    for crop_of in Crops("paper", 32, True, seed=1).train(20, iteration=3, slot=2):
        crop = crop_of(*pixels.shape[:2])
        top, left = crop.offset
        expected = resized[:, top : top + 32, left : left + 32]
        assert torch.equal(crop.apply(pixels), expected.flip(2) if crop.mirrored else expected)


def test_resizing_is_pillows_to_one_level(tmp_path: Path) -> None:
    image = make_image(2, 0).resize((97, 55))
    crop = Crop((0, 0, 55, 97), (37, 37), (0, 0), 37, mirrored=False)
    ours = crop.apply(np.array(image)).permute(1, 2, 0).numpy().astype(int)
    assert np.abs(ours - np.asarray(image.resize((37, 37), Image.Resampling.BILINEAR)).astype(int)).max() <= 1


def test_paper_crops_cover_all_places_and_flip_half() -> None:
    found = [crop(100, 200) for slot in range(40) for crop in Crops("paper", 32, True, seed=0).train(50, 0, slot)]
    for axis in (0, 1):
        counts = np.bincount([crop.offset[axis] for crop in found])
        assert len(counts) == 37 - 32 + 1
        assert np.abs(counts - 2000 / 6).max() < 5 * math.sqrt(2000 / 6)
    assert abs(np.mean([crop.mirrored for crop in found]) - 0.5) < 5 * 0.5 / math.sqrt(2000)
    unflipped = [crop(100, 200) for crop in Crops("paper", 32, False, seed=0).train(50, 0, 0)]
    assert not any(crop.mirrored for crop in unflipped)
    assert [crop.offset for crop in unflipped] == [crop.offset for crop in found[:50]]


def test_crops_are_keyed() -> None:
    def offsets(seed: int, iteration: int, slot: int) -> list[tuple[int, int]]:
        return [crop(50, 60).offset for crop in Crops("paper", 64, True, seed).train(8, iteration, slot)]

    assert offsets(1, 2, 3) == offsets(1, 2, 3)
    assert len({tuple(offsets(*key)) for key in ((1, 2, 3), (0, 2, 3), (1, 0, 3), (1, 2, 0))}) == 4


def test_random_resized_boxes() -> None:
    height, width = 300, 400
    boxes = np.array(
        [
            crop(height, width).box
            for slot in range(40)
            for crop in Crops("random_resized_crop", 32, True, seed=0).train(50, 0, slot)
        ]
    )
    top, left, rows, columns = boxes.T
    assert (top >= 0).all()
    assert (left >= 0).all()
    assert (top + rows <= height).all()
    assert (left + columns <= width).all()
    area, aspect = rows * columns / (height * width), columns / rows
    assert area.min() > 0.075
    assert area.max() > 0.9
    assert (aspect.min() > 0.73, aspect.max() < 1.36) == (True, True)
    # Uniform between 0.08 and 1, where no large box was rejected for not fitting.
    small = area[area < 0.5]
    assert abs(np.mean((small - 0.08) / 0.42) - 0.5) < 0.05
    crop = Crops("random_resized_crop", 32, True, seed=0).train(1, 0, 0)[0](1, 1000)  # no box fits
    assert crop.box[2:] == (1, 1)


def test_evaluation_crops_are_the_middle() -> None:
    crop = Crops("paper", 224, True, seed=0).evaluation()(375, 500)
    assert crop == Crop((0, 0, 375, 500), (256, 256), (16, 16), 224, mirrored=False)
    crop = Crops("random_resized_crop", 224, True, seed=0).evaluation()(375, 500)
    assert crop == Crop((0, 0, 375, 500), (256, 341), (16, 58), 224, mirrored=False)
    top, left, height, width = crop.outline()
    assert (top + height / 2, left + width / 2) == (pytest.approx(187.5), pytest.approx(250, abs=1))


def test_mean_image_crop_is_the_upper_left() -> None:
    assert upper_left_crop(224)(375, 500) == Crop((0, 0, 375, 500), (256, 256), (0, 0), 224, mirrored=False)


def test_bytes_after_the_end_marker_do_no_harm(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    SMOOTH.save(buffer, "JPEG")
    (tmp_path / "a.JPEG").write_bytes(buffer.getvalue() + b"\0" * 100)
    assert read_image_file(tmp_path / "a.JPEG").is_plain_jpeg
    (tmp_path / "b.JPEG").write_bytes(buffer.getvalue() + b"\0" * 5000)  # judged by Pillow, which reads it
    np.testing.assert_array_equal(*(decode(read_image_file(tmp_path / name)) for name in ("a.JPEG", "b.JPEG")))
