"""The programs of benchmarks/ at the smallest sizes: their command lines, and what they write."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.paths import ROOT

BENCHMARKS = ROOT / "benchmarks"
PROGRAMS = sorted(path.name for path in BENCHMARKS.glob("*.py") if "__main__" in path.read_text(encoding="utf-8"))
HELPED = [*(BENCHMARKS / name for name in PROGRAMS), ROOT / "scripts/gpu_check.py"]

Run = Callable[..., CompletedProcess[str]]


@pytest.fixture
def run_benchmark(run_python: Run) -> Callable[..., CompletedProcess[str]]:
    """``run_benchmark(name, *arguments)`` runs a program of benchmarks/."""
    return lambda name, *arguments, **limits: run_python(
        [BENCHMARKS / name, *arguments], env={"PYTHONPATH": str(ROOT)}, **limits
    )


def read_record(output: Path) -> tuple[dict[str, Any], str]:
    record = json.loads(output.with_suffix(".json").read_text(encoding="utf-8"))
    text = output.with_suffix(".md").read_text(encoding="utf-8")
    for place in (output.parent, ROOT):
        assert str(place) not in text + json.dumps(record), "no path of the machine belongs in a record"
    return record, text


def test_the_readme_names_every_program() -> None:
    named = (BENCHMARKS / "README.md").read_text(encoding="utf-8")
    assert len(PROGRAMS) >= 5
    assert [name for name in PROGRAMS if f"`{name}`" not in named] == []


@pytest.mark.parametrize("program", HELPED, ids=lambda path: path.name)
def test_help_is_printed_and_nothing_measured(program: Path, run_python: Run) -> None:
    finished = run_python([program, "--help"], env={"PYTHONPATH": str(ROOT)})
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.startswith(f"usage: {program.name}")
    assert "--output" in finished.stdout or program.name == "scaling.py", "which writes into its folder"
    assert "| " not in finished.stdout, "a table"


@pytest.mark.parametrize("command", ["settings", "summarise", "run"])
def test_every_argument_of_the_parts_of_scaling_has_a_text(command: str, run_python: Run) -> None:
    shown = run_python([BENCHMARKS / "scaling.py", command, "--help"], env={"PYTHONPATH": str(ROOT)})
    assert shown.returncode == 0, shown.stderr
    usage, description, *lists = shown.stdout.split("\n\n")
    assert usage.startswith(f"usage: scaling.py {command} ")
    assert description.startswith("Part of scaling.py: ")
    entries = [line for text in lists for line in text.splitlines() if re.match(r"  \S", line)]
    assert len(entries) > 1
    assert [entry for entry in entries if not re.match(r"  \S.*\S  +\S", entry)] == []


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("step.py", ["--device", "cuda"], "--device must be cpu or auto where torch sees no CUDA device, got cuda"),
        ("step.py", ["--model", "resnet19"], "model.name must be a known model, got 'resnet19'"),
        (
            "step.py",
            ["--device", "cpu", "--batch", "1", "--image-size", "1"],
            "--model resnet20 cannot be trained on --batch 1 with --image-size 1: ",
        ),
        (
            "plan.py",
            ["--ranks", "3", "--slots", "4"],
            "--slots must be a multiple of each number of --ranks and of --cores, got 4 with 3 and 2: --slots 6 works",
        ),
        ("factors.py", ["--device", "cuda"], "--device must be cpu or auto where torch sees no CUDA device, got cuda"),
        ("loaders.py", [ROOT / "configs"], "FOLDER must be a folder with files"),
        ("start.py", [ROOT / "no.yaml"], f"{ROOT / 'no.yaml'}: no such file"),
        ("start.py", [ROOT / "configs/quickstart.yaml", "--beside", ROOT / "docs"], "--beside must be a checkout"),
        ("summarise_runs.py", ["--title", "T", ROOT], f"{ROOT}: no readable metrics.jsonl there"),
    ],
)
def test_what_the_user_can_fix_is_one_line_and_exit_code_2(
    name: str, arguments: list[str | Path], message: str, run_python: Run
) -> None:
    command = [BENCHMARKS / name, *arguments]
    finished = run_python(command, env={"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""})
    assert finished.returncode == 2
    assert finished.stderr.startswith(f"error: {message}"), finished.stderr
    assert finished.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("step.py", ["--output", ROOT / "README.md" / "x"], "--output: must lie in a folder that can be written to"),
        ("inverse.py", ["--columns", "1/0"], "--columns: must be a number > 0, such as 4, 0.25 or 1/9; got '1/0'"),
        ("inverse.py", ["--columns", "-1"], "--columns: must be a number > 0, such as 4, 0.25 or 1/9; got '-1'"),
        ("plan.py", ["--seconds", "0"], "--seconds: must be a number > 0, such as 4, 0.25 or 1/9; got '0'"),
        ("scaling.py", ["run", "there", "1,a", "2", "x.yaml"], "RANKS[,RANKS…]: must be an integer >= 1, got 'a'"),
    ],
)
def test_a_wrong_argument_is_named_with_its_rule_before_anything_is_measured(
    name: str, arguments: list[str | Path], message: str, run_benchmark: Callable[..., Any]
) -> None:
    finished = run_benchmark(name, *arguments)
    assert finished.returncode == 2
    assert f"error: argument {message}" in finished.stderr.splitlines()[-1]


def test_a_mistake_in_the_configuration_is_named_before_starts_are_timed(run_benchmark: Callable[..., Any]) -> None:
    finished = run_benchmark("start.py", ROOT / "configs/quickstart.yaml", "model.nam=x")
    assert finished.returncode == 2
    assert "model.nam is not a known key; did you mean model.name?" in finished.stderr


def test_a_sweep_is_not_mixed_with_an_earlier_one(run_benchmark: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "sgd/ranks-1").mkdir(parents=True)
    finished = run_benchmark("scaling.py", "run", tmp_path, "1", "2", ROOT / "configs/quickstart.yaml")
    assert finished.returncode == 2
    assert finished.stderr.startswith(f"error: FOLDER must hold no earlier runs, got {tmp_path}")
    assert not (tmp_path / "kfac").exists()


@pytest.mark.slow
def test_a_step_on_one_rank_and_on_two(mpirun: Run, tmp_path: Path) -> None:
    sizes = ["--model", "digits_cnn", "--image-size", "8", "--batch", "2", "3", "--device", "cpu"]
    turns = ["--intervals", "1", "3", "--fractions", "0.5", "--rounds", "2", "--steps", "2"]
    baselines = {1: ["torch", "sgd"], 2: ["sgd"]}
    for num_ranks, names in baselines.items():
        output = tmp_path / f"{num_ranks}.step"  # not a suffix
        command = [BENCHMARKS / "step.py", *sizes, *turns, "--output", output]
        finished = mpirun(num_ranks, command, env={"PYTHONPATH": str(ROOT)}, timeout=120)
        assert finished.returncode == 0, finished.stderr
        record = json.loads(Path(f"{output}.json").read_text(encoding="utf-8"))
        assert record["environment"]["num_ranks"] == num_ranks
        assert list(record["results"]) == ["digits_cnn 8 px, batch 2, fp32", "digits_cnn 8 px, batch 3, fp32"]
        for figures in record["results"].values():
            assert list(figures["seconds"]) == [*names, "kfac1", "kfac3", "kfac1@0.5"]
            for name, rounds in figures["rounds"].items():
                assert len(rounds) == 2
                assert min(rounds) <= figures["seconds"][name] <= max(rounds)
                stages = figures["stage_seconds"][name]
                assert sum(stages.values()) < 2 * max(rounds)
                assert (stages["inverse"] > 0) == name.startswith("kfac")
                operations = figures["operations"][name]
                assert operations["forward"] == figures["operations"]["sgd"]["forward"] > 0
                assert (operations["precondition"] > 0) == name.startswith("kfac")
            of_kfac1, of_kfac3 = (figures["operations"][name] for name in ("kfac1", "kfac3"))
            factors = [of["backward"] - figures["operations"]["sgd"]["backward"] for of in (of_kfac1, of_kfac3)]
            assert 0 < factors[1] < factors[0]
            assert figures["traffic"] == {"factors": [80_072] * 2, "gradients": [25_704] * 2, "updates": [25_704] * 2}
            if num_ranks == 1:  # rank 0 owns all layers: A and G of three, and 96 1x1 matrices of BatchNorm
                shapes = ((27, 16), (144, 32), (129, 10))
                factorised = sum(size**3 // 3 for pair in shapes for size in pair) + 96 // 3
                # Each G serves more columns than it has rows; in three iterations the first A does, too.
                inverted = sum(2 * rows**3 // 3 for _, rows in shapes)
                assert of_kfac1["inverse"] == factorised + inverted
                assert of_kfac3["inverse"] == (factorised + inverted + 2 * 27**3 // 3) / 3
                assert of_kfac1["precondition"] == sum(2 * a * g * (a + g) for a, g in shapes)
            assert min(figures["ceilings"][name] for name in ("product", "cholesky", "memory")) > 0
            baseline = min(figures["seconds"][name] for name in names)
            assert figures["ratio_to_baseline"]["kfac3"] == pytest.approx(figures["seconds"]["kfac3"] / baseline)
        assert finished.stdout.strip() in Path(f"{output}.md").read_text(encoding="utf-8")
        assert f"ranks: {num_ranks}" in Path(f"{output}.md").read_text(encoding="utf-8")
        assert "kfac3" in Path(f"{output}.svg").read_text(encoding="utf-8")


def test_factors_and_their_errors(run_benchmark: Callable[..., Any], tmp_path: Path) -> None:
    sizes = ["--model", "digits_cnn", "--image-size", "8", "--batch", "4", "--precision", "fp16", "bf16"]
    finished = run_benchmark("factors.py", *sizes, "--measure", "errors", "--output", tmp_path / "errors")
    assert finished.returncode == 0, finished.stderr
    record, text = read_record(tmp_path / "errors")
    fp16, bf16 = record["results"].values()
    assert fp16["rounding"]["median"] < bf16["rounding"]["median"] < 1e-2
    assert max(fp16["sums"]["largest"], bf16["sums"]["largest"]) < 1e-5
    assert record["environment"]["command"] == f"python benchmarks/factors.py {' '.join(sizes)} --measure errors"
    assert f"{bf16['rounding']['largest']:.1e}" in text


def test_an_inverse_pays_from_the_interval_at_which_products_have_saved_its_cost(
    run_benchmark: Callable[..., Any], tmp_path: Path
) -> None:
    sizes = ["--sizes", "9", "90", "--columns", "1/9", "2", "--matrices", "3"]
    finished = run_benchmark("inverse.py", *sizes, "--output", tmp_path / "inverse")
    assert finished.returncode == 0, finished.stderr
    record, _ = read_record(tmp_path / "inverse")
    shapes = [(row["size"], row["matrices"], row["columns"]) for row in record["results"]]
    assert shapes == [(9, 3, 1), (9, 3, 18), (90, 3, 10), (90, 3, 180)]
    for row in record["results"]:
        saved = row["solve"] - row["multiply"]
        assert row["pays_from"] == (pytest.approx(row["invert"] / saved) if saved > 0 else None)
        if saved > 0:
            assert row["columns_per_row"] == pytest.approx(row["pays_from"] * row["columns"] / row["size"])


@pytest.fixture(scope="module")
def finished_run(run_python: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run on the digits, of one rank."""
    folder = tmp_path_factory.mktemp("runs")
    words = [ROOT / "configs/quickstart.yaml", f"run.output_dir={folder}", "train.epochs=1", "schedule.end_epoch=1"]
    finished = run_python([ROOT / "train.py", *words])
    assert finished.returncode == 0, finished.stderr
    return folder / "quickstart"


