"""The error that train_eed.py shows as one message instead of a traceback."""

__all__ = ['TrainingError']


class TrainingError(Exception):
    """Something the user can mend; the message says how."""
