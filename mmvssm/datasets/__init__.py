"""The small data sets that the quickstarts make."""

from mmvssm.datasets.quickstart import (
    QUICKSTART_CLASSES,
    QUICKSTART_PALETTE,
    make_quickstart_dataset,
)

__all__ = ['QUICKSTART_CLASSES', 'QUICKSTART_PALETTE', 'make_quickstart_dataset']
