"""Every error a user can fix, each saying what to do next.

Owns: the package's exception types. Must not import anything from the package.

A `GrootError` means that an input, a file or the machine has to change; its message names the
thing and the next step, and the command line prints it without a traceback. Any other exception
that escapes is a bug of this package.
"""

from __future__ import annotations


class GrootError(Exception):
    """Base of all errors that the user can fix."""


class ConfigurationError(GrootError):
    """A parameter, a command-line option or a robot description is wrong."""


class CheckpointError(GrootError):
    """The checkpoint folder is incomplete, damaged or contradicts itself."""


class ProcessorError(GrootError):
    """The checkpoint's processor files lack something or ask for what is not implemented."""


class ExportError(GrootError):
    """A model cannot be exported with the given options."""


class BundleError(GrootError):
    """The bundle is missing, incomplete, changed since export or of another schema."""


class EngineError(GrootError):
    """An inference engine cannot be loaded or does not match the bundle."""


class CalibrationError(GrootError):
    """A calibration cache or its samples are missing, stale, damaged or too few."""


class QuantizationError(GrootError):
    """A graph cannot be quantised as asked, or its INT8 form misses what was asked of it."""


class ObservationError(GrootError):
    """An observation cannot be used: missing, misshapen or not finite."""


class FrozenImageError(ObservationError):
    """A camera's pixels have stopped changing although its stamps advance."""


class UnknownInstructionError(ObservationError):
    """The prefix of an instruction is not there: it has to be computed first."""


class DatasetError(GrootError):
    """A dataset or an episode of it cannot be read."""


class BagError(GrootError):
    """A rosbag2 recording cannot be read, written or played."""


class OutputError(GrootError):
    """A result could not be written; nothing half-written was left behind."""


class CaptureError(GrootError):
    """A captured sample or a capture store is damaged, incomplete or of another checkpoint."""
