"""The error tree. Every message is one line: what is wrong, what was got, how to fix it."""

from __future__ import annotations


class ChipdeployError(Exception):
    """Base of every error raised on purpose; `exit_code` is what the command line returns."""

    exit_code = 1


class UsageError(ChipdeployError):
    """Options that contradict each other or lie outside their range."""

    exit_code = 2


class InputError(ChipdeployError):
    """Bad or untrusted input: nothing was computed from it."""

    exit_code = 3


class DataError(InputError):
    """A data set that is missing, damaged or of the wrong shape."""


class ModelError(InputError):
    """A model that cannot be built, traced or analysed."""


class WeightsError(InputError):
    """A weights file that is damaged or belongs to another model."""


class RunError(InputError):
    """A run directory that is missing, incomplete, damaged or not writable."""


class ExportError(InputError):
    """A network that cannot be exported, or a file that is not the one that was exported."""


class MissingError(ChipdeployError):
    """A package or a device that this machine lacks."""

    exit_code = 4


class TargetError(ChipdeployError):
    """A budget, tolerance or latency that was not met."""

    exit_code = 5


class BudgetError(TargetError):
    """A budget below the smallest connected network."""


class VerificationError(TargetError):
    """Two networks that must agree and do not."""


class NoisyError(ChipdeployError):
    """A measurement too noisy to say anything."""

    exit_code = 6
