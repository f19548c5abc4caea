"""What a check found, and the list of all findings as text and as JSON. Imports neither torch nor MPI."""

import dataclasses
import os
import socket
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from kfac_dist.errors import InputError

Status = Literal["ok", "note", "warning", "error"]

EXIT_ERRORS = 2
PATIENCE_SECONDS = 3.0  # before ending with an error: the launcher then ends all ranks, and others may yet print
_wrap = partial(textwrap.fill, width=110, break_long_words=False, break_on_hyphens=False)  # paths stay whole


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        name: What was looked at; findings of one name stand together.
        status: `error` when training cannot work, `warning` when it will go badly, `note` when something is worth
            knowing, else `ok`.
        found: What is there, with the value.
        remedy: The command or setting that removes it; there is one unless the status is `ok`.
        ranks: The ranks it holds for; none means the whole job.
    """

    name: str
    status: Status
    found: str
    remedy: str = ""
    ranks: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        assert (self.status == "ok") == (not self.remedy), f"{self.name}: a remedy goes with all but ok"


def from_error(name: str, error: InputError, ranks: Sequence[int] = ()) -> Finding:
    """An error that training would raise: its first sentence says what is wrong, the others what to do."""
    found, _, remedy = str(error).partition(". ")
    return Finding(name, "error", found, remedy, tuple(ranks))


def attempt(name: str, check: Callable[[], Iterable[Finding]]) -> list[Finding]:
    """Run a check; where it breaks down itself, that is the finding."""
    try:
        return list(check())
    except Exception as error:  # whatever it is, the other checks still have something to say
        text = f"could not be checked: {type(error).__name__}: {error}"
        return [Finding(name, "warning", text, "correct what the message names; the other findings stand without it")]


def merge(findings_by_rank: Sequence[Sequence[Finding]]) -> list[Finding]:
    """One list of all ranks' findings, given in rank order: what several ranks found alike becomes one that names them.

    Names stand in the order of their first appearance; `ranks` is empty where all ranks found the same.
    """
    ranks: dict[Finding, list[int]] = {}
    for rank, findings in enumerate(findings_by_rank):
        for finding in dict.fromkeys(findings):
            ranks.setdefault(finding, []).append(rank)
    names = list(dict.fromkeys(finding.name for finding in ranks))
    merged = [
        finding if len(found_by) == len(findings_by_rank) else dataclasses.replace(finding, ranks=tuple(found_by))
        for finding, found_by in ranks.items()
    ]
    return sorted(merged, key=lambda finding: names.index(finding.name))


def format_ranks(ranks: Sequence[int]) -> str:
    """(0, 1, 2, 5) → "ranks 0-2, 5: "; of none, nothing."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    texts = [str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs]
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(texts)}: " if texts else ""


def exit_code(findings: Iterable[Finding]) -> int:
    """0 if nothing is an error, else 2."""
    return EXIT_ERRORS if any(finding.status == "error" for finding in findings) else 0


def format_report(findings: Sequence[Finding]) -> str:
    """The findings as an aligned list, one remedy under each that needs one, and a last line that sums up."""
    width = max((len(finding.name) for finding in findings), default=0)
    indent = " " * (len("warning") + 2 + width + 2)
    lines = []
    for finding in findings:
        head = f"{finding.status:7}  {finding.name:{width}}  {format_ranks(finding.ranks)}"
        lines.append(_wrap(head + finding.found, subsequent_indent=indent))
        if finding.remedy:
            lines.append(_wrap(f"{indent}remedy: {finding.remedy}", subsequent_indent=indent + "        "))
    statuses = [finding.status for finding in findings]
    counts = [
        f"{count} {status}{'s' if count > 1 else ''}"
        for status in ("error", "warning", "note")
        if (count := statuses.count(status))
    ]
    outcome = "training can start"
    if "error" in statuses:
        outcome = "training will not work before the errors are corrected"
    return "\n".join([*lines, "", f"{', '.join(counts) or 'All is well'}: {outcome}."])


def report_as_json(findings: Sequence[Finding], size: int) -> dict[str, Any]:
    """The same for programs; a finding of the whole job lists all its `size` ranks."""
    listed = [dataclasses.asdict(finding) | {"ranks": list(finding.ranks or range(size))} for finding in findings]
    return {"num_ranks": size, "exit_code": exit_code(findings), "findings": listed}


def report_end(rank: int, findings: Sequence[Finding]) -> None:
    """Before one rank ends by itself: rank 0 prints all that it found, others the last. Then others may still print."""
    print(format_report(findings if rank == 0 else findings[-1:]), file=sys.stderr if rank else sys.stdout, flush=True)
    time.sleep(PATIENCE_SECONDS)


class HangGuard:
    """Ends this process, saying where it stands, when a check hangs: a dead network folder, a rank that never answers.

    A process that ends so makes the launcher end the job; without it, one rank that hangs would hang them all.

    Attributes:
        stage: What this process does now.
        findings: What is known so far; rank 0 prints it before it ends.
        timer: To be cancelled when all is done.
    """

    def __init__(self, rank: int, limit_seconds: float = 180) -> None:
        self.stage = "loading torch and starting MPI"
        self.findings: list[Finding] = []
        self.timer = threading.Timer(limit_seconds, self._end, (rank, limit_seconds))
        self.timer.daemon = True
        self.timer.start()

    def _end(self, rank: int, limit_seconds: float) -> None:
        found = f"still at {self.stage!r} on {socket.gethostname()} after {limit_seconds:g} s"
        remedy = (
            "look there: a network folder that does not answer, a firewall between the hosts (mpirun --mca "
            "btl_tcp_if_include <interface>), or another rank that hangs and says so itself"
        )
        report_end(rank, [*self.findings, Finding("time limit", "error", found, remedy, (rank,))])
        os._exit(EXIT_ERRORS)
