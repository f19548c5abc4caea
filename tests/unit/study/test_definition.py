"""Studies: what is accepted and refused, budget rules, grids, links, and that a planned study stays as it was."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kfac_dist.data.sampling import SlotSampler
from kfac_dist.errors import InputError
from kfac_dist.study.definition import Axis, FixedIterations, load_study
from kfac_dist.study.manifest import StudyFolder
from kfac_dist.study.trials import budget_epochs, plan_trials
from tests.paths import CONFIGS
from tests.unit.study.studies import write_study


def problems(tmp_path: Path, changes: dict[str, Any]) -> list[str]:
    with pytest.raises(InputError) as caught:
        load_study(write_study(tmp_path, changes))
    return [line.strip() for line in str(caught.value).splitlines()[1:]]


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"batch_sizes": [100]}, "batch_sizes[0] must be a power of two >= 128, got 100"),
        ({"batch_sizes": [64]}, "batch_sizes[0] must be a power of two >= 128, got 64"),
        ({"batch_sizes": [128, 128]}, "batch_sizes must not hold a value twice, got [128, 128]"),
        ({"models": []}, "models must not be empty, got []"),
        ({"optimizers": {}}, "optimizers"),
        ({"budget": {"rule": "fixed_epochs", "base": 3}}, "budget.base must be left out"),
        ({"budget": {"rule": "epochs"}}, "budget.rule must be one of 'adjusted_epochs', 'fixed_epochs'"),
        ({"seed": 3}, "seed is not a known key; did you mean seeds?"),
        ({"optimizers/sgd/grid/learning_rate/lowest": 0.1}, "optimizers.sgd.grid.learning_rate.count must be left out"),
        (
            {"optimizers/kfac/grid/damping/lowest": 0.2},
            "optimizers.kfac.grid.damping.count must be >= 2, with lowest < highest, where no values are listed",
        ),
        ({"optimizers/sgd/grid/learning_rate/key": None}, "optimizers.sgd.grid.learning_rate.key is required"),
        ({"targets": [{"metric": "loss", "value": 1}]}, "targets[0].metric must be 'train_loss' or 'test_top1'"),
        ({"targets": [{"metric": "test_top1", "value": 90}]}, "targets[0].value must be a fraction, at most 1, where"),
        ({"best": {"seeds": [1], "by": "accuracy"}}, "best.by must be 'train_loss' or 'test_top1', got 'accuracy'"),
    ],
)
def test_one_problem(tmp_path: Path, changes: dict[str, Any], problem: str) -> None:
    found = problems(tmp_path, changes)
    assert any(line.startswith(problem) for line in found), found


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"optimizers/sgd/grid/learning_rate/values": [0.1, [1]]}, "values[1] must be a number, got [1]"),
        ({"optimizers/sgd/grid/learning_rate/values": [0.1, True]}, "values[1] must be a number, got true"),
        ({"optimizers/kfac/grid/damping/count": "x"}, "count must be an integer, got 'x'"),
        ({"optimizers/kfac/grid/damping/lowest": -1}, "lowest must be > 0, got -1"),
    ],
)
def test_a_wrong_value_of_a_grid_is_told_once(tmp_path: Path, changes: dict[str, Any], problem: str) -> None:
    """Defect: as `values[1].int` and `values[1].float`, and with a `count` that was said to be missing."""
    (found,) = problems(tmp_path, changes)
    assert found.endswith(problem)


def test_all_problems_at_once(tmp_path: Path) -> None:
    assert len(problems(tmp_path, {"batch_sizes": [3], "models": [1], "seeds": [-1]})) == 3


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"recipe/trian": {}}, "trian is not a known key; did you mean train?"),
        ({"optimizers/sgd/grid/learning_rate/key": "optimizer.lerning_rate"}, "did you mean optimizer.learning_rate?"),
        ({"linked/batch.per_rank": {"of": "batch.size"}}, "linked: of must be iterations or a key that is a number"),
        ({"linked/run.name.x": {"of": "iterations"}}, "run.name.x: run.name is a value, not a section"),
        ({"linked/batch.per_rank": {"of": "batch.global_size", "times": 0.4}}, "must divide batch.global_size = 128"),
    ],
)
def test_trials_that_are_no_configurations(tmp_path: Path, changes: dict[str, Any], problem: str) -> None:
    study = load_study(write_study(tmp_path, changes))
    with pytest.raises(InputError, match=r"\d of 8 trials cannot be run; the first:\nmodel digits_cnn") as caught:
        plan_trials(study)
    assert problem in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"grid/passes": {"key": "train.epochs", "values": [5, 9]}}, r"leave train\.epochs to budget of the study"),
        ({"linked": {"train.epochs": {"of": "train.epochs", "times": 3}}}, r"leave train\.epochs to budget"),
        (
            {
                "linked": {
                    "optimizer.weight_decay": {"of": "optimizer.momentum"},
                    "batch.slot_size": {"of": "batch.per_rank"},
                    "optimizer.momentum": {"of": "iterations", "times": 0.001},
                },
                "settings": {"optimizer.name": "sgd"},
            },
            r"linked: optimizer\.weight_decay must come after optimizer\.momentum, which it follows",
        ),
    ],
)
def test_no_key_is_set_in_vain(tmp_path: Path, changes: dict[str, Any], problem: str) -> None:
    """Defect: a grid over epochs trained all its configurations alike, and told them as different."""
    path = write_study(tmp_path, {f"optimizers/sgd/{key}": value for key, value in changes.items()})
    with pytest.raises(InputError, match=problem):
        plan_trials(load_study(path))


def test_a_grid_of_some_integers_is_one_of_numbers() -> None:
    """Defect: a key linked to the learning rates 0.5 and 1, 0.6 times each, became 0.3 and 1."""
    values = Axis(key="optimizer.learning_rate", values=(0.5, 1)).points()
    assert [type(value) for value in values] == [float, float]


def test_each_problem_is_told_once(tmp_path: Path) -> None:
    """Defect: only the first trial's was, and the next one after that had been mended."""
    changes: dict[str, Any] = {"optimizers/sgd/settings": {"optimizer": {"name": "sgd"}}}
    changes |= {"optimizers/kfac/settings/kfac.damping.batchnorm_ratio": -1}
    with pytest.raises(InputError, match=r"^8 of 8 trials cannot be run; the first:\nmodel digits_cnn") as caught:
        plan_trials(load_study(write_study(tmp_path, changes)))
    assert str(caught.value).count("optimizer.momentum is required") == 1
    assert str(caught.value).count("kfac.damping.batchnorm_ratio must be >= 1, got -1") == 1


