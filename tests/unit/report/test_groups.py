"""Groups of runs that are no good groups, and what the page of a comparison says of it."""

import pytest

from kfac_dist.errors import InputError
from kfac_dist.report import pair_page, study_page
from kfac_dist.report.groups import read_groups
from kfac_dist.report.results import read_study
from tests.unit.report.synthetic_run import write_run
from tests.unit.report.synthetic_study import curve_of, result, write_study


def notices(folder):
    groups = read_groups([f"A={folder}/a*", f"B={folder}/b*"], None, None)
    return [one.text for one in pair_page.notices(groups)]


@pytest.fixture
def folder(tmp_path):
    for name in "ab":
        for seed in (0, 1):
            write_run(tmp_path / f"{name}{seed}", "sgd", seed=seed)
    return tmp_path


def test_finished_runs_that_differ_by_their_seed_need_no_notice(folder):
    assert notices(folder) == []


def test_a_diverged_seed_is_refused(tmp_path):
    """Defect: its last evaluation counted as its end here and as 0 in the study's table; without one, a traceback."""
    results = [result(0), result(1, top1=None, seed=1, status="diverged", curve=[]), result(2, "sgd")]
    study = write_study(tmp_path / "study", results)
    with pytest.raises(InputError, match=r"the best configuration of kfac at batch 128 diverged with seed 1, and"):
        read_groups([f"{study}:kfac", f"{study}:sgd"], None, None)


@pytest.mark.parametrize(("seconds", "uneven"), [(1.2, False), (2.0, True)])
def test_seconds_of_a_machine_that_was_shared_are_doubted(tmp_path, seconds, uneven):
    """Defect: SGD's seconds on such a machine were told as what K-FAC costs beside it."""
    curves = [curve_of(0.8, 8, 10, one) for one in (1.0, seconds)]
    results = [result(seed, top1=0.8, curve=curve, seed=seed) for seed, curve in enumerate(curves)]
    study = write_study(tmp_path / "study", [*results, result(2, "sgd")])
    page = " ".join(one.text for one in study_page.notices(read_study(study)))
    groups = read_groups([f"{study}:kfac", f"{study}:sgd"], None, None)
    pair = " ".join(one.text for one in pair_page.notices(groups))
    assert ("0.1 to 0.2 (net, batch 128, kfac). Something else used the machine" in page) is uneven
    assert ("kfac: its runs took 0.1 to 0.2 s an iteration. Something else used the machine" in pair) is uneven
