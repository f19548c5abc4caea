"""Studies made up from formulas, in the files that a real one leaves."""

import json
import math

import numpy as np
import yaml

TARGETS = ("train_loss<=0.5", "test_top1>=0.6")
KINDS = {"kfac": "damping", "sgd": "momentum", "muon": "momentum"}


def result(index, optimizer="kfac", batch_size=128, parameters=None, top1=0.7, **fields):
    """A trial's result; its curve has one evaluation, unless given."""
    iterations = fields.get("iterations", 100)
    epochs = fields.get("epochs", 4.0)
    loss = fields.pop("loss", 1.0 - top1 if top1 is not None else None)
    point = {
        "iteration": iterations, "epoch": epochs, "seconds": 10.0, "train_loss": loss, "test_loss": loss,
        "test_top1": top1,
    }  # fmt: skip
    return {
        "index": index, "model": "net", "optimizer": optimizer, "batch_size": batch_size, "seed": 0,
        "parameters": parameters or {"learning_rate": 0.1, KINDS.get(optimizer, "damping"): 0.01}, "status": "done",
        "epochs": epochs, "iterations": iterations, "seconds": 10.0, "cpu_seconds": 12.0, "curve": [point],
        "final": {"train_loss": loss, "test_top1": top1}, "best_test_top1": top1, "iterations_to": {}, "error": None,
        "environment": {"torch": "2.14", "threads": 1, "machine": "test"},
    } | fields  # fmt: skip


def write_study(folder, results, missing=(), definition=None):
    """Write a study's files; trials of `missing`, (model, optimizer, batch size) each, are planned without a result."""
    (folder / "results").mkdir(parents=True)
    labels = list(dict.fromkeys(one["optimizer"] for one in results))
    planned = [(one["index"], one["model"], one["optimizer"], one["batch_size"]) for one in results]
    planned += [(len(results) + number, *cell) for number, cell in enumerate(missing)]
    lines = [
        {
            "index": index, "model": model, "optimizer": optimizer, "batch_size": size, "seed": 0,
            "config": {"optimizer": {"name": optimizer.split("-")[0]}},
        }
        for index, model, optimizer, size in planned
    ]  # fmt: skip
    (folder / "manifest.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    settings = {"name": "made-up", "optimizers": {label: {} for label in labels}} | (definition or {})
    (folder / "study.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
    for one in results:
        (folder / "results" / f"{one['index']:05}.json").write_text(json.dumps(one))
    return folder


def curve_of(final, num_evaluations, iterations_an_epoch, seconds_an_epoch, pace=0.35):
    """Evaluations that come near `final` exponentially, `pace` of the rest an epoch."""
    points = []
    for epoch in range(1, num_evaluations + 1):
        done = (1 - math.exp(-pace * epoch)) / (1 - math.exp(-pace * num_evaluations))
        points.append(
            {
                "iteration": epoch * iterations_an_epoch, "epoch": float(epoch), "seconds": epoch * seconds_an_epoch,
                "train_loss": 2.3 * (1 - done * final), "test_loss": 2.4 * (1 - done * final),
                "test_top1": 0.1 + (final - 0.1) * done,
            }
        )  # fmt: skip
    return points


def make_results(optimizers=("kfac", "sgd"), models=("net",), sizes=(128, 256, 512, 1024), points=4, seeds=2):
    """A study like a real one: a tilted optimum, diverged corners, more seeds for the best."""
    rng = np.random.default_rng(0)
    results = []
    for model in models:
        for size in sizes:
            for optimizer in optimizers:
                cell = list(_cell(model, size, optimizer, points, len(results), rng))
                best = max(cell, key=lambda one: one["final"]["test_top1"] or 0)
                for seed in range(1, seeds):
                    again = _trial(
                        len(results) + len(cell), model, size, optimizer, best["parameters"], seed,
                        best["final"]["test_top1"] + rng.normal(0, 0.004), rng,
                    )  # fmt: skip
                    cell.append(again)
                results += cell
    return results


def _cell(model, size, optimizer, points, start, rng):
    rates = np.geomspace(1e-3, 2.187, points) if optimizer == "kfac" else np.geomspace(1e-2, 3, points)
    others = np.geomspace(1e-4, 0.2187, points) if optimizer == "kfac" else 1 - np.geomspace(0.5, 0.01, points)
    for number, (rate, other) in enumerate((float(f"{a:.4g}"), float(f"{b:.4g}")) for a in rates for b in others):
        parameters = {"learning_rate": rate, KINDS[optimizer]: other}
        if optimizer == "kfac":
            level = math.log10(rate) - 0.7 * math.log10(other) - 0.3
        else:
            level = math.log10(rate / (1 - other)) - 0.5
        width = 1.4 - 0.15 * math.log2(size / 128)
        top = 0.82 - 0.02 * math.log2(size / 128) * (1.0 if optimizer == "kfac" else 2.0)
        final = 0.1 + (top - 0.1) * math.exp(-((level / width) ** 2) - 0.05 * math.log10(other * 50) ** 2)
        yield _trial(
            start + number, model, size, optimizer, parameters, 0, None if level > 1.9 else final, rng
        )  # fmt: skip


def _trial(index, model, size, optimizer, parameters, seed, final, rng):
    epochs = int(math.log2(size / 128) + 1) * 5
    an_epoch = max(1, 4096 // size)
    seconds = {"kfac": 1.6, "sgd": 1.0, "muon": 1.1}[optimizer] * (0.8 + 200 / size) * rng.uniform(0.97, 1.03)
    if final is None:
        return result(
            index, optimizer, size, parameters, None, model=model, seed=seed, status="diverged", epochs=1.0,
            iterations=an_epoch, curve=[], best_test_top1=None, iterations_to=dict.fromkeys(TARGETS), error="diverged",
        )  # fmt: skip
    points = curve_of(final, epochs, an_epoch, seconds, {"kfac": 0.45, "sgd": 0.25, "muon": 0.4}[optimizer])
    reached = {
        "train_loss<=0.5": next((p["iteration"] for p in points if p["train_loss"] <= 0.7), None),
        "test_top1>=0.6": next((p["iteration"] for p in points if p["test_top1"] >= 0.6), None),
    }
    last = points[-1]
    return result(
        index, optimizer, size, parameters, last["test_top1"], loss=last["train_loss"], model=model, seed=seed,
        epochs=float(epochs), iterations=epochs * an_epoch, seconds=last["seconds"], cpu_seconds=1.3 * last["seconds"],
        curve=points, iterations_to=reached,
    )  # fmt: skip
