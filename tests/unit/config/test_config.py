"""Configuration: what is accepted, what is refused and in which words, and that nothing else can happen."""

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from kfac_dist.config import strict_yaml
from kfac_dist.config.kfac import damping_decay_rate
from kfac_dist.config.load import batch_slots, check_resumable, check_same, load_config, warnings_of
from kfac_dist.config.schema import Config
from kfac_dist.errors import InputError
from tests.paths import CONFIGS

VALID: dict[str, Any] = {
    "run": {"name": "test"},
    "data": {"name": "digits"},
    "model": {"name": "digits_cnn"},
    "batch": {"global_size": 128, "per_rank": 64},
    "train": {"epochs": 6},
    "optimizer": {"name": "kfac", "learning_rate": 0.03, "momentum": 0.9},
    "kfac": {"damping": {"initial": 0.1, "target": 0.001, "warmup_steps": 10, "batchnorm_ratio": 16}},
    "schedule": {"kind": "polynomial", "power": 2, "start_epoch": 0, "end_epoch": 6},
}


@pytest.fixture
def valid_file(tmp_path: Path) -> Path:
    return write(tmp_path, strict_yaml.dump(VALID))


def write(folder: Path, text: str) -> Path:
    path = folder / "config.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def problems(path: Path, *overrides: str) -> list[str]:
    """The lines of the error, without its heading."""
    with pytest.raises(InputError) as caught:
        load_config(path, overrides)
    heading, *lines = str(caught.value).splitlines()
    assert heading.startswith(f"{path}: {len(lines)} problem")
    return [line.strip() for line in lines]


def test_values_and_defaults(valid_file: Path) -> None:
    config = load_config(valid_file)
    assert config.kfac is not None
    assert config.kfac.damping.initial == 0.1
    assert config.schedule.kind == "polynomial"
    assert type(config.train.epochs) is float
    assert config.train.epochs == 6.0
    # every default that there is
    assert (config.run.output_dir, config.run.seed, config.run.device) == ("runs", 0, "auto")
    assert config.data.model_dump() == {"name": "digits", "train_limit": None, "eval_limit": None}
    assert (config.train.evaluate_every, config.train.precision) == (1.0, "fp32")
    assert config.optimizer.weight_decay == 0.0
    assert (config.kfac.batchnorm, config.kfac.ema_decay, config.kfac.skip) == ("diagonal", None, ())
    assert (config.kfac.refresh.schedule, config.kfac.refresh.interval) == ("every", 1)
    assert config.schedule.warmup_epochs == 0.0
    assert config.augment.model_dump() == {"pad_crop": 0, "flip": False, "mixup_alpha": 0.0, "erasing": None}
    assert config.weight_rescaling == "off"
    assert config.communication.model_dump() == {
        "backend": "auto",
        "reduce_scatter": "auto",
        "factor_precision": "fp32",
        "gradient_precision": "fp32",
    }


def test_is_frozen(valid_file: Path) -> None:
    config = load_config(valid_file)
    with pytest.raises(ValueError, match="frozen"):
        config.train.epochs = 3.0


