"""Figure 4 of the paper: memory of a model's Fisher matrices by form of the BatchNorm Fisher."""

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from kfac_dist.planning.memory import FisherMemory
from kfac_dist.plots.runs import RUN_COLOURS, STYLE

_MIB = 2**20


def draw_fisher_memory(name: str, memory: FisherMemory) -> Figure:
    """A bar for each form, whole matrices in fp32 without inverses: A and G, and what BatchNorm adds.

    Args:
        name: The model's, for the title.
        memory: From `kfac_dist.planning.memory.fisher_memory`.
    """
    forms = list(memory.batchnorm)
    kronecker = np.full(len(forms), memory.kronecker / _MIB)
    batchnorm = np.array([memory.batchnorm[form] for form in forms]) / _MIB
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(6.4, 2.6), layout="constrained")
        axes = figure.subplots()
        axes.barh(forms, kronecker, color=RUN_COLOURS[0], height=0.6, label="A and G")
        bars = axes.barh(forms, batchnorm, left=kronecker, color=RUN_COLOURS[1], height=0.6, label="BatchNorm F")
        axes.bar_label(bars, [f"{total:,.4g} MiB" for total in kronecker + batchnorm], padding=3, fontsize=8)
        axes.invert_yaxis()
        axes.grid(visible=False, axis="y")
        axes.margins(x=0.15)
        axes.set_title(f"{name}: Fisher matrices, fp32")
        axes.set(xlabel="MiB", ylabel="BatchNorm Fisher")
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8)
    return figure
