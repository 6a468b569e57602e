"""A two-stage detector with all of its work and none of its decisions."""

import torch
from torch import nn

# As in the published tables, mmdet's among them.
PROPOSALS = 1000
MASKS = 100


class CountableDetector(nn.Module):
    """What to count the FLOPs of a Mask R-CNN or its cascade on.

    Which proposals a detector refines depends on the picture. Published counts
    take 1000 for the box heads, of every stage, and 100 for the mask heads. Here
    the heads run on so many regions of zeros: no anchors, no suppression, no
    RoIAlign, none of which has a multiply-add by the usual convention.

    Args:
        detector: Of mmdet, with ``extract_feat``, ``rpn_head`` and ``roi_head``.

    Raises:
        ValueError: It has no such parts, as one-stage detectors do not.
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
            image: (B, 3, H, W).

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
    """A stage alone, the stages of a cascade, or nothing."""
    if modules is None:
        return []
    return list(modules) if isinstance(modules, nn.ModuleList) else [modules]