def test_construction_of_factors(run_benchmark: Callable[..., Any], tmp_path: Path) -> None:
    sizes = ["--model", "digits_cnn", "--image-size", "8", "--batch", "4", "--precision", "bf16", "--calls", "1"]
    finished = run_benchmark("factors.py", *sizes, "--output", tmp_path / "factors")
    assert finished.returncode == 0, finished.stderr
    record, text = read_record(tmp_path / "factors")
    (figures,) = record["results"].values()
    seconds = figures["seconds"]
    assert list(seconds) == ["half", "fp32", "gemm"]
    assert figures["half_over_fp32"] == pytest.approx(seconds["fp32"] / seconds["half"])
    assert finished.stdout.strip() in text


@pytest.mark.mpi
def test_a_checkpoint_of_two_ranks(mpirun: Run, tmp_path: Path) -> None:
    command = [BENCHMARKS / "checkpoint.py", ROOT / "configs/quickstart.yaml", "--output", tmp_path / "checkpoint"]
    finished = mpirun(2, command, env={"PYTHONPATH": str(ROOT)})
    assert finished.returncode == 0, finished.stderr
    record, text = read_record(tmp_path / "checkpoint")
    assert record["environment"]["num_ranks"] == 2
    assert finished.stdout.strip() in text


def test_a_record_of_runs(run_benchmark: Callable[..., Any], finished_run: Path, tmp_path: Path) -> None:
    finished = run_benchmark("summarise_runs.py", "--title", "Digits", "--output", tmp_path / "digits", finished_run)
    assert finished.returncode == 0, finished.stderr
    (of_run,) = json.loads((tmp_path / "digits.json").read_text(encoding="utf-8"))
    assert (of_run["name"], of_run["iterations"], of_run["ranks"]) == ("quickstart", 12, 1)
    assert f"{of_run['final_top1']:.2f}" in (tmp_path / "digits.md").read_text(encoding="utf-8")


