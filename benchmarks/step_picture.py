"""A picture of where a step's time goes; needs matplotlib, which the step benchmark itself does without."""

import matplotlib
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from step_figures import StepFigures, stages_with_factors

matplotlib.use("Agg")
matplotlib.rcParams["svg.fonttype"] = "none"  # text as text

_STAGES = ("forward", "backward", "factors", "reduce_scatter", "inverse", "precondition", "all_gather", "update")


def draw_stages(figures: dict[str, StepFigures]) -> Figure:
    """A panel for each workload, in it a bar for each optimizer, stacked of its stages."""
    seconds = stages_with_factors(figures)
    figure, axes = plt.subplots(
        len(seconds), 1, figsize=(8, 1.2 + 0.45 * sum(len(of) + 2 for of in seconds.values())), squeeze=False,
        gridspec_kw={"height_ratios": [len(of) for of in seconds.values()]}, layout="constrained",
    )  # fmt: skip
    colours = dict(zip(_STAGES, plt.get_cmap("tab10").colors, strict=False))  # type: ignore[attr-defined]
    for axis, (workload, of) in zip(axes[:, 0], seconds.items(), strict=True):
        names = list(of)
        starts = [0.0] * len(names)
        for stage in _STAGES:
            widths = [1e3 * of[name][stage] for name in names]
            axis.barh(names, widths, left=starts, color=colours[stage], label=stage)
            starts = [start + width for start, width in zip(starts, widths, strict=True)]
        for name, total in zip(names, starts, strict=True):
            axis.annotate(f"{total:.0f}", (total, name), xytext=(3, 0), textcoords="offset points", va="center")
        axis.invert_yaxis()
        axis.margins(x=0.08)
        axis.set_title(workload, loc="left", fontsize="medium")
        axis.set_xlabel("milliseconds per step")
    axes[0, 0].legend(ncols=4, fontsize="small", loc="lower left", bbox_to_anchor=(0, 1.15), frameon=False)
    return figure
