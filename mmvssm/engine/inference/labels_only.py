"""Segmentors that predict labels and keep no logits.

mmseg resizes the logits of all classes to the size of the original image, and keeps
them beside the labels: 3.6 GB for 3000x2000 pixels and 150 classes, and as much again
for the next image, or at the size of the network's input. A test of IoUs never reads
them. Here they stay as small as the head gives them. What mmseg does behind the head is
done for a few classes at a time, in the same order. So the labels are the same.

This file can be imported without mmseg.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from types import MethodType
from typing import Any

import torch
from mmengine.model import BaseTTAModel, is_model_wrapper
from torch import Tensor, nn

# Logits of so many bytes are resized at once, ...
BLOCK_BYTES = 2**28
# ... and so many classes or a multiple. On a CPU torch has vectors across the channels
# of small or channels-last maps, and rounds channels left over at the end otherwise.
# With this step the same are left over as in one call for all.
STEP = 16
# Averages over scales and flips are made for so many bytes of logits at once. Parts are
# whole vectors of torch's softmax: the last places of others are rounded differently.
MERGED_BYTES = 2**30
MERGED_STEP = 4096

_PREDICTED_BY = ('forward', 'test_step', 'val_step', 'predict', 'inference')
_INFERENCE = ('whole_inference', 'slide_inference')


@contextmanager
def labels_only(model: nn.Module) -> Iterator[bool]:
    """Let a segmentor predict the same labels, and no ``seg_logits``.

    Args:
        model: A segmentor of mmseg, or its ``SegTTAModel``, wrapped for several
            processes or not. One that predicts by code of its own is left as it is.

    Yields:
        Whether the model predicts so inside the ``with`` block.
    """
    undo = leave_out_logits(model)
    try:
        yield undo is not None
    finally:
        if undo is not None:
            undo()


def leave_out_logits(model: nn.Module) -> Callable[[], None] | None:
    """:func:`labels_only` until the function that is returned is called.

    Returns:
        What gives the logits back, or None if the model is left as it is.
    """
    while is_model_wrapper(model):
        model = model.module
    methods: list[tuple[nn.Module, str, Callable]] = []
    if isinstance(model, BaseTTAModel):
        segmentor = model.module
        if not _merges_as_published(model):
            return None
        methods.append((model, 'merge_preds', _merge))
    else:
        segmentor = model
    small = _inference_of(segmentor)
    if small is None:
        return None
    finish = _predictions if methods else _labels
    methods.append((segmentor, 'postprocess_result', finish))
    methods.extend((segmentor, name, function) for name, function in small.items())
    for owner, name, function in methods:
        setattr(owner, name, MethodType(function, owner))

    def undo() -> None:
        for owner, name, _ in methods:
            delattr(owner, name)

    return undo


def _merges_as_published(model: nn.Module) -> bool:
    if not _is_from(model, 'mmseg'):
        return False
    from mmseg.models import SegTTAModel

    names = ('merge_preds', 'test_step')
    return _has_methods_of(model, SegTTAModel, names)


def _inference_of(model: nn.Module) -> dict[str, Callable] | None:
    """Methods that give :class:`_Logits`, or None for a segmentor of its own kind."""
    if not _is_from(model, 'mmseg'):
        return None
    from mmseg.models import BaseSegmentor, EncoderDecoder

    if not _has_methods_of(model, BaseSegmentor, ('postprocess_result',)):
        return None
    if _has_methods_of(model, EncoderDecoder, (*_PREDICTED_BY, *_INFERENCE)):
        return dict(whole_inference=_whole_inference, slide_inference=_slide_inference)
    known = all(
        getattr(type(model), name).__module__.split('.')[0] in ('mmseg', 'mmengine')
        for name in _PREDICTED_BY
        if hasattr(model, name)
    )
    return {} if known else None


def _is_from(model: nn.Module, package: str) -> bool:
    return any(kind.__module__.split('.')[0] == package for kind in type(model).mro())


def _has_methods_of(model: nn.Module, kind: type, names: Sequence[str]) -> bool:
    return all(
        getattr(type(model), name, None) is getattr(kind, name)
        and name not in vars(model)
        for name in names
    )


# Logits


@dataclass
class _Part:
    """What the head gave for the network's input, or for a window of it.

    Attributes:
        logits: (N, C, h, w).
        resize: Of any classes of them, to the size of that input.
        window: Rows and columns.
    """

    logits: Tensor
    resize: Callable[[Tensor], Tensor]
    window: tuple[slice, slice] = (slice(None), slice(None))

    def classes(self, image: int, some: slice) -> Tensor:
        """(1, c, height, width), as the head would have resized them."""
        chosen = self.logits[image : image + 1, some]
        if self.logits.is_contiguous(memory_format=torch.channels_last):
            # Which of torch's kernels resizes them hangs on it.
            chosen = chosen.contiguous(memory_format=torch.channels_last)
        return self.resize(chosen)


@dataclass
class _Logits:
    """Logits (N, C, H, W) of a batch that are resized when they are asked for.

    Attributes:
        parts: One, or the windows of a sliding inference in their order.
        size: H, W.
        count: (1, 1, H, W), how many windows cover a pixel; None: all is one part.
    """

    parts: list[_Part]
    size: tuple[int, int]
    count: Tensor | None = None

    def classes(self, image: int, some: slice) -> Tensor:
        """Logits of some classes of one image, (1, c, H, W)."""
        if self.count is None:
            return self.parts[0].classes(image, some)
        total = self.count.new_zeros(1, some.stop - some.start, *self.size)
        for part in self.parts:
            total[:, :, part.window[0], part.window[1]] += part.classes(image, some)
        return total.div_(self.count)


def _itself(logits: Tensor) -> Tensor:
    return logits


@dataclass
class _Prediction:
    """One image of a batch.

    Attributes:
        model: The segmentor.
        logits: Of the batch.
        image: Its place there.
        metainfo: Of its data sample; None: nothing is known of an original size.
    """

    model: Any
    logits: _Logits
    image: int
    metainfo: dict | None

    @property
    def channels(self) -> int:
        """Of the logits: the classes, or 1."""
        return self.logits.parts[0].logits.shape[1]

    @property
    def size(self) -> tuple[int, ...]:
        """Height and width of what is predicted."""
        if self.metainfo is None:
            return self.logits.size
        return tuple(self.metainfo['ori_shape'][:2])

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """Classes, and their logits (c, H, W) at the original size."""
        area = max(prod(self.logits.size), prod(self.size))
        size = area * self.logits.parts[0].logits.element_size()
        step = max(BLOCK_BYTES // size // STEP, 1) * STEP
        starts = range(0, max(self.channels - STEP, 0) + 1, step)
        for start, stop in zip(starts, [*starts[1:], self.channels]):
            yield slice(start, stop), self._classes(slice(start, stop))

    def _classes(self, some: slice) -> Tensor:
        """As ``postprocess_result`` of mmseg makes them."""
        from mmseg.models.utils import resize

        logits = self.logits.classes(self.image, some)
        if self.metainfo is not None:
            padding = self.metainfo.get('padding_size', [0] * 4)
            left, right, top, bottom = self.metainfo.get('img_padding_size', padding)
            height, width = logits.shape[2:]
            logits = logits[:, :, top : height - bottom, left : width - right]
            if self.metainfo.get('flip'):
                axis = dict(horizontal=3, vertical=2)[self.metainfo['flip_direction']]
                logits = logits.flip(dims=(axis,))
            logits = resize(
                logits,
                size=self.size,
                mode='bilinear',
                align_corners=self.model.align_corners,
                warning=False,
            )
        return logits.sigmoid()[0] if self.channels == 1 else logits[0]

    def label(self) -> Tensor:
        """Class numbers, int64 (1, H, W); of one channel 0 and 1 in its dtype."""
        label = best = None
        for some, logits in self.blocks():
            if self.channels == 1:
                return (logits > self.model.decode_head.threshold).to(logits)
            value, place = logits.max(dim=0, keepdim=True)
            # Or it would be there beside the next ones.
            del logits
            place += some.start
            if label is None:
                label, best = place, value
                continue
            # As argmax has it: the first of equals, and NaN above all.
            higher = (value > best) | (value.isnan() & ~best.isnan())
            label[higher] = place[higher]
            best = best.where(~higher, value)
        return label

    def of_pixels(self, here: slice) -> Tensor:
        """Logits (C, pixels) of a part of the original image, counted by rows."""
        chosen = None
        for some, logits in self.blocks():
            logits = logits.flatten(1)[:, here]
            if chosen is None:
                chosen = logits.new_empty(self.channels, logits.shape[1])
            chosen[some] = logits
        return chosen


# Methods of a segmentor


def _labels(self: Any, logits: Any, data_samples: list | None = None) -> list:
    """In the place of ``postprocess_result``."""
    from mmengine.structures import PixelData

    samples = _predictions(self, logits, data_samples)
    for sample in samples:
        label = sample.pop('prediction').label()
        sample.set_data(dict(pred_sem_seg=PixelData(data=label)))
    return samples


def _predictions(self: Any, logits: Any, data_samples: list | None = None) -> list:
    """In the place of ``postprocess_result``, where :func:`_merge` follows."""
    from mmseg.structures import SegDataSample

    if not isinstance(logits, _Logits):
        logits = _Logits([_Part(logits, _itself)], tuple(logits.shape[2:]))
    known = data_samples is not None
    if data_samples is None:
        number = logits.parts[0].logits.shape[0]
        data_samples = [SegDataSample() for _ in range(number)]
    for place, sample in enumerate(data_samples):
        metainfo = sample.metainfo if known else None
        sample.prediction = _Prediction(self, logits, place, metainfo)
    return data_samples


def _whole_inference(self: Any, inputs: Tensor, batch_img_metas: list[dict]) -> _Logits:
    """In the place of mmseg's."""
    part = _encode_decode(self, inputs, batch_img_metas)
    # A head need not give the size that it was asked for.
    size = part.resize(part.logits[:1, :1]).shape[2:]
    return _Logits([part], tuple(size))


