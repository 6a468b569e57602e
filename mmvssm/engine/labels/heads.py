"""Which labels the heads of a config's model are for."""

import inspect
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from mmengine.registry import MODELS

from .report import registered, shorten


class HeadLabels(NamedTuple):
    """What a head takes as labels.

    Attributes:
        name (str): Where it is in the config, such as ``'model.decode_head'``.
        number (int): Labels are 0 to ``number - 1``.
        ignored (int | None): The label that the loss leaves out.
        outputs (int): Its channels; 1 for two classes.
        problem (str): Why it cannot learn; empty where it can.
    """

    name: str
    number: int
    ignored: int | None = 255
    outputs: int = 0
    problem: str = ''


def segmentation_heads(model: dict) -> list[HeadLabels]:
    """The heads of a segmentor whose labels are those of the data set."""
    found = []
    for name in ('decode_head', 'auxiliary_head'):
        for where, head in _each(f'model.{name}', model.get(name)):
            # It learns the edges between the classes.
            if _type(head).rpartition('.')[2] == 'STDCHead':
                continue
            number = _option(head, 'num_classes')
            if number is None:
                continue
            ignored = _option(head, 'ignore_index', 255)
            outputs = _option(head, 'out_channels') or number
            problem = ''
            if outputs == 1:
                number = 2
                if _has_softmax(head):
                    problem = (
                        f'{where} has one output (num_classes or out_channels is 1), '
                        'and softmax makes its loss 0 whatever the labels: set '
                        'num_classes=2, the background is a class of its own, and '
                        'name both in metainfo of the data sets.'
                    )
            found.append(HeadLabels(where, number, ignored, outputs, problem))
    return found


def detection_heads(model: dict) -> list[HeadLabels]:
    """The heads of a detector that tell the classes of the data set apart."""
    found = []
    roi = model.get('roi_head') or {}
    for where, head in (
        *_each('model.bbox_head', model.get('bbox_head')),
        *_each('model.mask_head', model.get('mask_head')),
        *_each('model.roi_head.bbox_head', roi.get('bbox_head')),
        *_each('model.roi_head.mask_head', roi.get('mask_head')),
    ):
        number = _option(head, 'num_classes')
        if number is not None and not head.get('class_agnostic'):
            found.append(HeadLabels(where, number))
    return found


def classification_heads(model: dict) -> list[HeadLabels]:
    """The head of a classifier, and the data preprocessor that mixes its labels."""
    found = []
    for name in ('head', 'data_preprocessor'):
        part = model.get(name)
        number = part.get('num_classes') if isinstance(part, dict) else None
        if number is not None:
            found.append(HeadLabels(f'model.{name}', number))
    return found


def contradictions(
    heads: Sequence[HeadLabels], classes: Sequence[str], config: str, split: str
) -> Iterator[str]:
    """What heads and the classes of a data set do not agree on."""
    yield from (f'{config}: {head.problem}' for head in heads if head.problem)
    others = [h for h in heads if h.number != len(classes) and not h.problem]
    if len(classes) == 1 and any(head.outputs == 1 for head in others):
        yield (
            f'{config}: one output of {others[0].name} tells two classes apart, but '
            f'the data set of {split} has only {classes[0]!r}: name what 0 stands for '
            f"first, metainfo=dict(classes=('background', {classes[0]!r}))."
        )
        return
    if others:
        names = ', '.join(head.name for head in others)
        yield (
            f'{config}: num_classes is {others[0].number} in {names}, but the data set '
            f'of {split} has {len(classes)} ({shorten(classes)}): set num_classes='
            f'{len(classes)} of every head, or metainfo=dict(classes=...) of the data '
            'sets to the names of the classes there are.'
        )


def _each(name: str, heads: Any) -> Iterator[tuple[str, dict]]:
    if isinstance(heads, (list, tuple)):
        for number, head in enumerate(heads):
            yield from _each(f'{name}[{number}]', head)
    elif isinstance(heads, dict):
        yield name, heads


def _type(head: dict) -> str:
    kind = head.get('type')
    return kind if isinstance(kind, str) else getattr(kind, '__name__', '')


def _option(head: dict, name: str, default: Any = None) -> Any:
    """An option of a head, or what its class takes without it."""
    if name in head:
        return head[name]
    kind = registered(MODELS, head.get('type'))
    for base in getattr(kind, '__mro__', ()):
        found = inspect.signature(base.__init__).parameters.get(name)
        if found and found.default is not found.empty:
            return found.default
    return default


def _has_softmax(head: dict) -> bool:
    losses = head.get('loss_decode') or dict(type='CrossEntropyLoss')
    losses = losses if isinstance(losses, (list, tuple)) else [losses]
    return any(
        _type(loss).endswith('CrossEntropyLoss') and not loss.get('use_sigmoid')
        for loss in losses
    )
