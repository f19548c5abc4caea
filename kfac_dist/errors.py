"""Errors that the user can fix, and failures of training."""


class InputError(ValueError):
    """A configuration, a data file or a launch that cannot be used as given.

    The message names what was wrong, the value, the rule and the remedy. The command line prints it without a
    traceback and exits with code 2.
    """


class AgreedInputError(InputError):
    """An `InputError` that every rank raises alike, so that all can leave (`Communicator.raise_on_all_ranks`)."""


class RunStopped(Exception):  # no error: the run can go on
    """A signal stopped the run, on all ranks, after a checkpoint. Exit code 75."""


class TrainingFailed(RuntimeError):
    """Training cannot go on, on any rank: it diverged or lost its data. Exit code 3."""


class TrainingDiverged(TrainingFailed):
    """The loss is no longer finite, or hopeless."""


class EndNotSaved(TrainingFailed):
    """The last checkpoint of a run could not be written: the run is not finished, for its weights would be lost."""


class NoProgress(RuntimeError):
    """A run was restarted again and again at the same iteration. Exit code 93: not to be queued again."""


class ImageError(RuntimeError):
    """An image that cannot be used; the message names its file."""


class RankFailed(RuntimeError):
    """One rank cannot go on, and the others do not know: `launch.run` ends the job without a traceback. Exit code 3."""
