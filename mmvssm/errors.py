"""Errors with checkpoints and their downloads, and with packages that are missing."""


class CheckpointError(RuntimeError):
    """A checkpoint cannot be read, or does not fit the model."""


class MissingCheckpointError(CheckpointError, FileNotFoundError):
    """There is no such checkpoint file."""


class UnsafeCheckpointError(CheckpointError):
    """Reading the whole file would run code of its author."""

    def __init__(self, where: str, what: str):
        super().__init__(
            f'{where} is refused: {what}. A state dict alone can always be read. '
            'If you made the file yourself and want to run all that it contains: '
            'mmvssm.checkpoints.trust(PATH), or --trust-checkpoint with a tool'
        )


class ZooError(CheckpointError):
    """Weights cannot be found, downloaded or verified."""


class MissingPackageError(ImportError):
    """A part needs a package that is not installed or cannot be imported."""