def _slide_inference(self: Any, inputs: Tensor, batch_img_metas: list[dict]) -> _Logits:
    """In the place of mmseg's: the same windows, in the same order."""
    number, _, height, width = inputs.shape
    rows, columns = (
        _windows(length, crop, stride)
        for length, crop, stride in zip(
            (height, width), self.test_cfg.crop_size, self.test_cfg.stride
        )
    )
    windows = [(r, c) for r in rows for c in columns]
    count = inputs.new_zeros(1, 1, height, width)
    parts: list[_Part] = []
    total = None
    for window in windows:
        crop = inputs[:, :, window[0], window[1]]
        # By this the head knows the size to give.
        batch_img_metas[0]['img_shape'] = crop.shape[2:]
        part = _encode_decode(self, crop, batch_img_metas)
        part.window = window
        count[:, :, window[0], window[1]] += 1
        if not parts and total is None:
            whole = number, part.logits.shape[1], height, width
            if part.logits.numel() * len(windows) > prod(whole):
                total = inputs.new_zeros(whole)
        if total is None:
            parts.append(part)
        else:
            total[:, :, window[0], window[1]] += part.resize(part.logits)
    if total is not None:
        return _Logits([_Part(total.div_(count), _itself)], (height, width))
    return _Logits(parts, (height, width), count)


