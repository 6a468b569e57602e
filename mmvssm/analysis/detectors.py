"""A two-stage detector that runs all layers, to count FLOPs."""

import torch
from torch import nn

# As in the published tables, also those of mmdet.
PROPOSALS = 1000
MASKS = 100


class CountableDetector(nn.Module):
    """Wraps a Mask R-CNN or a cascade, to count its FLOPs.

    The number of proposals depends on the image. Published counts use 1000 for the box
    heads of every stage, and 100 for the mask heads. Here the heads run on that many
    regions of zeros. Anchors, suppression and RoIAlign are left out: by the usual
    convention they have no multiply-adds.

    Args:
        detector: A detector of mmdet with ``extract_feat``, ``rpn_head`` and
            ``roi_head``.

    Raises:
        ValueError: The detector lacks one of these parts, as one-stage detectors do.
    """

    def __init__(self, detector: nn.Module):
        super().__init__()
        for part in ('rpn_head', 'roi_head'):
            if getattr(detector, part, None) is None:
                raise ValueError(
                    f'only two-stage detectors can be counted, and '
                    f'{type(detector).__name__} has no {part}'
                )
        self.backbone, self.neck = detector.backbone, detector.neck
        self.rpn_head, self.roi_head = detector.rpn_head, detector.roi_head

    def forward(self, image: torch.Tensor) -> list:
        """Run all layers once.

        Args:
            image: (B, in_channels, H, W).

        Returns:
            Outputs of RPN, box heads and mask heads.
        """
        maps = self.neck(self.backbone(image))
        outs = [self.rpn_head(maps)]
        heads = self.roi_head
        for kind, number in (('bbox', PROPOSALS), ('mask', MASKS)):
            extractors = _as_list(getattr(heads, f'{kind}_roi_extractor', None))
            for extractor, head in zip(
                extractors, _as_list(getattr(heads, f'{kind}_head', None))
            ):
                size = extractor.roi_layers[0].output_size
                regions = maps[0].new_zeros(number, extractor.out_channels, *size)
                outs.append(head(regions))
        return outs


def _as_list(modules: nn.Module | None) -> list[nn.Module]:
    """The stages as a list: of a cascade, of a single stage, or empty."""
    if modules is None:
        return []
    return list(modules) if isinstance(modules, nn.ModuleList) else [modules]