def test_a_figure_of_ranks(run_benchmark: Callable[..., Any], finished_run: Path, tmp_path: Path) -> None:
    (tmp_path / "1").symlink_to(finished_run)
    finished = run_benchmark("scaling.py", "summarise", tmp_path)
    assert finished.returncode == 0, finished.stderr
    assert (tmp_path / "figure2.png").read_bytes().startswith(b"\x89PNG")
    (point,) = json.loads((tmp_path / "scaling.json").read_text(encoding="utf-8"))
    assert (point["num_ranks"], point["batch_size"]) == (1, 128)
    assert "| ranks | global batch |" in (tmp_path / "scaling.md").read_text(encoding="utf-8")


@pytest.mark.mpi
def test_figures_of_both_optimizers_on_this_host(run_benchmark: Callable[..., Any], tmp_path: Path) -> None:
    recipe = [ROOT / "configs/quickstart.yaml", "kfac.damping.initial=0.05", "batch.per_rank=32"]
    finished = run_benchmark("scaling.py", "run", tmp_path, "1,2", "3", *recipe)
    assert finished.returncode == 0, finished.stderr
    text = (tmp_path / "scaling.md").read_text(encoding="utf-8")
    assert text in finished.stdout
    for row, num_ranks in zip(text.splitlines()[-2:], (1, 2), strict=True):
        ranks, kfac, sgd, ratio = row.strip("| ").split(" | ")
        assert int(ranks) == num_ranks
        assert float(ratio) == pytest.approx(float(kfac) / float(sgd), abs=0.006, rel=0.02)
    for optimizer in ("kfac", "sgd"):
        points = json.loads((tmp_path / optimizer / "scaling.json").read_text(encoding="utf-8"))
        assert [(point["num_ranks"], point["batch_size"]) for point in points] == [(1, 32), (2, 64)]