def _windows(length: int, crop: int, stride: int) -> list[slice]:
    """Along one side. The last ones are moved back to lie inside."""
    number = max(length - crop + stride - 1, 0) // stride + 1
    ends = [min(place * stride + crop, length) for place in range(number)]
    return [slice(max(end - crop, 0), end) for end in ends]


def _encode_decode(model: Any, inputs: Tensor, metas: list[dict]) -> _Part:
    """Logits as the head computed them, before it resizes them if it is known to."""
    from mmseg.models.decode_heads.decode_head import BaseDecodeHead

    head = model.decode_head
    head = head[-1] if isinstance(head, nn.ModuleList) else head
    known = _has_methods_of(head, BaseDecodeHead, ('predict_by_feat',)) and all(
        getattr(type(owner), name).__module__.split('.')[0] == 'mmseg'
        for owner, name in ((model, 'encode_decode'), (head, 'predict'))
    )
    if not known:
        return _Part(model.encode_decode(inputs, metas), _itself)
    handed_over: list[Tensor] = []

    def hand_over(logits: Tensor, _: list[dict]) -> Tensor:
        handed_over.append(logits)
        return logits

    head.predict_by_feat = hand_over
    try:
        logits = model.encode_decode(inputs, metas)
    finally:
        del head.predict_by_feat
    if len(handed_over) != 1 or handed_over[0] is not logits:
        # Something follows that needs them resized.
        return _Part(model.encode_decode(inputs, metas), _itself)
    metas = [dict(meta) for meta in metas]
    return _Part(logits, lambda some: head.predict_by_feat(some, metas))


# Method of a model for scales and flips


def _merge(self: Any, data_samples_list: Sequence[Sequence[Any]]) -> list:
    """In the place of ``SegTTAModel.merge_preds``."""
    from mmengine.structures import PixelData

    merged = []
    for samples in data_samples_list:
        predictions = [sample.pop('prediction') for sample in samples]
        # The published method goes on with the last one.
        sample = samples[-1]
        sample.set_data(dict(pred_sem_seg=PixelData(data=_average(predictions))))
        if hasattr(samples[0], 'gt_sem_seg'):
            sample.set_data(dict(gt_sem_seg=samples[0].gt_sem_seg))
        sample.set_metainfo(dict(img_path=samples[0].img_path))
        merged.append(sample)
    return merged


def _average(predictions: Sequence[_Prediction]) -> Tensor:
    """Labels (1, H, W) of the mean of the probabilities."""
    channels, model = predictions[0].channels, predictions[0].model
    size = predictions[0].size
    pixels = prod(size)
    bytes_each = channels * predictions[0].logits.parts[0].logits.element_size()
    step = max(MERGED_BYTES // bytes_each // MERGED_STEP, 1) * MERGED_STEP
    labels = []
    for start in range(0, pixels, step):
        here = slice(start, min(start + step, pixels))
        total = None
        for prediction in predictions:
            logits = prediction.of_pixels(here)
            if total is None:
                total = torch.zeros_like(logits)
            # A quarter at a time, if it is much.
            for some, sums in zip(*(x.split(_quarter(x), 1) for x in (logits, total))):
                sums += some.softmax(dim=0) if channels > 1 else some.sigmoid()
        total /= len(predictions)
        if channels > 1:
            labels.append(total.argmax(dim=0))
        else:
            labels.append((total > model.decode_head.threshold).to(total)[0])
    return torch.cat(labels).view(1, *size)


def _quarter(values: Tensor) -> int:
    """Pixels of a part of ``values`` (C, pixels) for which softmax gives equal bits."""
    if values.nbytes <= BLOCK_BYTES:
        return max(values.shape[1], 1)
    return max(values.shape[1] // 4 // MERGED_STEP, 1) * MERGED_STEP
