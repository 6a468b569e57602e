"""What goes wrong with checkpoints, and on the way to them."""


class CheckpointError(RuntimeError):
    """A checkpoint cannot be read, or does not fit the model."""


class MissingCheckpointError(CheckpointError, FileNotFoundError):
    """There is no file where a checkpoint was looked for."""


class UnsafeCheckpointError(CheckpointError):
    """Reading the file in full would call what may be anybody's code."""

    def __init__(self, where: str, what: str):
        super().__init__(
            f'{where} is refused: {what}. A state dict alone can always be read. '
            'Only if you made the file yourself, and want all it holds to be run: '
            'mmvssm.checkpoints.trust(PATH), or --trust-checkpoint with a tool'
        )


class ZooError(CheckpointError):
    """Weights cannot be found, downloaded or verified."""