@pytest.mark.parametrize(
    "path", sorted(set(CONFIGS.rglob("*.yaml")) - set(CONFIGS.glob("study/*"))), ids=lambda path: path.stem
)
def test_shipped_configurations_are_valid(path: Path) -> None:
    config = load_config(path)
    assert load_config(path).to_yaml() == config.to_yaml()
    assert batch_slots(config, 2) >= 1


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("optimizer.learning_rate=1e-3", "optimizer.learning_rate", 0.001),
        ("optimizer.learning_rate=1", "optimizer.learning_rate", 1.0),
        ("optimizer.weight_decay=5.E-4", "optimizer.weight_decay", 0.0005),
        ("weight_rescaling=off", "weight_rescaling", "off"),
        ("run.name=on", "run.name", "on"),
        ("run.name='123'", "run.name", "123"),
        ("run.name=2026-11-21", "run.name", "2026-11-21"),
        ("run.output_dir=/a=b", "run.output_dir", "/a=b"),
        ("run.seed=010", "run.seed", 10),
        ("augment.flip=true", "augment.flip", True),
        ("kfac.skip=[fc, 'conv*']", "kfac.skip", ("fc", "conv*")),
        ("kfac.ema_decay=0.95", "kfac.ema_decay", 0.95),
        ("kfac.ema_decay=null", "kfac.ema_decay", None),
        ("kfac.ema_decay=", "kfac.ema_decay", None),
        (
            "augment.erasing={probability: 0, area: [0.1, 1], aspect: [1, 3]}",
            "augment.erasing.area",
            (0.1, 1.0),
        ),
        ("schedule={kind: cosine, end_epoch: 9}", "schedule.end_epoch", 9.0),
        (
            "kfac.damping={initial: 1, target: 1, warmup_steps: 0, batchnorm_ratio: 1}",
            "kfac.damping.target",
            1.0,
        ),
        ("kfac.damping.warmup_steps=4", "kfac.damping.warmup_steps", 4),  # alpha is exactly 1
    ],
)
def test_overrides(valid_file: Path, override: str, key: str, value: object) -> None:
    found: Any = load_config(valid_file, [override])
    for part in key.split("."):
        found = getattr(found, part)
    assert found == value
    assert type(found) is type(value)


