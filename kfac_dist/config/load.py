"""Reading a configuration: a YAML file and ``dotted.key=value`` overrides become one validated `Config`.

All problems of a configuration are reported at once, each as the dotted key, the rule and the value found.
"""

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from kfac_dist.config import strict_yaml
from kfac_dist.config.data import own_data_set
from kfac_dist.config.dotted import leaves, section_of_
from kfac_dist.config.messages import describe
from kfac_dist.config.recipes import find_configuration
from kfac_dist.config.schema import Config, config_with, nearest_multiples
from kfac_dist.errors import InputError


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a configuration file, apply overrides in order, and validate the result.

    Args:
        path: YAML file, or the name of a recipe, such as ``imagenet/bs4k``.
        overrides: ``dotted.key=value`` each, the value in YAML; absent sections are made, no key is given twice.

    Returns:
        The validated configuration.

    Raises:
        InputError: If the file cannot be read, or naming every other problem at once, one on a line.
    """
    settings = strict_yaml.read_mapping(find_configuration(path))
    problems = apply_overrides_(settings, overrides)
    return create_config(settings, str(path), problems)


def create_config(settings: Mapping[str, object], source: str, problems: Sequence[str] = ()) -> Config:
    """Validate settings.

    Args:
        settings: As a YAML file gives them.
        source: What to call them in an error.
        problems: Found before, to be told together with the others.

    Raises:
        InputError: Naming every problem at once, one on a line.
    """
    problems = list(problems)
    model = Config
    try:
        model = _config_class(settings)
        config = model.model_validate(settings)
    except ValidationError as error:
        problems += [describe(problem, model) for problem in error.errors(include_url=False)]
    except InputError as error:  # before the rest could be looked at
        problems.append(str(error))
    if problems:
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        raise InputError(f"{source}: {count} in this configuration:\n  " + "\n  ".join(problems))
    return config


def apply_overrides_(settings: dict[str, object], overrides: Sequence[str]) -> list[str]:
    """Change settings by ``dotted.key=value`` texts, in order; returns what is wrong with these, a line each."""
    problems = []
    given: dict[str, str] = {}  # dotted key: override
    for override in overrides:
        try:
            _apply_override_(settings, override, given)
        except InputError as error:
            problems.append(str(error))
    return problems


def check_same(texts: Sequence[bytes]) -> None:
    """Refuse to start where ranks would train differently, as when a node holds another copy of the file.

    Args:
        texts: Each rank's `Config.shared_yaml`, in rank order.

    Raises:
        InputError: Naming the first rank that differs from rank 0, and the lines.
    """
    for rank, text in enumerate(texts):
        if text != texts[0]:
            first, other = texts[0].decode().splitlines(), text.decode().splitlines()
            differences = list(difflib.unified_diff(first, other, n=0, lineterm=""))[2:]  # after two lines of header
            raise InputError(
                f"all ranks must have the same configuration, but rank {rank}'s (+) differs from rank 0's (-):\n  "
                + "\n  ".join(line for line in differences if not line.startswith("@@"))
                + "\ngive every rank the same file and the same overrides"
            )


def batch_slots(config: Config, num_ranks: int) -> int:
    """How many slots (micro-batches of ``batch.per_rank`` samples) each rank takes in one iteration.

    Args:
        config: A validated configuration.
        num_ranks: World size, >= 1.

    Returns:
        Slots a rank: global_size / (per_rank * num_ranks).

    Raises:
        InputError: If that is not a whole number; names the nearest global sizes and numbers of ranks for which it is.
    """
    batch = config.batch
    unit = batch.per_rank * num_ranks
    slots, remainder = divmod(batch.global_size, unit)
    if remainder:
        raise InputError(
            f"batch.global_size must be a multiple of batch.per_rank x ranks = {batch.per_rank} x {num_ranks}"
            f" = {unit}, got {batch.global_size}; nearest sizes that work:"
            f" {nearest_multiples(batch.global_size, unit)}; nearest numbers of ranks that work with"
            f" {batch.global_size}: {_nearest_divisors(batch.global_size // batch.per_rank, num_ranks)}"
            + _smaller_slots(batch.global_size, batch.per_rank, num_ranks)
        )
    return slots


def warnings_of(config: Config, num_train: int) -> list[str]:
    """What is allowed and yet seldom meant, a line each for the log.

    Args:
        config: A validated configuration.
        num_train: Training images, > 0.
    """
    texts = (_batch_warning(config, num_train), _schedule_warning(config), _sampling_warning(config))
    return [text for text in texts if text]


def _sampling_warning(config: Config) -> str | None:
    """Where less than one image of a slot is asked for."""
    per_rank = config.batch.per_rank
    if config.kfac is None or config.kfac.sample_fraction * per_rank > 1 - 1e-9:  # 1/3 may be written 0.3333333333
        return None
    return (
        f"kfac.sample_fraction = {config.kfac.sample_fraction:g} of batch.per_rank = {per_rank} is less than one image:"
        f" A and G are computed from one image of each slot, a share of {1 / per_rank:.3g}"
    )


def _schedule_warning(config: Config) -> str | None:
    """Where the learning rate is 0 before the run ends."""
    schedule, epochs = config.schedule, config.train.epochs
    if schedule.kind == "constant" or schedule.end_epoch >= epochs:
        return None
    return (
        f"the learning rate is 0 from epoch {schedule.end_epoch:g} on, and train.epochs = {epochs:g}: "
        f"set schedule.end_epoch={epochs:g} if it is to fall over the whole run"
    )


def _batch_warning(config: Config, num_train: int) -> str | None:
    """Where one global batch holds images more than once."""
    size = config.batch.global_size
    if size <= num_train:
        return None
    num_epochs = size / num_train
    text = (
        f"batch.global_size = {size:,} is more than the {num_train:,} training images:"
        f" each iteration sees each of them {num_epochs:,.4g} times on average"
    )
    if num_epochs > config.train.epochs:
        text += f" and is more than train.epochs = {config.train.epochs:g}, so this run is a single iteration"
    return text


def _config_class(settings: Mapping[str, object]) -> type[Config]:
    """`Config`, or where `data.name` names a data set of an installed package, that which takes its section."""
    data = settings.get("data")
    name = data.get("name") if isinstance(data, dict) else None
    own = own_data_set(name) if isinstance(name, str) else None
    return Config if own is None else config_with(own)


def _smaller_slots(global_size: int, per_rank: int, num_ranks: int) -> str:
    """The largest `per_rank` below this one that the ranks can share, as a remedy."""
    if global_size % num_ranks:
        return ""
    share = global_size // num_ranks
    largest = min(per_rank, share)
    tried = range(largest, max(0, largest - 10_000), -1)  # an answer at once, for any batch
    fitting = next((size for size in tried if share % size == 0), None)
    return f"; or set batch.per_rank={fitting}" if fitting else ""


def _nearest_divisors(number: int, near: int) -> str:
    """The divisors of `number` on either side of `near`, which is none; above, only up to 16 times as much."""
    below = next(divisor for divisor in range(near, 0, -1) if number % divisor == 0)
    above = next((divisor for divisor in range(near + 1, min(number, 16 * near) + 1) if number % divisor == 0), None)
    return f"{below} and {above}" if above else f"{below}"


def _apply_override_(settings: dict[str, object], override: str, given: dict[str, str]) -> None:
    dotted, equals, text = override.partition("=")
    keys = dotted.strip().split(".")
    if not equals or not all(keys):
        raise InputError(f"override {override!r} must be dotted.key=value, such as train.epochs=2")
    dotted = ".".join(keys)
    for earlier, whole in given.items():
        if f"{earlier}.".startswith(f"{dotted}."):
            raise InputError(f"override {override!r} undoes an earlier one, {whole!r}: leave out one of them")
    given[dotted] = override
    section = section_of_(settings, dotted, f"override {override!r}")
    section[keys[-1]] = strict_yaml.parse(text, f"override {override!r}")


MAY_CHANGE = (
    "run.name",
    "run.output_dir",
    "run.device",
    "run.watchdog_minutes",
    "data.root",
    "data.mean_image",
    "data.workers",
    "data.loader",
    "model.pretrained",
    "train.epochs",
    "train.evaluate_every",
    "train.precision",
    "train.max_nonfinite",
    "train.max_restores",
    "kfac.monitor",
    "communication",
    "checkpoint",
)
"""Keys, with all below them, that may be other than they were when a run is resumed."""


def check_resumable(saved: str, config: Config) -> None:
    """Refuse to go on with a run under another configuration.

    A key that is newer than the run is compared by its default, which stands for what was done before the key came.

    Args:
        saved: The configuration as it was saved, YAML.
        config: As it is now.

    Raises:
        InputError: Naming the keys that differ and may not, with both values.
    """
    settings = strict_yaml.parse(saved, "the checkpoint's configuration")
    before = leaves(with_defaults(settings) if isinstance(settings, dict) else settings)
    after = leaves(config.model_dump(mode="json"))
    differing = [
        f"{key}: {before.get(key, 'absent')} when it was saved, {after.get(key, 'absent')} now"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key) and not any(f"{key}.".startswith(f"{free}.") for free in MAY_CHANGE)
    ]
    if differing:
        raise InputError(
            "a run goes on only with the configuration that it was saved with, but these keys differ (start a new run, "
            "or set them back; " + ", ".join(MAY_CHANGE) + " may change):\n  " + "\n  ".join(differing)
        )


def with_defaults(settings: dict[str, Any]) -> dict[str, Any]:
    """Saved settings with the keys that came later, by their defaults, which stand for what was done before.

    What is no configuration of this version stays as it is.
    """
    try:
        return create_config(settings, "").model_dump(mode="json")
    except InputError:
        return settings