def test_a_problem_of_two_optimizers_is_told_of_both(tmp_path: Path) -> None:
    """Defect: of the first alone, and of the other after that had been mended."""
    changes = {f"optimizers/{label}/settings/optimizer": {"name": label} for label in ("sgd", "kfac")}
    with pytest.raises(InputError, match=r"^8 of 8 trials cannot be run") as caught:
        plan_trials(load_study(write_study(tmp_path, changes)))
    assert str(caught.value).count("optimizer.momentum is required") == 2


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"optimizers/sgd/settings/train": {"epochs": 7}}, "sgd must leave train.epochs to budget"),
        ({"optimizers/sgd/settings/batch.global_size": 64}, "sgd must leave batch.global_size to batch_sizes"),
        ({"optimizers/sgd/grid/seed": {"key": "run.seed", "values": [3, 4]}}, "sgd must leave run.seed to seeds and"),
        ({"linked/model.name": {"of": "iterations"}}, "kfac must leave model.name to models"),
        (
            {"optimizers/sgd/grid/rate": {"key": "optimizer.learning_rate", "values": [0.3]}},
            "optimizers.sgd.grid must not have optimizer.learning_rate twice",
        ),
        (
            {"optimizers/sgd/linked": {"optimizer.learning_rate": {"of": "batch.global_size", "times": 0.001}}},
            "optimizers.sgd must have optimizer.learning_rate in settings, in grid or in linked, not in two",
        ),
        (
            {"optimizers/sgd/settings/batch.per_rank": 64},
            "optimizers.sgd must have batch.per_rank in settings, in grid or in linked, not in two",
        ),
    ],
)
def test_a_value_that_would_be_lost_is_refused(tmp_path: Path, changes: dict[str, Any], problem: str) -> None:
    """Defect: another value took its place, and results were told under the one that was given."""
    with pytest.raises(InputError) as caught:
        plan_trials(load_study(write_study(tmp_path, changes)))
    assert problem in str(caught.value)


def test_a_model_that_there_is_not(tmp_path: Path) -> None:
    """Defect: all trials were planned, and failed."""
    with pytest.raises(InputError, match=r"must be a known model, got 'digit_cnn'; close to it: digits_cnn"):
        plan_trials(load_study(write_study(tmp_path, {"models": ["digit_cnn"]})))


def test_all_columns_have_the_same_data(tmp_path: Path) -> None:
    study = load_study(write_study(tmp_path, {"optimizers/sgd/settings/data.train_limit": 100}))
    with pytest.raises(InputError, match=r"optimizers\.sgd must leave the data .*, got data\.train_limit"):
        plan_trials(study)


def test_seeds_of_the_best_are_other_seeds(tmp_path: Path) -> None:
    study = load_study(write_study(tmp_path, {"best": {"seeds": [1, 0]}}))
    with pytest.raises(InputError, match=r"best\.seeds must not hold a seed of seeds"):
        plan_trials(study)


ADJUSTED = {"rule": "adjusted_epochs", "base": 100}