def test_overrides_make_sections_and_build_on_one_another(valid_file: Path) -> None:
    erasing = [f"augment.erasing.{item}" for item in ("probability=0.5", "area=[0.02, 0.25]", "aspect=[0.3, 1]")]
    config = load_config(valid_file, [*erasing, "schedule={kind: cosine, end_epoch: 9}", "schedule.warmup_epochs=2"])
    assert config.augment.erasing is not None
    assert config.augment.erasing.aspect == (0.3, 1.0)
    assert (config.schedule.kind, config.schedule.warmup_epochs) == ("cosine", 2.0)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("train.epochs=2", "train.epochs=3"),
        ("train.epochs=2", " train.epochs=2"),
        ("schedule.warmup_epochs=2", "schedule={kind: cosine, end_epoch: 9}"),
    ],
)
def test_an_override_that_undoes_another_is_refused(valid_file: Path, first: str, second: str) -> None:
    (line,) = problems(valid_file, first, second)
    assert line == f"override {second!r} undoes an earlier one, {first!r}: leave out one of them"


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        # unknown keys
        (
            "optimizer.lerning_rate=1",
            "optimizer.lerning_rate is not a known key; did you mean optimizer.learning_rate?",
        ),
        ("batchnorm=full", "batchnorm is not a known key; did you mean kfac.batchnorm?"),
        ("optimiser.name=sgd", "optimiser is not a known key; did you mean optimizer?"),
        ("kfka=1", "kfka is not a known key; did you mean kfac?"),
        (
            "optimizer.xyz.name=1",
            "optimizer.xyz is not a known key; known keys of optimizer: name, learning_rate, momentum, weight_decay, "
            "decayed",
        ),
        (
            "model.xyz=1",
            "model.xyz is not a known key; known keys of model: name, variant, zero_init_last_gamma, initialization, "
            "pretrained",
        ),
        (
            "schedule.kind=constant",
            "schedule.end_epoch must be left out (schedule.end_epoch=null) when schedule.kind is constant:"
            " it belongs to polynomial, cosine, one_cycle, got 6",
        ),
        (
            "optimizer.nesterov=true",
            "optimizer.nesterov must be left out (optimizer.nesterov=null) when optimizer.name is kfac:"
            " it belongs to sgd, muon, lars, got true",
        ),
        ("optimizer.name=adam", "optimizer.name must be one of 'kfac', 'sgd', 'muon', 'adamw', 'lars', got 'adam'"),
        (
            "schedule={kind: one_cycle, end_epoch: 6, rising: 1}",
            "schedule.rising must be < 1, got 1",
        ),
        (
            "kfac.refresh={schedule: every, threshold: 0.1}",
            "kfac.refresh.threshold must be left out (kfac.refresh.threshold=null) when kfac.refresh.schedule is every:"
            " it belongs to adaptive, got 0.1",
        ),
        ("kfac.refresh.stretch=2", "kfac.refresh.schedule is required; it has no default"),
        (
            "kfac.refresh={schedule: every, stretch: 2}",
            "kfac.refresh.stretch is not a known key; its name is now kfac.refresh.interval_multiplier",
        ),
        # types
        ("train.epochs=true", "train.epochs must be a number, got true"),
        ("train.epochs='6'", "train.epochs must be a number, got '6'"),
        ("train.epochs=", "train.epochs must be a number, got null"),
        ("train.epochs=.inf", "train.epochs must be a finite number, got inf"),
        ("optimizer.learning_rate=.nan", "optimizer.learning_rate must be a finite number, got nan"),
        ("run.seed=1.0", "run.seed must be an integer, got 1.0"),
        ("run.seed=true", "run.seed must be an integer, got true"),
        ("augment.flip=yes", "augment.flip must be true or false, got 'yes'"),
        ("augment.flip=1", "augment.flip must be true or false, got 1"),
        (
            "model.name=3",
            "model.name must be text, got the number 3; quotes make it text (on a command line: \"model.name='...'\")",
        ),
        (
            "run.name=1e3",
            "run.name must be text, got the number 1000.0; quotes make it text (on a command line: \"run.name='...'\")",
        ),
        (
            "run.output_dir=true",
            "run.output_dir must be text, got the truth value true; quotes make it text"
            " (on a command line: \"run.output_dir='...'\")",
        ),
        ("run.name=null", "run.name must be text, got null"),
        ("model=3", "model must be a section, got 3"),
        ("schedule=3", "schedule must be a section, got 3"),
        ("kfac.skip=fc", "kfac.skip must be a list, got 'fc'"),
        ("kfac.skip=[1]", "kfac.skip[0] must be text, got the number 1; quotes make it text"),
        # ranges
        ("kfac.damping.target=-0.1", "kfac.damping.target must be > 0, got -0.1"),
        ("batch.per_rank=0", "batch.per_rank must be > 0, got 0"),
        ("optimizer.momentum=1", "optimizer.momentum must be < 1, got 1"),
        ("optimizer.weight_decay=-1", "optimizer.weight_decay must be >= 0, got -1"),
        ("kfac.ema_decay=1.0", "kfac.ema_decay must be < 1, got 1.0"),
        ("kfac.damping.batchnorm_ratio=0.5", "kfac.damping.batchnorm_ratio must be >= 1, got 0.5"),
        ("kfac.refresh={schedule: every, interval: 0}", "kfac.refresh.interval must be > 0, got 0"),
        ("weight_rescaling=on", "weight_rescaling must be 'always', 'cap' or 'off', got 'on'"),
        ("model.name=''", "model.name must not be empty, got ''"),
        (
            "run.name=/",
            "run.name must start with a letter or digit, and hold only letters, digits and . _ + -, got '/'",
        ),
        ('run.output_dir="a\\0b"', "run.output_dir must hold printable characters only, got 'a\\x00b'"),
        ("schedule.kind=x", "schedule.kind must be one of 'polynomial', 'cosine', 'one_cycle', 'constant', got 'x'"),
        ("schedule.kind=1", "schedule.kind must be one of 'polynomial', 'cosine', 'one_cycle', 'constant', got '1'"),
        # one key against another
        ("kfac=null", "kfac must be given when optimizer.name is kfac, got null"),
        (
            "run.output_dir=~nobody-of-this-name/x",
            "run.output_dir must not start with the home folder of a user whom this machine does not know,"
            " got '~nobody-of-this-name/x'",
        ),
        (
            "data.name=svhn",
            "data.root must name the folder that holds svhn (train_32x32.mat, test_32x32.mat), got null",
        ),
        (
            "data.root=/x",
            "data.root must be left out (data.root=null) when data.name is digits: the digits come with scikit-learn,"
            " got '/x'",
        ),
        (
            "batch.per_rank=50",
            "batch.per_rank must divide batch.global_size = 128 (it divides 100 and 150), got 50",
        ),
        (
            "batch.per_rank=200",
            "batch.per_rank must divide batch.global_size = 128 (it divides 200), got 200",
        ),
        ("kfac.damping.target=0.2", "kfac.damping.target must be <= kfac.damping.initial = 0.1, got 0.2"),
        ("schedule.end_epoch=0.0", "schedule.end_epoch must be > 0, got 0.0"),
        ("schedule.start_epoch=6", "schedule.end_epoch must be > schedule.start_epoch = 6.0, got 6"),
        (
            "schedule={kind: cosine, end_epoch: 2, warmup_epochs: 2}",
            "schedule.warmup_epochs must be < schedule.end_epoch = 2.0, got 2",
        ),
        (
            "kfac.damping.warmup_steps=3",
            "kfac.damping.warmup_steps must be >= 4 for a damping that goes from 0.1 to 0.001"
            " (to keep it constant: 0, and target equal to initial), got 3",
        ),
        # overrides that are none
        ("train.epochs", "override 'train.epochs' must be dotted.key=value, such as train.epochs=2"),
        ("=3", "override '=3' must be dotted.key=value, such as train.epochs=2"),
        ("train..epochs=3", "override 'train..epochs=3' must be dotted.key=value, such as train.epochs=2"),
        ("run.name.x=3", "override 'run.name.x=3': run.name is a value, not a section"),
    ],
)
def test_one_problem(valid_file: Path, override: str, problem: str) -> None:
    assert problem in problems(valid_file, override)


