"""The card of a run: curves, stage seconds, curvature health, and with what it was made."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from kfac_dist.config import strict_yaml
from kfac_dist.errors import InputError
from kfac_dist.plots.curves import stage_seconds
from kfac_dist.plots.runs import column
from kfac_dist.report.card_pictures import (
    draw_accuracy,
    draw_change,
    draw_eigenvalues,
    draw_loss,
    draw_ranks,
    draw_relative_damping,
    draw_settings,
    draw_stages,
    draw_throughput,
)
from kfac_dist.report.curve import number
from kfac_dist.report.document import Block, Figure, Listing, Page, Panel, Paragraph, Section, Table, Tiles
from kfac_dist.report.health import event_rows, relative_damping, spectra, staleness
from kfac_dist.report.pictures import Look, looks_of, plain
from kfac_dist.report.render import check_output, write_page
from kfac_dist.report.runs import RunRecord, read_run_record
from kfac_dist.report.words import NONE, decimal, duration


def report_run(folder: str | Path, output: str | Path | None = None) -> list[Path]:
    """Write a run's card as HTML and Markdown.

    Args:
        folder: Of the run; it may be unfinished.
        output: FILE.html; report.html in the run's folder unless given.

    Returns:
        The files written.

    Raises:
        InputError: If the folder holds no run with a training iteration, or the output cannot be written.
    """
    output = check_output(output or Path(folder) / "report.html")
    run = read_run_record(folder)
    if not run.records.get("train"):
        raise InputError(f"{folder}: no training iteration is recorded yet; report it when the run has made one")
    return write_page(card_page(run), output)


def card_page(run: RunRecord) -> Page:
    """All that a run's folder tells."""
    look = looks_of({"run": run.optimizer})["run"]
    sections = [
        Section("Curves", [Figure(_curve_panels(run, look), "What the run learned, and with which settings.")]),
        Section("Time", list(_time(run, look))),
        *([Section("Curvature", list(_curvature(run, look)))] if run.optimizer == "kfac" else []),
        Section("Events", [Table(["what", "times", "iterations"], event_rows(run), num_labels=1)]),
        Section("Settings and versions", list(_made_with(run))),
    ]
    parts = [run.optimizer, run.setting("model.name"), run.setting("data.name")]
    lead = f"{parts[0]}, {parts[1]} on {parts[2]}, batch {run.setting('batch.global_size')}"
    return Page(f"Run {run.name}", lead, list(_first(run)), sections)


def _first(run: RunRecord) -> Iterator[Block]:
    if not run.is_finished:
        yield Paragraph("This run is not finished: its folder has no DONE.", is_notice=True)
    top1 = 100 * run.curve.test_top1[np.isfinite(run.curve.test_top1)]
    train = run.records["train"]
    yield Tiles(
        [
            ("final test top-1", f"{top1[-1]:.2f} %" if top1.size else NONE),
            ("best test top-1", f"{top1.max():.2f} %" if top1.size else NONE),
            ("iterations", f"{len(train):,}"),
            ("epochs", decimal(number(train[-1].get("epoch")), 2)),
            ("seconds", duration(number(run.summary.get("seconds")))),
            ("images per second", decimal(float(np.median(column(train, "images_per_second"))), 0)),
            ("ranks", str(run.environment.get("num_ranks", NONE))),
        ]
    )


def _curve_panels(run: RunRecord, look: Look) -> list[Panel]:
    return [draw_accuracy(run, look), draw_loss(run, look), draw_settings(run, look)]


def _time(run: RunRecord, look: Look) -> Iterator[Block]:
    train = run.records["train"]
    panels = [draw_throughput(run, look)]
    if any(stage_seconds(train).values()):
        panels.insert(0, draw_stages(run))
    yield Figure(panels, "Median seconds of a stage where it runs, times the share of iterations in which it does.")


def _curvature(run: RunRecord, look: Look) -> Iterator[Block]:
    train, fisher = run.records["train"], run.records.get("fisher", [])
    found, stale = spectra(fisher), staleness(fisher)
    panels = [draw_eigenvalues(found), draw_ranks(found)] if found else []
    if relative_damping(train, fisher)[0].size:
        panels.append(draw_relative_damping(train, fisher, look))
    if any("diff" in record for record in fisher):
        panels.append(draw_change(fisher))
    damping = column(train, "damping")
    damping = damping[np.isfinite(damping)]
    if damping.size:
        fraction = run.setting("kfac.sample_fraction")
        part = (
            f" A and G: from the first {100 * fraction:.4g} % of each slot's samples."
            if fraction not in (None, 1)
            else ""
        )
        yield Paragraph(
            f"Damping went from {damping[0]:.3g} to {damping[-1]:.3g} (lowest {damping.min():.3g}); BatchNorm's is "
            f"{run.setting('kfac.damping.batchnorm_ratio')} times that. Refresh: {_schedule(run)}.{part}"
        )
    if panels:
        yield Figure(
            panels,
            "Over the layers: eigenvalues and effective rank of the running matrices at each evaluation, damping "
            "beside the largest eigenvalue of a layer's Fisher block (above the dotted line damping outweighs it), and "
            "Diff at each refresh (line: median, band: 5th to 95th percentile).",
        )
    if found:
        rows = [
            [m, plain(float(s.smallest.min())), plain(float(s.largest.max())), f"{s.rank[-1]:.1f}"]
            for m, s in found.items()
        ]
        columns = ["matrix", "smallest eigenvalue", "largest eigenvalue", "last median effective rank"]
        yield Table(columns, rows, "Range over all layers and evaluations; rounding makes tiny ones negative.")
    else:
        yield Paragraph("Eigenvalues were not recorded: train with kfac.monitor.spectrum=true.")
    if stale:
        rows = [
            [m, str(s.shortest), f"{s.mean:.2f}", str(s.longest), f"{s.refreshes:,}"] for m, s in stale.items()
        ]  # fmt: skip
        columns = ["matrix", "shortest", "mean", "longest", "refreshes"]
        yield Table(columns, rows, "Staleness: iterations from one refresh of a matrix to its next, over all layers.")
    else:
        yield Paragraph("Refreshes were not recorded: train with kfac.monitor.diff=true.")


def _schedule(run: RunRecord) -> str:
    refresh = run.setting("kfac.refresh")
    if not isinstance(refresh, dict):
        return "not told"
    return ", ".join(f"{key} {value}" for key, value in refresh.items() if not isinstance(value, dict))


def _made_with(run: RunRecord) -> Iterator[Block]:
    environment = run.environment
    if environment:
        packages = environment.get("packages") or {}
        git = environment.get("git") or {}
        cpu = environment.get("cpu") or {}
        rows = [
            ["started", str(environment.get("started", NONE))],
            ["packages", ", ".join(f"{name} {version}" for name, version in packages.items() if version)],
            ["Python", str(environment.get("python", NONE))],
            ["processor", f"{cpu.get('model', NONE)}, threads a rank: {cpu.get('torch_threads', NONE)}"],
            ["GPUs of rank 0", ", ".join(environment.get("gpus") or []) or "none"],
            ["commit", f"{git.get('commit', NONE)}{' with changes' if git.get('modified') else ''}"],
        ]
        yield Table(["", "value"], rows, num_labels=2)
    if run.config:
        text = strict_yaml.dump(run.config)
        yield Listing("The run's configuration", text)