@pytest.mark.parametrize(
    ("budget", "batch_size", "epochs", "iterations"),
    [
        # CIFAR-10 of the AAAI 2020 study; iterations are ceil(epochs · 50,000 / batch)
        (ADJUSTED, 128, 100, 39_063),
        (ADJUSTED, 256, 200, 39_063),
        (ADJUSTED, 512, 300, 29_297),
        (ADJUSTED, 1024, 400, 19_532),
        (ADJUSTED, 2048, 500, 12_208),
        (ADJUSTED, 4096, 600, 7_325),
        (ADJUSTED, 8192, 700, 4_273),
        ({"rule": "adjusted_epochs", "base": 20}, 1024, 80, 3_907),
        ({"rule": "fixed_epochs", "epochs": 10}, 4096, 10, 123),
        ({"rule": "fixed_epochs", "epochs": 10}, 512, 10, 977),
        ({"rule": "fixed_iterations", "iterations": 120}, 4096, 9.8304, 120),
        ({"rule": "fixed_iterations", "iterations": 777}, 128, 777 * 128 / 50_000, 777),
    ],
)
def test_budgets(tmp_path: Path, budget: dict[str, Any], batch_size: int, epochs: float, iterations: int) -> None:
    study = load_study(write_study(tmp_path, {"budget": budget}))
    found = budget_epochs(study, batch_size, 50_000)
    assert found == pytest.approx(epochs, rel=1e-12)
    assert SlotSampler(50_000, batch_size, 1, 0).num_iterations(found) == iterations


def test_fixed_iterations_are_met_exactly(tmp_path: Path) -> None:
    study = load_study(write_study(tmp_path))
    for iterations in range(1, 400):
        budget = FixedIterations(rule="fixed_iterations", iterations=iterations)
        study = study.model_copy(update={"budget": budget})
        for batch_size in (128, 2048):
            epochs = budget_epochs(study, batch_size, 1438)
            assert SlotSampler(1438, batch_size, 1, 0).num_iterations(epochs) == iterations


def test_the_papers_grid() -> None:
    axis = Axis(key="kfac.damping.initial", lowest=1e-4, highest=0.2187, count=8)
    assert axis.points() == (0.0001, 0.0003, 0.0009, 0.0027, 0.0081, 0.0243, 0.0729, 0.2187)


def test_trials_in_full(tmp_path: Path) -> None:
    trials = plan_trials(load_study(write_study(tmp_path, {"seeds": [3, 5], "best": {"seeds": [7]}})))
    assert [trial.index for trial in trials] == list(range(20))
    cells = [(trial.batch_size, trial.optimizer, trial.seed) for trial in trials]
    assert cells[:5] == [(128, "sgd", 3), (128, "sgd", 3), (128, "sgd", 5), (128, "sgd", 5), (128, "sgd", 7)]
    assert trials[4].best_of == [0, 1]
    kfac = trials[16]
    assert (kfac.optimizer, kfac.batch_size, kfac.seed) == ("kfac", 256, 3)
    assert kfac.parameters == {"learning_rate": 0.03, "damping": 0.1}
    config = kfac.config
    assert config is not None
    assert config["batch"] == {"global_size": 256, "per_rank": 256}
    # 4 iterations: 0.3 of them are fewer than the 4 that a hundredth of the damping takes
    assert config["kfac"]["damping"] == {"initial": 0.1, "target": 0.001, "warmup_steps": 4, "batchnorm_ratio": 16.0}
    assert (config["schedule"]["end_epoch"], config["train"]["epochs"]) == (2.0, 2.0)
    assert (config["run"]["seed"], config["checkpoint"]["keep_best"], config["train"]["max_restores"]) == (3, False, 0)
    assert trials[0].config is not None
    assert trials[0].config["kfac"] is None


