"""Rates: seconds of operations by hand, the profiles of the package, and what is refused."""

import re
from pathlib import Path

import pytest

from kfac_dist.errors import InputError
from kfac_dist.planning.operations import Operation
from kfac_dist.planning.profile import create_profile, known_profiles, load_profile
from tests.unit.planning.machines import RATES, machine

TERA = 10**12


def seconds(operation: Operation, value_bytes: int = 4, **changes) -> float:
    return machine(**changes).seconds([operation], value_bytes)


def test_arithmetic_by_kind():
    assert seconds(Operation("product", TERA, 64, 1, 0)) == pytest.approx(1.0)
    assert seconds(Operation("product", TERA, 64, 1, 0), 2) == pytest.approx(0.5), "half of a peak of 4"
    assert seconds(Operation("product", TERA, 64, 1, 0), 8) == pytest.approx(2.0)
    assert seconds(Operation("factorise", TERA, 64, 1, 0)) == pytest.approx(2.0)
    assert seconds(Operation("solve", TERA, 64, 1, 0)) == pytest.approx(4.0)


def test_a_small_product_is_slower():
    operation = Operation("product", TERA, 50, 1, 0)
    assert seconds(operation, single={"half_size": 50.0}) == pytest.approx(2.0)


def test_rows_depend_on_one_another_and_a_cpu_takes_matrices_in_turn():
    operation, rows = Operation("factorise", TERA, 100, 8, 0), {"row_seconds": 0.01}
    assert seconds(operation, factorise=rows) == pytest.approx(2.0 + 1.0)
    assert seconds(operation, factorise=rows, device="cpu") == pytest.approx(2.0 + 8.0)


def test_a_gpu_inverts_by_solving_for_the_whole_identity():
    operation = Operation("invert", TERA, 64, 1, 0)
    assert seconds(operation) == pytest.approx(3 * seconds(operation, device="cpu"))


def test_the_slowest_of_memory_and_arithmetic_and_a_launch_each():
    memory = {"gigabytes_per_second": 100.0, "efficiency": 0.5}
    copy = Operation("memory", 0.0, 0, 1, 10**9)
    assert seconds(copy, memory=memory) == pytest.approx(4 / 50)
    assert seconds(copy, 2, memory=memory) == pytest.approx(2 / 50)
    assert seconds(Operation("product", TERA, 64, 1, 10**9), memory=memory) == pytest.approx(1.0)
    assert machine(launch_seconds=0.5).seconds([copy, copy], 4) == pytest.approx(1.0, abs=1e-4)


@pytest.mark.parametrize("name", ["a100", "h100", "h200", "v100"])
def test_each_rate_of_the_package_says_where_it_is_from_and_that_it_was_not_measured(name):
    assert name in known_profiles()
    profile = load_profile(name)
    for rate in (profile.half, profile.single, profile.memory, profile.network.intra_node, profile.network.inter_node):
        assert "peak: " in rate.source
        assert "assumed" in rate.source
    text = (Path(__file__).parents[3] / f"kfac_dist/planning/profiles/{name}.yaml").read_text(encoding="utf-8")
    assert "None of it was measured" in text
    assert len(re.findall(r"^ +source: ", text, re.MULTILINE)) == 9


def test_a_profile_is_written_as_it_is_read(tmp_path):
    path = tmp_path / "here.yaml"
    path.write_text(machine(num_nodes=2).to_yaml(), encoding="utf-8")
    assert load_profile(str(path)) == machine(num_nodes=2)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"devices_per_node": 0}, "devices_per_node must be > 0, got 0"),
        ({"memory": {**RATES["memory"], "efficiency": 1.5}}, "memory.efficiency must be <= 1, got 1.5"),
        ({"solve": {**RATES["solve"], "source": ""}}, "solve.source must not be empty, got ''"),
        ({"network": {"intra_node": RATES["network"]["intra_node"]}}, "network.inter_node is required"),
        ({"device": "tpu"}, "device must be 'cuda' or 'cpu', got 'tpu'"),
        ({"gpus": 8}, "gpus is not a known key"),
    ],
)
def test_problems_name_key_rule_and_value(change, problem):
    with pytest.raises(InputError, match=re.escape(f"mine.yaml: 1 problem in this profile:\n  {problem}")):
        create_profile(RATES | change, "mine.yaml")


def test_all_problems_are_told_at_once():
    with pytest.raises(InputError, match="2 problems in this profile"):
        create_profile(RATES | {"launch_seconds": -1.0, "device": "tpu"}, "mine.yaml")


def test_no_such_profile():
    with pytest.raises(InputError, match=r"--profile must be one of a100, h100, h200, v100, or a file .* got 'b200'"):
        load_profile("b200")