@pytest.mark.parametrize(
    ("area", "problem"),
    [
        ("[0.5, 0.1]", "augment.erasing.area must be [low, high] with low <= high, got [0.5, 0.1]"),
        ("[0.5]", "augment.erasing.area[1] is missing from the list"),
        ("[0.1, 0.2, 0.3]", "augment.erasing.area must be a list of 2, got [0.1, 0.2, 0.3]"),
        ("[0.1, 1.5]", "augment.erasing.area[1] must be <= 1, got 1.5"),
        ("0.1", "augment.erasing.area must be a list, got 0.1"),
    ],
)
def test_ranges(valid_file: Path, area: str, problem: str) -> None:
    override = f"augment.erasing={{probability: 0.5, area: {area}, aspect: [0.3, 1]}}"
    assert problems(valid_file, override) == [problem]


def test_a_section_that_is_not_used_is_refused(valid_file: Path) -> None:
    (line,) = problems(valid_file, "optimizer.name=sgd")
    assert line.startswith("kfac must be left out (kfac=null) when optimizer.name is sgd")
    assert load_config(valid_file, ["optimizer.name=sgd", "kfac=null"]).kfac is None


def test_all_problems_at_once(tmp_path: Path) -> None:
    broken = copy.deepcopy(VALID)
    broken["optimizer"]["lerning_rate"] = broken["optimizer"].pop("learning_rate")
    broken["kfac"]["damping"]["target"] = -0.1
    broken["batch"]["per_rank"] = 50
    broken["data"]["name"] = "cifar10"
    del broken["model"]
    lines = problems(write(tmp_path, strict_yaml.dump(broken)), "train.epochs=x", "seed")
    assert sorted(line.split()[0] for line in lines) == [
        "batch.per_rank",
        "data.root",
        "kfac.damping.target",
        "model",
        "optimizer.learning_rate",
        "optimizer.lerning_rate",
        "override",
        "train.epochs",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1, 2", "config.yaml, line 1, column 9: cannot be read as YAML"),
        ("run:\n\tname: x", "line 2, column 1: cannot be read as YAML"),
        ("a: &x 1\nb: *x", "line 1, column 4: cannot be read as YAML: anchors"),
        ("b: *x", "aliases (*) are not accepted"),
        ("a: !!python/object/apply:os.system [x]", "tags (!) are not accepted"),
        ("a: 1\nb: 2\na: 3", "line 3, column 1: cannot be read as YAML: the key 'a' is given twice"),
        ("1: a", "a key must be text"),
        ("[a]: b", "a key must be text"),
        ("a: 1\n---\nb: 2", "expected a single document"),
        ("a: " + "[" * 30, "nested more than 20 levels deep"),
        ("a: " + "9" * 5000, "an integer of 5000 digits"),
        ('a: "\\UFFFFFFFF"', "cannot be read as YAML"),
        ('a: "\\ud800"', "half a character"),
        ("a: \x07", "the character U+0007"),
        ("", "is empty; a configuration is a mapping of sections"),
        ("- a", "a configuration is a mapping of sections"),
        ("hello", "holds no mapping but"),
        ("a: " + "x" * strict_yaml.MAX_FILE_BYTES, "is larger than 1000000 bytes"),
    ],
    ids=range(18),
)
def test_files_that_are_not_a_configuration(tmp_path: Path, text: str, message: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(InputError) as caught:
        load_config(path)
    assert str(caught.value).startswith(str(path))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"missing\.yaml: no such file"):
        load_config(tmp_path / "missing.yaml")
    with pytest.raises(InputError, match="is a directory"):
        load_config(tmp_path)
    with pytest.raises(InputError, match="cannot be read"):
        load_config("a\0b")
    (tmp_path / "latin.yaml").write_bytes("a: é".encode("latin-1"))
    with pytest.raises(InputError, match=r"is not UTF-8 text \(byte 0xe9 at 3\)"):
        load_config(tmp_path / "latin.yaml")


