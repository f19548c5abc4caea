"""A run's folder made up, as a training leaves it."""

import json

import yaml


def spectrum(iteration, layer, matrix, smallest, largest, rank=2.0):
    return {
        "kind": "fisher", "iteration": iteration, "layer": layer, "matrix": matrix, "smallest_eigenvalue": smallest,
        "largest_eigenvalue": largest, "effective_rank": rank,
    }  # fmt: skip


def write_run(folder, optimizer="kfac", epochs=3, iterations_an_epoch=4, final=None, seed=0, extra=()):
    """Write a finished run whose accuracy comes near 100 % by half the rest an epoch, times `final`."""
    folder.mkdir(parents=True)
    records = []
    for iteration in range(epochs * iterations_an_epoch):
        epoch = (iteration + 1) / iterations_an_epoch
        records.append(
            {
                "kind": "train", "iteration": iteration, "epoch": epoch, "loss": 2.0 / (iteration + 1), "top1": 50.0,
                "learning_rate": 0.1 / (iteration + 1), "momentum": 0.9,
                "damping": 0.02 / (iteration + 1) if optimizer == "kfac" else 0.0, "images_per_second": 1000.0,
                "stage_seconds": {"forward": 0.01, "backward": 0.02, "inverse": 0.005}, "communication_bytes": 0,
            }
        )  # fmt: skip
        if (iteration + 1) % iterations_an_epoch == 0:
            top1 = 100 * (1 - 0.5**epoch) * (final or 1.0)
            records.append(
                {"kind": "eval", "iteration": iteration, "epoch": epoch, "loss": 1.0, "top1": top1, "top5": 99.0}
            )
            for layer, matrix in (("0", "A"), ("0", "G"), ("1", "F")) if optimizer == "kfac" else ():
                records.append(spectrum(iteration, layer, matrix, 1e-6, 2.0))
                records.append(
                    {"kind": "fisher", "iteration": iteration, "layer": layer, "matrix": matrix, "diff": 0.5 / epoch}
                )
    records += [*extra, {"kind": "summary", "top1": 99.0, "seconds": 3.5}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    config = {
        "run": {"name": folder.name, "seed": seed}, "data": {"name": "digits"}, "model": {"name": "digits_cnn"},
        "batch": {"global_size": 64, "per_rank": 64}, "optimizer": {"name": optimizer, "learning_rate": 0.1},
    }  # fmt: skip
    if optimizer == "kfac":
        config["kfac"] = {"damping": {"batchnorm_ratio": 16.0}, "refresh": {"schedule": "every", "interval": 1}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    environment = {"started": "2026-01-01T00:00:00+00:00", "num_ranks": 2, "packages": {"torch": "2.14"}, "python": "3"}
    (folder / "environment.json").write_text(json.dumps(environment))
    (folder / "DONE").write_text("2026-01-01T00:00:00+00:00\n")
    return folder
