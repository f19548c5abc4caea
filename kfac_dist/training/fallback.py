"""Going back to the last checkpoint when skipping updates has not helped, with more damping; or giving up."""

import logging

from kfac_dist.errors import TrainingDiverged
from kfac_dist.training.black_box import BLACK_BOX_FILE, BlackBox
from kfac_dist.training.checkpoint import find_checkpoint
from kfac_dist.training.reporter import Reporter
from kfac_dist.training.run_state import Run, RunSaver, load_checkpoint

logger = logging.getLogger(__name__)


def fall_back(trainer: Run, black_box: BlackBox, saver: RunSaver, reporter: Reporter) -> None:
    """Put a trainer back to where its run was last saved, after writing the black box; collective.

    Raises:
        TrainingDiverged: If there is no checkpoint, or that was tried often enough.
    """
    saver.finish()
    recovery, failed_at = trainer.recovery, trainer.iteration - 1
    problem = recovery.describe()
    found = find_checkpoint(reporter.directory, trainer.communicator)
    facts = {"problem": problem, "iteration": failed_at, **recovery.state_dict()}
    black_box.write(reporter.directory, facts, found.path if found else None, trainer.optimizer)
    if found is None or recovery.is_exhausted:
        raise TrainingDiverged(f"{problem}; {reporter.directory / BLACK_BOX_FILE} has the last iterations")
    counts, seconds_before = recovery.state_dict(), trainer.seconds_before
    metrics_bytes = load_checkpoint(trainer, found)
    recovery.load_state_dict(counts)
    recovery.restored()
    trainer.seconds_before = seconds_before  # the time was spent all the same
    black_box.forget()
    reporter.go_back(trainer.iteration, metrics_bytes)
    reporter.event(trainer.iteration, "restored", failed_at=failed_at, **recovery.state_dict())
    if trainer.communicator.is_main:
        logger.warning("%s: going on from iteration %d with more damping", problem, trainer.iteration)