def test_damping_decay_rate_is_eq_13() -> None:
    assert damping_decay_rate(0.1, 0.001, 100) == pytest.approx(0.04, rel=1e-15)
    assert damping_decay_rate(0.1, 0.001, 4) == 1.0
    assert damping_decay_rate(0.02, 0.02, 0) == damping_decay_rate(0.02, 0.02, 10) == 0.0
    for warmup_steps in (3, 0):
        with pytest.raises(InputError, match="warmup_steps must be >= 4 for a damping that goes from"):
            damping_decay_rate(0.1, 0.001, warmup_steps)
    with pytest.raises(InputError, match=r"target must be <= kfac\.damping\.initial = 0.001, got 0.1"):
        damping_decay_rate(0.001, 0.1, 100)


@pytest.mark.parametrize(("num_ranks", "slots"), [(1, 12), (2, 6), (3, 4), (4, 3), (12, 1)])
def test_batch_slots(valid_file: Path, num_ranks: int, slots: int) -> None:
    config = load_config(valid_file, ["batch.global_size=96", "batch.per_rank=8"])
    assert batch_slots(config, num_ranks) == slots


@pytest.mark.parametrize(
    ("num_ranks", "nearest", "ranks"),
    [(5, "80 and 120", "4 and 6"), (7, "56 and 112", "6 and 12"), (13, "104", "12"), (64, "512", "12")],
)
def test_batch_slots_names_what_works(valid_file: Path, num_ranks: int, nearest: str, ranks: str) -> None:
    config = load_config(valid_file, ["batch.global_size=96", "batch.per_rank=8"])
    with pytest.raises(InputError) as caught:
        batch_slots(config, num_ranks)
    unit = 8 * num_ranks
    assert f"8 x {num_ranks} = {unit}, got 96; nearest sizes that work: {nearest}; " in str(caught.value)
    assert str(caught.value).endswith(f"nearest numbers of ranks that work with 96: {ranks}")
    for size in nearest.split(" and "):
        assert int(size) % unit == 0
    for number in ranks.split(" and "):
        assert batch_slots(config, int(number)) == 12 // int(number)


