"""The error that train_eed.py shows as one message instead of a traceback."""

__all__ = ['TrainingError']


class TrainingError(ValueError):
    """Something the user can mend; the message says how."""
