"""The page of a study."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kfac_dist.config import strict_yaml
from kfac_dist.errors import InputError
from kfac_dist.report.best import best_of
from kfac_dist.report.curve import Axis, uneven_pace
from kfac_dist.report.document import Block, Figure, Findings, Listing, Page, Panel, Paragraph, Section, Table, Tiles
from kfac_dist.report.findings import judge
from kfac_dist.report.pictures import looks_of
from kfac_dist.report.render import check_output, write_page
from kfac_dist.report.results import Cell, Study, read_study
from kfac_dist.report.sensitivity import WITHIN, Grid, final_grid, fixed_budget
from kfac_dist.report.study_pictures import (
    Looks,
    draw_best,
    draw_curves,
    draw_heat_map,
    draw_scaling,
    draw_shares,
)
from kfac_dist.report.study_tables import (
    best_table,
    cells,
    cost_table,
    environment_table,
    scaling_table,
    sensitivity_table,
    time_table,
    to_csv,
)
from kfac_dist.report.words import UNEVEN, duration

_LEGEND = (
    "test accuracy in %. Bold: good; framed: the best; ×: diverged; empty: no result. Colours mean the same in all "
    "maps of a model."
)
_SEEDS = "Bands and bars go from the lowest to the highest of the seeds, where there are several."


def report_study(folder: str | Path, output: str | Path | None = None) -> list[Path]:
    """Write a study's page (HTML and Markdown) and its trials as CSV.

    Args:
        folder: Of the study; it may be unfinished.
        output: FILE.html; report.html in the study's folder unless given.

    Returns:
        The files written.

    Raises:
        InputError: If the folder cannot be read as a study, or the output cannot be written.
    """
    output = check_output(output or Path(folder) / "report.html")
    study = read_study(folder)
    written = write_page(study_page(study), output)
    table = output.with_suffix(".csv")
    try:
        table.write_text(to_csv(study), encoding="utf-8")
    except OSError as error:
        raise InputError(f"--output: cannot write {table} ({error.strerror})") from error
    return [*written, table]


def study_page(study: Study) -> Page:
    """All that a study tells."""
    looks = looks_of(study.kinds)
    sgd = study.first_of_kind("sgd")
    sections = [
        Section("Best performance", [*_best_figures(study, looks), best_table(study)]),
        Section("The poster's findings", _findings(study)),
        Section("Scaling with the batch size", list(_scaling(study, looks))),
        Section("Learning curves of the best", list(_curves(study, looks))),
        *([Section("Time to the best SGD's accuracy", [time_table(study, sgd)])] if sgd is not None else []),
        Section("Sensitivity to hyper-parameters", list(_sensitivity(study, looks))),
        Section("Cost", [cost_table(study)]),
        Section("Settings and versions", list(_settings(study))),
    ]
    return Page(f"Study {study.name}", _lead(study), [*notices(study), _tiles(study)], sections)


def _lead(study: Study) -> str:
    budget = study.definition.get("budget")
    rule = ", ".join(f"{key} {value}" for key, value in budget.items()) if isinstance(budget, dict) else "not told"
    sizes = ", ".join(f"{size:,}" for size in study.batch_sizes)
    data = f"{study.data}, " if study.data else ""
    return f"{', '.join(study.kinds)} on {data}{', '.join(study.models)} at batch {sizes}; budget: {rule}."


def notices(study: Study) -> Iterator[Paragraph]:
    """What a reader should know before the results."""
    missing = len(study.missing)
    if missing:
        yield Paragraph(
            f"This study is unfinished: {missing:,} of {len(study.plan):,} trials have no result yet. Tables and "
            "figures show what there is; findings use only batch sizes whose trials have all finished.",
            is_notice=True,
        )
    failed = [trial for trial in study.trials if trial.status == "failed"]
    if failed:
        yield Paragraph(
            f"{len(failed)} trials failed and count nowhere, and findings leave out their batch sizes; retry them. The "
            f"first, trial {failed[0].index}: {failed[0].error}",
            is_notice=True,
        )
    if sizes := _differing_grids(study):
        yield Paragraph(f"The optimizers' grids differ in size: {sizes}. The larger has more chances.", is_notice=True)
    if uneven := _uneven_cells(study):
        yield Paragraph(
            f"The best configuration's runs took, in s an iteration, {uneven}. {UNEVEN}",
            is_notice=True,
        )


def _uneven_cells(study: Study) -> str:
    texts = []
    for cell in cells(study):
        best = best_of(study, cell)
        pace = uneven_pace(best.curves) if best is not None else None
        if pace is not None:
            texts.append(f"{pace[0]:.3g} to {pace[1]:.3g} ({cell.model}, batch {cell.batch_size:,}, {cell.optimizer})")
    return ", ".join(texts)


def _differing_grids(study: Study) -> str:
    counts = {
        label: max((len(study.grid(Cell(m, s, label))) for m in study.models for s in study.batch_sizes), default=0)
        for label in study.kinds
    }
    return ", ".join(f"{label} {n}" for label, n in counts.items()) if len(set(counts.values())) > 1 else ""


def _tiles(study: Study) -> Tiles:
    tiles = [
        ("trials finished", f"{len(study.trials):,} of {len(study.plan):,}"),
        ("diverged", str(sum(trial.status == "diverged" for trial in study.trials))),
        ("training time", duration(sum(trial.seconds for trial in study.trials if trial.seconds == trial.seconds))),
    ]
    for label in study.kinds:
        found = [best_of(study, Cell(model, size, label)) for model in study.models for size in study.batch_sizes]
        best = max((one.spread("test_top1").mean for one in found if one is not None), default=None)
        tiles += [(f"best of {label}", f"{100 * best:.2f} %")] if best is not None else []
    return Tiles(tiles)


def _findings(study: Study) -> list[Block]:
    kfac, sgd = study.first_of_kind("kfac"), study.first_of_kind("sgd")
    text = (
        "Each claim of the AAAI 2020 poster (Ma et al., Inefficiency of K-FAC for Large Batch Size Training) with what "
        f"this study's data say: K-FAC is its column {kfac or '(none)'}, SGD {sgd or '(none)'}. "
        "Its first question, how K-FAC scales beside SGD, is answered by the first two, its second, how the batch size "
        "changes the sensitivity to hyper-parameters, by the others."
    )
    return [Paragraph(text), Findings(judge(study))]


def _best_figures(study: Study, looks: Looks) -> list[Block]:
    panels = [
        panel
        for model in study.models
        for panel in (draw_best(study, model, "test_top1", looks), draw_best(study, model, "train_loss", looks))
    ]
    return [Figure(panels, f"The best configuration of each grid at the end of its budget. {_SEEDS}")]


def _scaling(study: Study, looks: Looks) -> Iterator[Block]:
    if not study.targets:
        yield Paragraph("The study has no targets.")
        return
    reached = {
        (trial.cell.model, target)
        for trial in study.trials
        for target, iterations in trial.iterations_to.items()
        if iterations is not None
    }
    panels = [
        draw_scaling(study, model, target, looks)
        for model in study.models
        for target in study.targets
        if (model, target) in reached
    ]
    if panels:
        yield Figure(
            panels,
            "Fewest iterations of the grid to each target; a bar goes from the lowest to the highest seed of that "
            "configuration. Dotted: ideal scaling, half for twice the batch. An accuracy is known at evaluations only, "
            "a training loss five times an epoch: with few of these before the target, what looks like scaling is "
            "their spacing.",
        )
    for model in study.models:
        for target in study.targets:
            yield scaling_table(study, model, target)


def _curves(study: Study, looks: Looks) -> Iterator[Block]:
    for model in study.models:
        for size in study.batch_sizes:
            panels = [
                draw_curves(study, model, size, "iteration", "train_loss", looks),
                draw_curves(study, model, size, "epoch", "test_top1", looks),
                draw_curves(study, model, size, "seconds", "test_top1", looks),
            ]
            yield Figure(
                panels,
                f"{model}, batch {size:,}: each optimizer's best configuration, by training loss in the first picture "
                f"and by test accuracy in the others. {_SEEDS}",
            )


def _sensitivity(study: Study, looks: Looks) -> Iterator[Block]:
    yield Paragraph(
        f"A configuration is good if its test accuracy is within {100 * WITHIN:.0f} % of the best. After the "
        "same epochs and iterations, values are read from the runs' curves; each run follows the schedule of its own "
        "whole budget. Where a study's budget is so many epochs or iterations for all, those are the end."
    )
    for model in study.models:
        yield Figure(list(_share_panels(study, model, looks)), f"{model}: how robust each optimizer is.")
    yield sensitivity_table(study)
    for model in study.models:
        top = max((trial.test_top1 for trial in study.trials if trial.cell.model == model), default=1.0)
        for label in study.kinds:
            for name, title, grids in _grids(study, model, label):
                panels = [
                    draw_heat_map(f"map {model} {label} {name} {size}", f"{label}, batch {size:,}, {title}", grid, top)
                    for size, grid in grids.items()
                    if grid.top1.size > 1
                ]
                if panels:
                    yield Figure(panels, f"{model}, {label}, {title}: {_LEGEND}")


def _grids(study: Study, model: str, label: str) -> Iterator[tuple[str, str, dict[int, Grid]]]:
    """Name, title and grids by batch size: at the end, at fixed epochs, at fixed iterations, unless that is the end."""
    trials = {size: study.grid(Cell(model, size, label)) for size in study.batch_sizes}
    yield "end", "at the end", {size: final_grid(runs) for size, runs in trials.items() if runs}
    axes: tuple[Axis, Axis] = ("epoch", "iteration")
    for axis in axes:
        if study.fixed_budget is not None and study.fixed_budget[0] == axis:
            continue
        fixed = fixed_budget(study, model, label, axis)
        place = f"{fixed.place:.3g}" if axis == "epoch" else f"{fixed.place:,.0f}"
        yield axis, f"after {place} {axis}s", dict(fixed.grids)


def _share_panels(study: Study, model: str, looks: Looks) -> Iterator[Panel]:
    shares: dict[str, dict[str, dict[int, float]]] = {"end": {}, "epoch": {}, "iteration": {}}
    for label in study.kinds:
        for name, _, grids in _grids(study, model, label):
            shares[name][label] = {size: grid.share() for size, grid in grids.items()}
    for name, title in (("end", "at the end"), ("epoch", "after the same epochs"), ("iteration", "same iterations")):
        if not shares[name]:  # the budget is that, so it is the end
            continue
        yield draw_shares(f"share {model} {name}", f"{model}, {title}", shares[name], looks)


def _settings(study: Study) -> Iterator[Block]:
    yield Table(
        ["optimizer", "name", "grid"],
        [[label, kind, _axes_text(study, label)] for label, kind in study.kinds.items()],
        num_labels=3,
    )
    yield Paragraph(
        f"Whole grids were run with seed {study.grid_seed}; configurations are chosen on it by the test images, as in "
        "the poster, and the values told of them are means over all their seeds. The chosen seed is one of these, and "
        "the luckiest of its grid: the means are a little too good, the more so the larger the grid, the fewer the "
        "other seeds and the more an optimizer depends on the seed."
    )
    yield environment_table(study)
    text = strict_yaml.dump(study.definition)
    yield Listing("The study's definition", text)


def _axes_text(study: Study, label: str) -> str:
    values: dict[str, set[float]] = {}
    for trial in study.trials:
        for name, value in trial.parameters.items() if trial.cell.optimizer == label else ():
            values.setdefault(name, set()).add(value)
    return " × ".join(f"{name}: {_range(sorted(found))}" for name, found in values.items())


def _range(values: list[Any]) -> str:
    return f"{values[0]:g}" if len(values) == 1 else f"{len(values)} values, {values[0]:g} … {values[-1]:g}"