def test_batch_slots_answers_at_once_for_any_batch(valid_file: Path) -> None:
    config = load_config(valid_file, [f"batch.global_size={2 * (2**61 - 1)}", "batch.per_rank=1"])  # twice a prime
    with pytest.raises(InputError, match=f"ranks that work with {2 * (2**61 - 1)}: 2$"):
        batch_slots(config, 3)


@pytest.mark.parametrize(
    ("num_train", "times"), [(129, None), (128, None), (127, "1.008 times"), (64, "2 times"), (1, "128 times")]
)
def test_a_batch_beyond_the_training_set_is_told(valid_file: Path, num_train: int, times: str | None) -> None:
    texts = warnings_of(load_config(valid_file), num_train)
    assert len(texts) == (times is not None)
    if times:
        assert f"batch.global_size = 128 is more than the {num_train} training images" in texts[0]
        assert f"sees each of them {times} on average" in texts[0]
        assert ("train.epochs = 6, so this run is a single iteration" in texts[0]) == (num_train == 1)


def test_a_learning_rate_that_is_zero_before_the_end_is_told(valid_file: Path) -> None:
    assert warnings_of(load_config(valid_file, ["train.epochs=5"]), 1438) == []
    (text,) = warnings_of(load_config(valid_file, ["train.epochs=10"]), 1438)
    assert "the learning rate is 0 from epoch 6 on" in text
    assert "set schedule.end_epoch=10" in text


@pytest.mark.parametrize(("fraction", "is_told"), [(0.1, True), (0.2, True), (0.25, False), (0.3, False), (1.0, False)])
def test_less_than_one_sample_of_a_slot_is_told(valid_file: Path, fraction: float, is_told: bool) -> None:
    config = load_config(valid_file, ["batch.per_rank=4", f"kfac.sample_fraction={fraction}"])
    share = f"kfac.sample_fraction = {fraction:g} of batch.per_rank = 4 is less than one image: A and G are computed"
    assert [text[: len(share)] for text in warnings_of(config, 1438)] == [share] * is_told
    assert all(text.endswith("a share of 0.25") for text in warnings_of(config, 1438))


def test_a_run_from_before_a_key_was_there_goes_on(valid_file: Path) -> None:
    config = load_config(valid_file)
    saved = "".join(line for line in config.to_yaml().splitlines(True) if "sample_fraction" not in line)
    assert saved != config.to_yaml()
    check_resumable(saved, config)
    with pytest.raises(InputError, match=r"\n  kfac.sample_fraction: 1.0 when it was saved, 0.5 now$"):
        check_resumable(saved, load_config(valid_file, ["kfac.sample_fraction=0.5"]))
    with pytest.raises(
        InputError, match=r"\n  gone: 1 when it was saved, absent now\n  kfac.sample_fraction: absent when"
    ):
        check_resumable(f"{saved}gone: 1\n", config)


@pytest.mark.parametrize(("ranks", "per_rank", "remedy"), [(4, 64, "; or set batch.per_rank=32$"), (3, 16, "2 and 4$")])
def test_ranks_that_do_not_fit_are_told_what_does(valid_file: Path, ranks: int, per_rank: int, remedy: str) -> None:
    config = load_config(valid_file, ["batch.global_size=128", f"batch.per_rank={per_rank}"])
    with pytest.raises(InputError, match=remedy):
        batch_slots(config, ranks)


WORDS = st.text(st.characters(codec="utf-8").filter(str.isprintable), max_size=8)
SCALARS = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), WORDS)
KEYS = st.one_of(st.sampled_from([key for section in VALID.values() for key in section]), WORDS)
TREES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=8,
)