@pytest.mark.mpi
def test_a_plan_beside_training(run_benchmark: Callable[..., Any], tmp_path: Path) -> None:
    small = [
        "--model",
        "resnet8",
        "--image-size",
        "8",
        "--batch",
        "4",
        "--slots",
        "2",
        "--ranks",
        "1",
        "2",
        "--cores",
        "1",
    ]
    short = ["--intervals", "0", "1", "--iterations", "2", "--turn-count", "1", "--seconds", "0.001"]
    finished = run_benchmark("plan.py", *small, *short, "--output", tmp_path / "plan")
    assert finished.returncode == 0, finished.stderr
    record, text = read_record(tmp_path / "plan")
    assert record["environment"]["num_ranks"] == 1
    for optimizer in ("sgd", "kfac1"):
        for ranks in (1, 2):
            assert f"| {optimizer} | {ranks} | " in text


def test_listing_a_tree(run_benchmark: Callable[..., Any], tmp_path: Path) -> None:
    sizes = ["--classes", "2", "--images", "5003", "--rounds", "1"]  # in all as many as are worth a cache
    finished = run_benchmark("listing.py", *sizes, "--output", tmp_path / "listing")
    assert finished.returncode == 0, finished.stderr
    record, text = read_record(tmp_path / "listing")
    assert record["results"]["images"] == 10_006
    assert record["results"]["bytes"] > 10_006 * len("n00000000/n00000000_00000.JPEG")
    assert {form: len(rounds) for form, rounds in record["results"]["seconds_until_listed"].items()} == {
        "walk": 1, "write": 1, "read": 1,
    }  # fmt: skip
    assert "10,006 empty files in 2 class folders" in text


