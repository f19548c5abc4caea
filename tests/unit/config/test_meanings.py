"""Every key has a text under it in the schema, which the site shows, and a type that can be told."""

import importlib.util
import re
from types import ModuleType

import pytest

from kfac_dist.config.schema import Config
from tests.paths import ROOT


@pytest.fixture(scope="module")
def page() -> ModuleType:
    """The program that writes the page."""
    spec = importlib.util.spec_from_file_location("configuration_keys", ROOT / "scripts/docs/configuration_keys.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_key_has_a_meaning(page: ModuleType) -> None:
    keys = list(page.keys(Config))
    assert len(keys) > 80
    silent = [key for key, owner, name in keys if not page.is_tag(owner, name) and name not in page.meanings(owner)]
    assert silent == []


def test_every_key_stands_on_the_page_once(page: ModuleType) -> None:
    shown = re.findall(r"^\| `([\w.]+)` \|", page.markdown(), re.MULTILINE)
    assert set(shown) == {key for key, _, _ in page.keys(Config)}
    assert all(line.count(" | ") == 3 for line in page.markdown().splitlines() if line.startswith("| `"))


@pytest.mark.parametrize(
    "row",
    [
        "| `batch.global_size` | integer > 0 | required |",
        "| `run.seed` | integer >= 0 | 0 |",
        "| `run.output_dir` | path | `runs` |",
        "| `run.watchdog_minutes` | number > 0 or null | 10 |",
        "| `optimizer.momentum` | number >= 0, < 1 | required |",
        "| `weight_rescaling` | `always`, `cap`, `off` | `off` |",
        "| `model.variant` | `v1`, `v1.5` or null | null |",
        "| `augment.flip` | true or false | false |",
        "| `augment.erasing.area` | list of 2: number > 0, <= 1 | required |",
        "| `kfac.skip` | list of text | [] |",
        "| `data.synthetic.shape` | list of 3: integer > 0 | required |",
    ],
)
def test_type_and_default_are_the_schemas(row: str, page: ModuleType) -> None:
    assert row in page.markdown()
