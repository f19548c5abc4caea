"""The doctor's list of findings, and what becomes of a check that breaks down or hangs."""

import json
import subprocess
import sys

import pytest

from kfac_dist.doctor import findings
from kfac_dist.doctor.findings import Finding, attempt, exit_code, format_ranks, format_report, from_error, merge
from kfac_dist.errors import InputError


def test_the_same_on_all_ranks_is_said_once() -> None:
    same, odd = Finding("a", "ok", "fine"), Finding("a", "note", "odd", "fix it")
    other = Finding("b", "ok", "good")
    merged = merge([[same, other], [odd, other], [same, other], [same, other]])
    assert [(finding.name, finding.found, finding.ranks) for finding in merged] == [
        ("a", "fine", (0, 2, 3)),
        ("a", "odd", (1,)),
        ("b", "good", ()),
    ]
    assert merge([[same, same]]) == [same]


@pytest.mark.parametrize(
    ("numbers", "text"),
    [((3,), "rank 3: "), ((0, 1, 2, 3), "ranks 0-3: "), ((7, 0, 1, 4), "ranks 0-1, 4, 7: "), ((), "")],
)
def test_ranks_are_named_as_ranges(numbers: tuple[int, ...], text: str) -> None:
    assert format_ranks(numbers) == text


def test_report() -> None:
    long = Finding("threads", "warning", "too many " * 30, "export OMP_NUM_THREADS=2", (1, 2))
    lines = format_report([Finding("MPI", "ok", "there"), long]).splitlines()
    assert lines[0] == "ok       MPI      there"
    assert lines[1].startswith("warning  threads  ranks 1-2: too many")
    assert lines[2].startswith(" " * 18 + "too many")
    assert lines[-3] == " " * 18 + "remedy: export OMP_NUM_THREADS=2"
    assert lines[-1] == "1 warning: training can start."
    assert max(map(len, lines)) <= 110
    report = findings.report_as_json([Finding("MPI", "ok", "there"), long], 4)
    assert json.loads(json.dumps(report)) == report
    assert [entry["ranks"] for entry in report["findings"]] == [[0, 1, 2, 3], [1, 2]]
    assert report["exit_code"] == 0


def test_only_errors_stop() -> None:
    note, error = Finding("a", "note", "x", "y"), Finding("a", "error", "x", "y")
    assert (exit_code([]), exit_code([note]), exit_code([note, error])) == (0, 0, 2)
    last = format_report([note, error]).splitlines()[-1]
    assert last == "1 error, 1 note: training will not work before the errors are corrected."
    assert format_report([]).endswith("All is well: training can start.")


def test_every_problem_needs_a_remedy() -> None:
    with pytest.raises(AssertionError, match="a remedy goes with all but ok"):
        Finding("a", "note", "x")
    error = InputError("key must be > 0.5, got 0. Set it. Or drop it.")
    assert from_error("a", error, [1]) == Finding("a", "error", "key must be > 0.5, got 0", "Set it. Or drop it.", (1,))


def test_a_check_that_breaks_down_is_a_finding() -> None:
    (finding,) = attempt("GPUs", lambda: [Finding("GPUs", "ok", str(1 // 0))])
    assert (finding.name, finding.status) == ("GPUs", "warning")
    assert finding.found.startswith("could not be checked: ZeroDivisionError: ")


@pytest.mark.parametrize("rank", [0, 3])
def test_a_check_that_hangs_ends_the_process(rank: int) -> None:
    program = f"""
import time
from kfac_dist.doctor import findings
findings.PATIENCE_SECONDS = 0
guard = findings.HangGuard({rank}, limit_seconds=0.3)
guard.findings.append(findings.Finding("MPI", "ok", "there"))
guard.stage = "reading /nfs"
time.sleep(20)
"""
    finished = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=15, check=False)
    assert finished.returncode == 2
    said = finished.stdout if rank == 0 else finished.stderr
    assert "still at 'reading /nfs' on " in said
    assert ("ok       MPI" in said) == (rank == 0)  # what was found before is not lost
