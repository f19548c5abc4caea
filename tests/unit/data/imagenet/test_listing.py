"""Listings kept in the cache: used while nothing has changed; made anew where something has, or where damaged."""

import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from kfac_dist.data.imagenet import listing_cache
from kfac_dist.data.imagenet.folder import ImageList, list_images
from kfac_dist.data.imagenet.listing import Listing, classes_in, walk
from tests.image_tree import CLASSES, NUM_TRAIN, write_tree

OLD = 3600  # seconds


def age(folder: Path) -> None:
    """Let the folders look as if they had been left alone for long."""
    for path in (folder, *folder.rglob("*")):
        if path.is_dir():
            os.utime(path, (time.time() - OLD,) * 2)


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tree that is worth to be kept, and a cache of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    monkeypatch.setattr(listing_cache, "FEWEST_IMAGES", 1)
    root = write_tree(tmp_path / "tree")
    (root / "train/n02/sub").mkdir()
    (root / "train/n02/sub/deep.JPEG").touch()
    (root / "train/n03/notes.txt").touch()
    age(root)
    return root


@pytest.fixture
def walks(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The folders that were walked over."""
    walked = []

    def counted(folder: Path) -> Listing:
        walked.append(folder)
        return walk(folder)

    monkeypatch.setattr(listing_cache, "walk", counted)
    return walked


def names(images: ImageList) -> list[tuple[bytes, int]]:
    return list(zip(map(bytes, images.names), images.labels.tolist(), strict=True))


def test_a_listing_survives_as_bytes(root: Path) -> None:
    found = walk(root / "train")
    again = Listing.from_bytes(found.to_bytes())
    assert again.names.tolist() == found.names.tolist()
    for field in ("class_names", "counts", "left_out", "folders", "dangling"):
        assert getattr(again, field) == getattr(found, field)
    assert found.counts == (7, 8, 7)
    assert len(found.folders) == 1 + 3 + 1
    (root / "train/n02/\udcff\n.JPEG").touch()  # names are bytes, whatever they say
    assert b"n02/\xff\n.JPEG" in Listing.from_bytes(walk(root / "train").to_bytes()).names


def test_nothing_is_walked_over_twice(root: Path, walks: list[Path], caplog: pytest.LogCaptureFixture) -> None:
    first = list_images(root, "train")
    left_out = caplog.messages
    caplog.clear()
    again = list_images(root, "train")
    assert walks == [root / "train"]
    assert names(again) == names(first)
    assert len(first) == NUM_TRAIN + 1
    assert again.class_names == CLASSES
    assert caplog.messages == left_out != [], "what is left out is told, too"
    list_images(root, "val", CLASSES)
    assert walks == [root / "train", root / "val"]


def rename_class(train: Path) -> None:
    (train / "n03").rename(train / "n04")


def add_class(train: Path) -> None:
    (train / "n04").mkdir()
    (train / "n04/1.JPEG").touch()


def add_file(train: Path) -> None:
    (train / "n01/added.JPEG").touch()


def add_file_deep(train: Path) -> None:
    (train / "n02/sub/added.JPEG").touch()


def add_file_in_disguise(train: Path) -> None:
    modified = (train / "n01").stat().st_mtime_ns
    add_file(train)
    os.utime(train / "n01", ns=(modified, modified))  # as rsync does it


def remove_file(train: Path) -> None:
    (train / "n01/000.JPEG").unlink()


def replace_file(train: Path) -> None:
    (train / "n01/000.JPEG").rename(train / "n01/renamed.JPEG")


@pytest.mark.parametrize(
    "change",
    [rename_class, add_class, add_file, add_file_deep, add_file_in_disguise, remove_file, replace_file],
)
def test_what_has_changed_is_listed_anew(root: Path, walks: list[Path], change: Callable[[Path], None]) -> None:
    before = names(list_images(root, "train"))
    change(root / "train")
    after = names(list_images(root, "train"))
    assert after != before
    assert after == names(ImageList(root, (), walk(root / "train").names, list_images(root, "train").labels))
    age(root)
    list_images(root, "train")
    walks.clear()
    assert names(list_images(root, "train")) == after
    assert walks == [], "the new listing is kept in turn"


def test_names_that_begin_with_a_dot_are_left_out(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Jupyter's copies, and what macOS leaves, in a split's folder, in a class and below it."""
    before = list_images(root, "train")
    fingerprint = before.fingerprint()
    caplog.clear()
    for folder in ("train", "train/n01", "train/n02/sub"):
        (root / folder / ".ipynb_checkpoints").mkdir()
        (root / folder / ".ipynb_checkpoints/1-checkpoint.JPEG").touch()
    (root / "train/n03/._000.JPEG").touch()
    (root / "train/.DS_Store").touch()
    after = list_images(root, "train")
    assert (after.class_names, names(after)) == (CLASSES, names(before))
    assert after.fingerprint() == fingerprint
    assert (
        f"{root / 'train'}: left out names that begin with a dot: 5 (.DS_Store, .ipynb_checkpoints, "
        "n01/.ipynb_checkpoints and 2 more)"
    ) in caplog.messages
    assert "lies in no class folder" not in caplog.text
    assert classes_in(root / "train") == (list(CLASSES), [".DS_Store", ".ipynb_checkpoints"]), "as other ranks see it"


@pytest.mark.parametrize("place", ["n04", "n01/sub"])
def test_a_disk_that_is_mounted_later_is_noticed(root: Path, tmp_path: Path, place: str) -> None:
    """A link to it led nowhere before, and its arrival changes no folder of the tree."""
    (root / "train" / place).symlink_to(tmp_path / "disk")
    age(root)
    for _ in range(2):
        before = names(list_images(root, "train"))
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk/1.JPEG").touch()
    after = [name for name, _ in names(list_images(root, "train"))]
    assert sorted(after) == sorted([name for name, _ in before] + [f"{place}/1.JPEG".encode()])


def test_without_times_of_changes_the_size_of_a_folder_counts(root: Path, walks: list[Path]) -> None:
    """Images of squashfs made from one source with different -e have the same times, which are the source's."""
    found = walk(root / "train")
    smaller = tuple((name, modified, changed, size - 1) for name, modified, changed, size in found.folders)
    for folders, expected in ((found.folders, 0), (smaller, 1)):
        listing_cache._write(root / "train", replace(found, folders=folders))
        list_images(root, "train")
        assert len(walks) == expected


def test_a_folder_that_was_modified_just_now_is_not_kept(root: Path, walks: list[Path]) -> None:
    (root / "train/n01/added.JPEG").touch()
    for _ in range(2):
        list_images(root, "train")
    assert len(walks) == 2
    assert not listing_cache.cache_file(root / "train").exists()


def test_a_small_folder_is_not_kept(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listing_cache, "FEWEST_IMAGES", NUM_TRAIN + 2)
    list_images(root, "train")
    assert not listing_cache.cache_file(root / "train").exists()


@pytest.mark.parametrize("damage", ["cut", "emptied", "one bit", "another version", "a folder"])
def test_a_damaged_cache_is_made_anew(root: Path, walks: list[Path], damage: str) -> None:
    first = names(list_images(root, "train"))
    path = listing_cache.cache_file(root / "train")
    content = path.read_bytes()
    middle = len(content) // 2
    damaged = {
        "cut": content[:-1],
        "emptied": b"",
        "one bit": content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :],
        "another version": content.replace(b"listing 3", b"listing 2"),
        "a folder": b"",
    }[damage]
    path.write_bytes(damaged)
    if damage == "a folder":
        path.unlink()
        path.mkdir()
    assert names(list_images(root, "train")) == first
    assert len(walks) == 2
    if damage != "a folder":
        assert path.read_bytes() == content


def test_a_cache_that_cannot_be_written_is_no_error(
    root: Path, tmp_path: Path, walks: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = names(list_images(root, "train"))
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))  # root may write into any folder
    assert names(list_images(root, "train")) == first
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", lambda: Path("/proc/no/home"))
    assert names(list_images(root, "train")) == first
    assert len(walks) == 3


def test_a_full_disk_leaves_nothing_behind(
    root: Path, tmp_path: Path, walks: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    for _ in range(2):
        assert len(list_images(root, "train")) == NUM_TRAIN + 1
    assert len(walks) == 2
    assert [path for path in (tmp_path / "caches").rglob("*") if path.is_file()] == []


def test_labels_come_from_the_training_classes_in_a_kept_listing_too(root: Path) -> None:
    for _ in range(2):
        evaluation = list_images(root, "val", ("n00", *CLASSES))
        assert np.bincount(evaluation.labels).tolist() == [0, 4, 3, 3]