def dotted_keys(tree: dict[str, Any], prefix: str = "") -> list[str]:
    keys = []
    for key, value in tree.items():
        keys.append(prefix + key)
        if isinstance(value, dict):
            keys += dotted_keys(value, f"{prefix}{key}.")
    return keys


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


def load_or_refuse(path: Path, overrides: list[str]) -> Config | None:
    try:
        config = load_config(path, overrides)
    except InputError as error:
        str(error).encode("utf-8")
        return None
    assert load_config(write(path.parent, config.to_yaml())) == config
    return config


@settings(max_examples=100, deadline=None)
@given(st.dictionaries(st.sampled_from(dotted_keys(VALID)), TREES, min_size=1, max_size=3))
def test_fuzz_of_a_valid_configuration(folder: Path, changes: dict[str, object]) -> None:
    tree = copy.deepcopy(VALID)
    for dotted, value in changes.items():
        section: Any = tree
        *parents, last = dotted.split(".")
        for parent in parents:
            section = section.get(parent) if isinstance(section, dict) else None
        if isinstance(section, dict):
            section[last] = value
    load_or_refuse(write(folder, yaml.safe_dump(tree)), [])


@settings(max_examples=100, deadline=None)
@given(
    st.one_of(st.text(), st.text(alphabet="ab:- \n{}[],\"'&*!|>%#?\\ux0.1e\t=<~")),
    st.lists(st.text(), max_size=2),
)
def test_fuzz_of_text(folder: Path, text: str, overrides: list[str]) -> None:
    (folder / "config.yaml").write_bytes(text.encode("utf-8"))
    assert load_or_refuse(folder / "config.yaml", overrides) is None


@settings(max_examples=100, deadline=None)
@given(st.binary())
def test_fuzz_of_bytes(folder: Path, content: bytes) -> None:
    (folder / "config.yaml").write_bytes(content)
    assert load_or_refuse(folder / "config.yaml", []) is None


@settings(max_examples=100, deadline=None)
@given(st.dictionaries(KEYS, TREES, max_size=4))
def test_written_yaml_reads_back_the_same(tree: dict[str, object]) -> None:
    # as repr, because nan is not equal to itself
    assert repr(strict_yaml.parse(strict_yaml.dump(tree), "text")) == repr(tree)


@settings(max_examples=100, deadline=None)
@given(
    st.fixed_dictionaries(
        {
            "optimizer.learning_rate": st.floats(1e-300, 1e300),
            "run.seed": st.integers(0, 2**63 - 1),
            "model.name": WORDS.filter(bool),
            "kfac.skip": st.lists(WORDS.filter(bool), max_size=3),
            "augment.flip": st.booleans(),
        }
    )
)
def test_round_trip_of_valid_values(folder: Path, changes: dict[str, Any]) -> None:
    tree = copy.deepcopy(VALID) | {"augment": {}}
    for key, value in changes.items():
        section, name = key.split(".")
        tree[section][name] = value
    config = load_or_refuse(write(folder, strict_yaml.dump(tree)), [])
    assert config is not None
    assert config.kfac is not None
    assert config.optimizer.learning_rate == changes["optimizer.learning_rate"]
    assert config.run.seed == changes["run.seed"]
    assert config.model.name == changes["model.name"]
    assert config.kfac.skip == tuple(changes["kfac.skip"])
    assert config.augment.flip is changes["augment.flip"]


def test_ranks_with_another_configuration_are_refused_naming_rank_and_lines() -> None:
    def shared(*overrides: str) -> bytes:
        return load_config(CONFIGS / "cifar10" / "kfac_resnet20.yaml", overrides).shared_yaml().encode()

    check_same([shared(), shared("data.root=/scratch/node7")])  # where the data lie is each node's own
    with pytest.raises(
        InputError, match=r"rank 2's \(\+\).*\n  -train: {epochs: 30.*\n  \+train: {epochs: 7.*\ngive every"
    ):
        check_same([shared(), shared(), shared("train.epochs=7")])
