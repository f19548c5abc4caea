"""What came of a trial, from the metrics of its run: accuracies as fractions, seconds of training alone."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from kfac_dist.study.definition import Target
from kfac_dist.vocabulary import FinalMetric

_WINDOW_EPOCHS = 0.2


def summarise(records: Iterable[Mapping[str, Any]], batch_size: int, targets: Sequence[Target]) -> dict[str, Any]:
    """The part of a result that the metrics tell.

    Args:
        records: Lines of a run's metrics.
        batch_size: Global batch size.
        targets: Of the study. A training loss is reached where its mean over the last fifth of an epoch is; a test
            accuracy at the evaluation that found it.

    Returns:
        epochs, iterations, seconds, curve (a point for each evaluation), final, best_test_top1 and iterations_to.
        Where nothing finite is known, a value is None.
    """
    losses: list[float] = []
    since: list[float] = []  # the last evaluation
    seconds, epoch = 0.0, 0.0
    curve: list[dict[str, Any]] = []
    for record in records:
        if record["kind"] == "train":
            since.append(float(record["loss"]))  # "NaN" where it was not finite
            losses.append(since[-1])
            seconds += batch_size / record["images_per_second"]
            epoch = record["epoch"]
        elif record["kind"] == "eval":
            curve.append(
                {
                    "iteration": record["iteration"] + 1,
                    "epoch": record["epoch"],
                    "seconds": seconds,
                    "train_loss": _finite(sum(since) / len(since)) if since else None,
                    "test_loss": _finite(float(record["loss"])),
                    "test_top1": record["top1"] / 100,
                }
            )
            since = []
    per_epoch = len(losses) / epoch if epoch else 1.0
    last = curve[-1] if curve else {"train_loss": None, "test_top1": None}
    return {
        "epochs": epoch,
        "iterations": len(losses),
        "seconds": seconds,
        "curve": curve,
        "final": {"train_loss": last["train_loss"], "test_top1": last["test_top1"]},
        "best_test_top1": max((point["test_top1"] for point in curve), default=None),
        "iterations_to": {
            target.name: iterations_to(target, losses, curve, max(1, round(_WINDOW_EPOCHS * per_epoch)))
            for target in targets
        },
    }


def iterations_to(
    target: Target, losses: Sequence[float], curve: Sequence[Mapping[str, Any]], window: int
) -> int | None:
    """After how many updates a target is reached first; None if it never is.

    Args:
        target: What is to be reached.
        losses: Training loss of each iteration.
        curve: A point for each evaluation.
        window: Iterations that a training loss is averaged over, >= 1.
    """
    if target.metric == "test_top1":
        return next((point["iteration"] for point in curve if point["test_top1"] >= target.value), None)
    for end in range(window, len(losses) + 1):
        if sum(losses[end - window : end]) / window <= target.value:
            return end
    return None


def best_of(results: Sequence[Mapping[str, Any]], by: FinalMetric) -> Mapping[str, Any] | None:
    """The result with the best final value, the first of equals; None if no trial came to its end."""
    done = [result for result in results if result["status"] == "done" and result["final"][by] is not None]
    sign = 1 if by == "train_loss" else -1
    return min(done, key=lambda result: sign * result["final"][by], default=None)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
