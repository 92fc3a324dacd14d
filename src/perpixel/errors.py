"""Errors that a user can act on.

Every message names the place, what was expected, what came, and what to do. The command line prints the message
alone and exits with status 2; everything that is not a `PerpixelError` is a defect of perpixel itself.
"""


class PerpixelError(Exception):
    """Base of all errors that are caused by input: configuration, data, tensors, or files."""


class ConfigError(PerpixelError):
    """A recipe, an override or an argument that cannot be used."""


class DataError(PerpixelError):
    """A data set, annotation or picture that cannot be used."""


class ShapeError(PerpixelError):
    """A tensor of the wrong shape or dtype."""


class CheckpointError(PerpixelError):
    """Weights or a run folder that cannot be read, written, or do not belong to the recipe or the data."""


class NonFiniteLossError(PerpixelError):
    """Training met a loss that is not a finite number."""
