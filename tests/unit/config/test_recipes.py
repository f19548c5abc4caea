"""Recipes by name."""

from pathlib import Path

import pytest

from kfac_dist.config.load import load_config
from kfac_dist.config.recipes import find_configuration, recipes
from kfac_dist.errors import InputError
from tests.paths import CONFIGS, QUICKSTART


def test_every_file_of_configs_but_studies_is_a_recipe() -> None:
    assert set(recipes().values()) == set(CONFIGS.rglob("*.yaml")) - set((CONFIGS / "study").rglob("*.yaml"))
    assert recipes()["imagenet/bs4k"] == CONFIGS / "imagenet/bs4k.yaml"


def test_a_name_works_in_any_folder_and_a_file_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_config("quickstart") == load_config(QUICKSTART)
    (tmp_path / "quickstart").mkdir()  # a folder is no configuration
    assert find_configuration("quickstart") == QUICKSTART
    (tmp_path / "quickstart").rmdir()
    (tmp_path / "quickstart").write_text(QUICKSTART.read_text(encoding="utf-8").replace("epochs: 6", "epochs: 5"))
    assert load_config("quickstart").train.epochs == 5


@pytest.mark.parametrize("name", ["nosuch", "bs4k", "../pyproject", "quickstart.yaml", "imagenet/bs4k/"])
def test_what_is_neither_lists_the_names(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError) as refused:
        load_config(name)
    for known in recipes():
        assert known in str(refused.value)
    assert str(refused.value).startswith(f"{name.rstrip('/')}: no such file" if name != "imagenet/bs4k/" else name[:-1])


@pytest.mark.parametrize(("typed", "meant"), [("quikstart", "quickstart"), ("imagenet/bs4", "imagenet/bs4k")])
def test_a_typing_error_in_a_recipes_name_is_told(typed: str, meant: str) -> None:
    with pytest.raises(InputError, match=rf"no recipe of this name; did you mean {meant}\? recipes: "):
        find_configuration(typed)


def test_a_folder_and_an_impossible_name_are_told_as_such(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is a directory; give a YAML file"):
        load_config(tmp_path)
    for name in ("x" * 5000, "nul\0character"):
        with pytest.raises(InputError, match="cannot be read"):
            load_config(name)
