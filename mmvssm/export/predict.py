"""A segmentor in an ONNX file, in the place of the one it was exported from."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from mmengine.registry import TRANSFORMS, init_default_scope
from torch import Tensor

from mmvssm.analysis.pictures import loads_bgr
from mmvssm.engine import UsageError
from mmvssm.export.errors import ExportError
from mmvssm.export.library import onnx_library
from mmvssm.export.onnx_model import read_metadata
from mmvssm.export.verify import has_kernels, require
from mmvssm.pretrained import refuse_unregistered

_LOAD = dict(type='LoadImageFromFile')
_PACK = dict(type='PackSegInputs')


class OnnxSegmentor:
    """Predicts image files by onnxruntime, for ``mmvssm.engine.inference.infer``.

    Args:
        file: Of ``tools/export.py``, with the labels or the logits of a segmentor. It
            says itself how its images are read.

    Attributes:
        dataset_meta: Classes and palette.
        transforms: With which the config's test reads images.

    Raises:
        UsageError: There is no such file, or it is of something else.
    """

    def __init__(self, file: str | Path):
        self.file = str(file)
        try:
            ort = require('onnxruntime')
            if not Path(file).is_file():
                raise UsageError(f'no ONNX file at {Path(file).absolute()}.')
            options = ort.SessionOptions()
            if has_kernels():
                # For a file of the form 'function'.
                options.register_custom_ops_library(onnx_library())
            try:
                self.session = ort.InferenceSession(
                    str(file), options, providers=['CPUExecutionProvider']
                )
            except Exception as error:
                # Its exceptions have no base of their own.
                raise UsageError(
                    f'onnxruntime cannot read {file}: {str(error).splitlines()[0]}'
                ) from error
            properties = self.session.get_modelmeta().custom_metadata_map
            self.notes = read_metadata(properties, file)
        except ExportError as error:
            raise UsageError(f'{error}.') from error
        if 'align_corners' not in self.notes:
            raise UsageError(
                f'{file} is not of a segmentor, so there are no masks to draw: export '
                'one from its config.'
            )
        classes = self.notes['classes']
        palette = self.notes.get('palette') or _colours(len(classes))
        self.dataset_meta = dict(classes=classes, palette=palette)
        self.transforms = self._transforms()

    def _transforms(self) -> list:
        init_default_scope('mmseg')
        steps = self.notes.get('test_pipeline') or [_LOAD, _PACK]
        refuse_unregistered(steps, self.file, 'its test_pipeline')
        kept = [step for step in steps if not _loads_labels(step['type'])]
        return [TRANSFORMS.build(step) for step in kept]

    def test_step(self, data: dict) -> list:
        """Predict a batch as ``pseudo_collate`` makes it.

        Raises:
            ValueError: The file takes images of another size.
        """
        samples = data['data_samples']
        for image, sample in zip(data['inputs'], samples, strict=True):
            sample.set_data(dict(pred_sem_seg=_pixels(self._labels(image, sample))))
        return list(samples)

    def _labels(self, image: Tensor, sample: Any) -> Tensor:
        """(1, H, W) at the size of the original image."""
        inputs = self._prepare(image)
        expected = self.session.get_inputs()[0].shape[2:]
        if any(
            isinstance(e, int) and e != g for e, g in zip(expected, inputs.shape[2:])
        ):
            raise ValueError(
                f'the file takes {expected[0]}x{expected[1]} pixels, and the pipeline '
                f'of its config makes {inputs.shape[2]}x{inputs.shape[3]}: export it '
                'with --dynamic size'
            )
        (output,) = self.session.run(None, {'image': inputs})
        found = torch.from_numpy(output)
        size = tuple(sample.ori_shape[:2])
        if self.notes['task'] == 'seg':
            if found.shape[1:] == size:
                return found
            nearest = F.interpolate(found[:, None].float(), size, mode='nearest-exact')
            return nearest[:, 0].long()
        logits = F.interpolate(
            found, size, mode='bilinear', align_corners=self.notes['align_corners']
        )
        if logits.shape[1] > 1:
            return logits.argmax(1)
        return (logits[:, 0].sigmoid() > self.notes['threshold']).long()

    def _prepare(self, image: Tensor) -> np.ndarray:
        """What the file takes, (1, C, H, W), of an image as it was loaded."""
        # Images of other than three channels keep the order of their file.
        blue_first = image.shape[0] == 3 and loads_bgr(self.transforms[0])
        wants_bgr = self.notes['bgr'] and not self.notes['normalised_inside']
        if blue_first != wants_bgr and image.shape[0] == 3:
            image = image.flip(0)
        image = image.float()
        if not self.notes['normalised_inside']:
            mean, std = (
                torch.tensor(self.notes[name]).view(-1, 1, 1)
                for name in ('mean', 'std')
            )
            image = (image - mean) / std
        return image[None].numpy()


def _loads_labels(kind: str) -> bool:
    return kind.startswith('Load') and kind.endswith('Annotations')


def _colours(number: int) -> list[list[int]]:
    """As far apart as a few numbers allow, where the config names none."""
    places = np.arange(number)
    return np.stack([places * step % 256 for step in (67, 113, 179)], 1).tolist()


def _pixels(labels: Tensor) -> Any:
    from mmengine.structures import PixelData

    return PixelData(data=labels)
