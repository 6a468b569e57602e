"""Augmentations of single images that MMPretrain does not have."""

import numpy as np
from mmcv.transforms import BaseTransform
from PIL import Image, ImageFilter, ImageOps
from torchvision.transforms import ColorJitter


class ThreeAugment(BaseTransform):
    """The colours of 3-Augment: DeiT III (Touvron et al., arXiv 2204.07118), Mamba®.

    One of these, each as likely: grey, solarised (values from 128 on are inverted), or
    blurred by a Gaussian with a standard deviation of .1 to 2 pixels. Then brightness,
    contrast and saturation are changed, in random order. Pillow computes it, with the
    bits of torchvision's pipelines. The rest of 3-Augment comes before it:
    ``RandomResizedCrop``, or as "simple random crop" ``ResizeEdge`` and ``RandomCrop(
    padding=4, padding_mode='reflect')``; then ``RandomFlip``.

    Required and changed key: ``img``, uint8 (H, W, 3), in the order BGR.

    Args:
        color_jitter: The three are multiplied by 1 - x to 1 + x, drawn evenly.
    """

    def __init__(self, color_jitter: float = 0.3):
        self.color_jitter = color_jitter
        self.jitter = ColorJitter(color_jitter, color_jitter, color_jitter)

    def transform(self, results: dict) -> dict:
        """Change the colours of an image."""
        image = Image.fromarray(results['img'][..., ::-1])
        kind = np.random.randint(3)
        if kind == 0:
            image = image.convert('L').convert('RGB')
        elif kind == 1:
            image = ImageOps.solarize(image)
        else:
            radius = np.random.uniform(0.1, 2.0)
            image = image.filter(ImageFilter.GaussianBlur(radius))
        image = self.jitter(image)
        results['img'] = np.ascontiguousarray(np.asarray(image)[..., ::-1])
        return results

    def __repr__(self) -> str:
        return f'{type(self).__name__}(color_jitter={self.color_jitter})'