@pytest.mark.parametrize("path", sorted((CONFIGS / "study").glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_studies_are_valid(path: Path) -> None:
    study = load_study(path)
    ends = tuple(sorted({study.batch_sizes[0], study.batch_sizes[-1]}))  # they will do
    study = study.model_copy(update={"batch_sizes": ends})
    trials = plan_trials(study)
    grids: dict[tuple[str, int, str], int] = {}
    for trial in trials:
        if trial.best_of is None and trial.seed == study.seeds[0]:
            key = (trial.model, trial.batch_size, trial.optimizer)
            grids[key] = grids.get(key, 0) + 1
    assert len(set(grids.values())) == 1, "equally many configurations for each optimizer and batch size"
    assert study.best is None or min(grids.values()) >= 12, "a search, not a closer look at what one has found"
    assert {size for _, size, _ in grids} == set(study.batch_sizes)


def test_integers_of_a_grid_stay_integers(tmp_path: Path) -> None:
    """Defect: they became 2.0, which keys that count refuse."""
    axis = {"key": "kfac.refresh.interval", "values": [2, 4]}
    trials = plan_trials(
        load_study(
            write_study(
                tmp_path,
                {"optimizers/kfac/grid/interval": axis, "optimizers/kfac/settings/kfac.refresh.schedule": "every"},
            )
        )
    )
    trial = next(trial for trial in trials if trial.optimizer == "kfac")
    assert trial.config is not None
    assert (trial.parameters["interval"], trial.config["kfac"]["refresh"]["interval"]) == (2, 2)


def test_a_recipe_by_its_path(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text((CONFIGS / "quickstart.yaml").read_text(), encoding="utf-8")
    study = load_study(write_study(tmp_path, {"recipe": "recipe.yaml"}), ["recipe.data.train_limit=256"])
    assert study.recipe["data"] == {"name": "digits", "train_limit": 256}


def test_a_recipe_by_its_name_unless_a_file_is_there(tmp_path: Path) -> None:
    named = write_study(tmp_path, {"recipe": "quickstart"})
    assert load_study(named).recipe["run"] == {"name": "quickstart"}
    with pytest.raises(InputError, match="/quikstart: no such file"):
        load_study(write_study(tmp_path, {"recipe": "quikstart"}))
    (tmp_path / "quickstart").write_text("run: {name: mine}\ndata: {name: digits}\n", encoding="utf-8")
    assert load_study(write_study(tmp_path, {"recipe": "quickstart"})).recipe["run"] == {"name": "mine"}


def test_a_planned_study_stays_as_it_was(tmp_path: Path) -> None:
    folder = StudyFolder(tmp_path / "study")
    study = load_study(write_study(tmp_path))
    trials = folder.write_plan(study)
    before = (folder.path / "manifest.jsonl").read_bytes()
    assert folder.write_plan(study) == trials
    assert folder.read_plan() == (study, trials)
    changed = load_study(write_study(tmp_path, {"budget": {"rule": "fixed_epochs", "epochs": 3}}))
    with pytest.raises(InputError, match=r"holds another study.*\n  budget.epochs: 2.0 when it was planned, 3.0 now"):
        folder.write_plan(changed)
    assert (folder.path / "manifest.jsonl").read_bytes() == before


def test_another_program_with_other_defaults_is_noticed(tmp_path: Path) -> None:
    folder = StudyFolder(tmp_path / "study")
    study = load_study(write_study(tmp_path))
    folder.write_plan(study)
    path = folder.path / "manifest.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines[2]["config"]["train"]["label_smoothing"] = 0.1
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(InputError, match=r"trial 2 differs.*\n  config.train.label_smoothing: 0.1 when .*, 0.0 now"):
        folder.write_plan(study)


def test_a_study_that_was_planned_before_a_key_came_goes_on(tmp_path: Path) -> None:
    """Defect: it was refused as another study, with a remedy that no one can follow."""
    folder = StudyFolder(tmp_path / "study")
    study = load_study(write_study(tmp_path, {"targets": None}))
    trials = folder.write_plan(study)
    plan, definition = folder.path / "manifest.jsonl", folder.path / "study.yaml"
    lines = [json.loads(line) for line in plan.read_text().splitlines()]
    for line in lines:
        if line["config"] is not None and line["config"]["kfac"] is not None:
            del line["config"]["kfac"]["sample_fraction"]
    plan.write_text("".join(json.dumps(line) + "\n" for line in lines))
    definition.write_text(definition.read_text().replace("targets: []\n", ""))
    assert "targets" not in definition.read_text()
    assert folder.write_plan(study) == trials
    lines[-1]["config"]["optimizer"]["learning_rate"] = 7.0
    plan.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(InputError, match=r"\n  config.optimizer.learning_rate: 7.0 when it was planned") as caught:
        folder.write_plan(study)
    assert "sample_fraction" not in str(caught.value), "only what can be set back"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda trial: trial["config"]["train"].update(later=None), "config.train.later: None when .*, absent now"),
        (lambda trial: trial.update(config=5), "trial 2 differs.*\n  config: 5 when it was planned, absent now"),
    ],
)
def test_a_plan_of_a_later_version_names_what_is_unknown(
    change: Callable[[dict[str, Any]], None], told: str, tmp_path: Path
) -> None:
    """Defect: an empty list of differences, or a traceback."""
    folder = StudyFolder(tmp_path / "study")
    study = load_study(write_study(tmp_path))
    folder.write_plan(study)
    path = folder.path / "manifest.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    change(lines[2])
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(InputError, match=told):
        folder.write_plan(study)


def test_a_training_runs_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/metrics.jsonl").touch()
    with pytest.raises(InputError, match="run holds a training run; choose another --folder"):
        StudyFolder(tmp_path / "run").write_plan(load_study(write_study(tmp_path)))
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["metrics.jsonl"]