@pytest.mark.slow
@pytest.mark.mpi
def test_a_start(run_benchmark: Callable[..., Any], tmp_path: Path) -> None:
    config = [ROOT / "configs/quickstart.yaml", "train.epochs=2", "schedule.end_epoch=2"]
    sizes = ["--ranks", "1", "--trials", "1", "--output", tmp_path / "start"]
    finished = run_benchmark("start.py", *config, *sizes, timeout=120)
    assert finished.returncode == 0, finished.stderr
    results = read_record(tmp_path / "start")[0]["results"]
    (trial,) = results["seconds"]["1"]["this checkout"]
    assert 0 < trial["iteration"] < trial["first"] < trial["tenth"]
    (imports,) = results["import_seconds"]["this checkout"]
    assert imports["torch"] > imports["kfac_dist"] > 0
    calls = results["file_calls"]["this checkout"]
    assert calls is None or 0 < calls["Python modules"] < calls["opened"] < calls["all"]


@pytest.mark.slow
@pytest.mark.mpi
def test_a_start_of_what_fails_is_named(run_benchmark: Callable[..., Any]) -> None:
    config = [ROOT / "configs/quickstart.yaml", "train.epochs=1", "schedule.end_epoch=1"]
    finished = run_benchmark("start.py", *config, "--ranks", "1", "--trials", "1")
    assert finished.returncode == 2
    assert finished.stderr == "error: CONFIG must train for at least 20 iterations; its job ended with 0 after 12\n"


@pytest.mark.slow
@pytest.mark.mpi
def test_a_killed_run_trains_again(run_benchmark: Callable[..., Any], tmp_path: Path) -> None:
    config = [ROOT / "configs/quickstart.yaml", "train.epochs=60", "schedule.end_epoch=60"]
    finished = run_benchmark("restart.py", *config, "--trials", "1", "--output", tmp_path / "restart", timeout=200)
    assert finished.returncode == 0, finished.stderr
    results = read_record(tmp_path / "restart")[0]["results"]
    assert len(results["seconds_until_ended"]) == len(results["seconds_until_training"]) == 1
    assert 0 < results["seconds_until_ended"][0] < results["seconds_until_training"][0]


@pytest.mark.slow
def test_loaders(run_benchmark: Callable[..., Any], tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    generator = np.random.default_rng(0)
    for number in range(3):
        pixels = generator.integers(256, size=(40, 48, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(photos / f"{number}.jpg")
    sizes = ["--images", "64", "--rounds", "1", "--workers", "1"]
    finished = run_benchmark("loaders.py", photos, *sizes, "--output", tmp_path / "out" / "loaders")
    assert finished.returncode == 0, finished.stderr
    record, _ = read_record(tmp_path / "out" / "loaders")
    assert record["environment"]["command"].startswith("python benchmarks/loaders.py photos --images")
    assert {"torchvision", "ImageFolder + DataLoader"} <= set(record["results"])
    for rates in record["results"].values():
        assert rates["images_per_second"] > 0
        assert rates["images_per_processor_second"] == rates["rounds"][0]["images_per_processor_second"] > 0
