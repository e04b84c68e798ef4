"""Errors that a caller may want to catch by name."""


class HfSparseError(Exception):
    """The parent of every error class of this package."""


class UnsupportedModelError(HfSparseError, ValueError):
    """A model whose attention cannot be made sparse by this package; the message names it and says why."""


class ConversionError(HfSparseError, ValueError):
    """A conversion that cannot be done or could not be finished; nothing was left at the destination."""


class UnfinishedConversionError(ConversionError):
    """A conversion that failed after it had begun: a full disk, a result that does not agree with its source."""


class PushError(HfSparseError, RuntimeError):
    """A push to the Hub that failed; what was to be pushed is where it was."""


class RecipeError(HfSparseError, ValueError):
    """A recipe that cannot be run as it was asked for; nothing was trained."""


class FailedRunError(HfSparseError, RuntimeError):
    """A run that failed while it was training or judged; its checkpoints are as they were."""


class LostProcessError(HfSparseError, RuntimeError):
    """A run whose other processes have ended or do not answer; its checkpoints are as they were."""
