"""What export raises where it cannot do what was asked."""


class ExportError(ValueError):
    """A model cannot be exported so; the message says why, and what to do."""


class DifferenceError(RuntimeError):
    """What was exported does not compute what PyTorch computes.

    Attributes:
        report: The :class:`mmvssm.export.verify.Report` of the check, or None if the
            file does not run at all.
    """

    def __init__(self, message: str, report: object = None):
        super().__init__(message)
        self.report = report
