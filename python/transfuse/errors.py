"""The exceptions transfuse raises: one type per kind of mistake.

Every message gives what was expected, what was received and, where there is one, the remedy. Each type also derives
from the built-in exception that a caller would have expected, so ``except ValueError`` keeps working.
"""

from __future__ import annotations


class TransfuseError(Exception):
    """Base of everything transfuse raises on purpose; the command line prints it as one line."""


class ArgumentError(TransfuseError, ValueError):
    """An argument has a wrong shape or value."""


class DtypeError(TransfuseError, TypeError):
    """A tensor has a dtype that the operation does not take."""


class DeviceError(TransfuseError, ValueError):
    """Tensors of one call are on different devices."""


class BackendError(TransfuseError, RuntimeError):
    """A backend that was asked for by name does not exist or cannot run this call."""


class CheckpointError(TransfuseError, ValueError):
    """A weight, index or tokenizer file is missing, damaged or does not fit the model."""


class ConfigError(TransfuseError, ValueError):
    """A model configuration is impossible or unknown."""


class MissingDependencyError(TransfuseError, ImportError):
    """An optional package is needed for this call and is not installed."""
