"""The errors that a user may see: each is one readable sentence, never a traceback.

A message says what was expected, what came, and what to do. The command line prints it and exits with code 2.
"""


class FedkdError(Exception):
    """Base of every error that fedkd raises on purpose."""


class ConfigError(FedkdError, ValueError):
    """A setting that cannot work. Also a `ValueError`, so that pydantic reports it with the place of the setting."""


class DataError(FedkdError):
    """Records that are missing, corrupt, or do not fit what the experiment asks of them."""


class DataWarning(UserWarning):
    """Something a user should know of the data, with which an experiment still works."""


def kind_of(cause: Exception) -> str:
    """Return what may leave a device of an error whose words may quote values of records."""
    return f"{type(cause).__name__} on the device; its own log says more"
