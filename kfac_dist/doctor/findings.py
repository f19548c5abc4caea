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
from typing import Any, Literal, get_args

Status = Literal["ok", "note", "warning", "error"]

EXIT_OK = 0
EXIT_ERRORS = 2
_WIDTH = 110


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        name: What was looked at; findings of one name stand together.
        status: `error` when training cannot work, `warning` when it will go badly, `note` when something is worth
            knowing, else `ok`.
        found: What is there, with the value.
        remedy: The command or setting that mends it; there is one unless the status is `ok`.
        ranks: The ranks it holds for; none means the whole job.
    """

    name: str
    status: Status
    found: str
    remedy: str = ""
    ranks: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        assert (self.status == "ok") == (not self.remedy), f"{self.name}: a remedy goes with all but ok"


def attempt(name: str, check: Callable[[], Iterable[Finding]]) -> list[Finding]:
    """Run a check; where it breaks down itself, that is the finding."""
    try:
        return list(check())
    except Exception as error:  # whatever it is, the other checks still have something to say
        text = f"could not be checked: {type(error).__name__}: {error}"
        return [Finding(name, "warning", text, "mend what the message names; the other findings stand without it")]


def merge(findings_by_rank: Sequence[Sequence[Finding]]) -> list[Finding]:
    """One list of all ranks' findings: what is the same on several ranks becomes one that names them.

    Args:
        findings_by_rank: Each rank's own findings, in rank order.

    Returns:
        Names in the order of their first appearance; `ranks` is empty where all ranks found the same.
    """
    ranks: dict[Finding, list[int]] = {}
    for rank, findings in enumerate(findings_by_rank):
        for finding in dict.fromkeys(findings):
            ranks.setdefault(finding, []).append(rank)
    size = len(findings_by_rank)
    merged = [
        finding if len(found_by) == size else dataclasses.replace(finding, ranks=tuple(found_by))
        for finding, found_by in ranks.items()
    ]
    return in_order(merged, list(dict.fromkeys(finding.name for finding in merged)))


def in_order(findings: Iterable[Finding], names: Sequence[str]) -> list[Finding]:
    """Bring findings of one name together, in the order of the names; others come last."""
    places = {name: place for place, name in enumerate(names)}
    return sorted(findings, key=lambda finding: places.get(finding.name, len(places)))


def format_ranks(ranks: Sequence[int]) -> str:
    """(0, 1, 2, 5) → "ranks 0-2, 5"."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    texts = [str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs]
    return ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(texts)


def exit_code(findings: Iterable[Finding]) -> int:
    """0 if nothing is an error, else 2."""
    return EXIT_ERRORS if any(finding.status == "error" for finding in findings) else EXIT_OK


def format_report(findings: Sequence[Finding]) -> str:
    """The findings as an aligned list, one remedy under each that needs one, and a last line that sums up."""
    width = max((len(finding.name) for finding in findings), default=0)
    indent = " " * (len("warning") + 2 + width + 2)
    lines = []
    for finding in findings:
        head = f"{finding.status:7}  {finding.name:{width}}  "
        where = f"{format_ranks(finding.ranks)}: " if finding.ranks else ""
        lines.append(_wrap(where + finding.found, head, indent))
        if finding.remedy:
            lines.append(_wrap("remedy: " + finding.remedy, indent, indent + "        "))
    return "\n".join([*lines, "", summary(findings)])


def summary(findings: Iterable[Finding]) -> str:
    """The number of findings by status and what follows from it."""
    statuses = [finding.status for finding in findings]
    counts = [
        f"{statuses.count(status)} {status}" + ("s" if statuses.count(status) > 1 else "")
        for status in reversed(get_args(Status))
        if status != "ok" and status in statuses
    ]
    if "error" in statuses:
        return f"{', '.join(counts)}: training will not work before the errors are mended."
    return f"{', '.join(counts) or 'All is well'}: training can start."


def report_as_json(findings: Sequence[Finding], size: int, seconds: float) -> dict[str, Any]:
    """The same as `format_report`, for programs.

    Args:
        findings: The merged findings.
        size: Number of ranks; a finding of the whole job lists them all.
        seconds: What the examination took.
    """
    return {
        "num_ranks": size,
        "seconds": round(seconds, 2),
        "exit_code": exit_code(findings),
        "findings": [
            dataclasses.asdict(finding) | {"ranks": list(finding.ranks or range(size))} for finding in findings
        ],
    }


def _wrap(text: str, first: str, rest: str) -> str:
    return textwrap.fill(
        text,
        max(_WIDTH, len(rest) + 60),
        initial_indent=first,
        subsequent_indent=rest,
        break_long_words=False,  # paths and commands stay whole
        break_on_hyphens=False,
    )


class Watchdog:
    """Ends this process, saying where it stands, when a check hangs: a dead network folder, a rank that never answers.

    A process that ends so makes the launcher end the job; without it, one rank that hangs would hang them all.

    Attributes:
        findings: What is known so far; rank 0 prints it before it ends.
    """

    def __init__(self, rank: int) -> None:
        self.findings: Sequence[Finding] = ()
        self._rank = rank
        self._timer: threading.Timer | None = None

    def watch(self, stage: str, limit_seconds: float = 60, grace_seconds: float = 3) -> None:
        """Begin a stage; the one before it has ended.

        Args:
            stage: What this process does now.
            limit_seconds: After this time it is said to hang.
            grace_seconds: Time for other ranks to say where they hang before the launcher ends them.
        """
        self.stop()
        self._timer = threading.Timer(limit_seconds, self._end, (stage, limit_seconds, grace_seconds))
        self._timer.daemon = True
        self._timer.start()

    def stop(self) -> None:
        """Watch no longer."""
        if self._timer is not None:
            self._timer.cancel()

    def _end(self, stage: str, limit_seconds: float, grace_seconds: float) -> None:
        found = f"rank {self._rank} on {socket.gethostname()} has been at {stage!r} for {limit_seconds:g} s"
        remedy = (
            "look there: a network folder that does not answer, a firewall between the hosts (mpirun --mca "
            "btl_tcp_if_include <interface>), or another rank that hangs and says so itself"
        )
        if self._rank == 0:
            findings = [*self.findings, Finding("time limit", "error", found, remedy)]
            print(format_report(findings), flush=True)
        else:
            print(f"error: {found}; {remedy}", file=sys.stderr, flush=True)
        time.sleep(grace_seconds)
        os._exit(EXIT_ERRORS)
