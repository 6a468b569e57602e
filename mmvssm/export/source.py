"""The model that ``tools/export.py`` is asked for, by a config, a name or a folder."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmengine.config import Config, ConfigDict
from torch import nn

from mmvssm import zoo
from mmvssm.builders import build_backbone, build_classifier, list_models
from mmvssm.engine import (
    UsageError,
    is_classifier,
    is_detector,
    load_config,
    published_weights,
)
from mmvssm.engine.checkpoints.weights import unwrap
from mmvssm.engine.configs.image_sizes import inference_batches
from mmvssm.engine.configs.options import parse_options
from mmvssm.export.wrappers import is_segmentor
from mmvssm.pretrained import load_pretrained

_CLASSIFIER_SIZE = (224, 224)
_SEGMENTOR_SIZE = (512, 512)


@dataclass
class Source:
    """A model to export.

    Attributes:
        model: In eval mode, on the CPU.
        weights: Where they come from, for messages.
        size: Height and width to take by default.
        metadata: What ``tools/infer.py --onnx`` needs to know, as JSON has it.
    """

    model: nn.Module
    weights: str
    size: tuple[int, int]
    metadata: dict[str, Any] = field(default_factory=dict)


def load_source(
    name: str,
    checkpoint: str | None = None,
    *,
    task: str | None = None,
    from_scratch: bool = False,
    weights: str | None = None,
    options: Sequence[str] | None = None,
) -> Source:
    """Build and fill a model.

    Args:
        name: A config of a segmentor or classifier, one of :func:`mmvssm.list_models`,
            or a folder (or ``hf://`` address) of :func:`mmvssm.save_pretrained`.
        checkpoint: A file, an address or a name of the zoo. None: what was published
            for the config or the name.
        task: Of a name, ``'maps'`` builds the backbone alone; of the config of a
            detector it takes the backbone.
        from_scratch: Whether to leave the random weights of a new model.
        weights: ``'raw'`` or ``'ema'``, of a file with both.
        options: ``--cfg-options``; of a name, arguments of its builder.

    Raises:
        UsageError: There is no such model, or no weights for it.
        CheckpointError: The checkpoint cannot be used.
    """
    if from_scratch and checkpoint:
        raise UsageError('--from-scratch and --checkpoint exclude each other.')
    if name in list_models():
        return _from_name(name, checkpoint, task, from_scratch, weights, options)
    if name.endswith('.py'):
        return _from_config(name, checkpoint, task, from_scratch, weights, options)
    if Path(name).is_dir() or name.startswith('hf://'):
        if checkpoint or from_scratch:
            raise UsageError(
                f'{name} has weights of its own: leave out --checkpoint and '
                '--from-scratch.'
            )
        model = load_pretrained(name)
        size = _SEGMENTOR_SIZE if is_segmentor(model) else _CLASSIFIER_SIZE
        return Source(model, name, size, dict(model=name))
    raise UsageError(
        f'{name} is neither a config (NAME.py) nor a folder of mmvssm.save_pretrained '
        f'nor one of {", ".join(list_models())}.'
    )


def _from_name(
    name: str,
    checkpoint: str | None,
    task: str | None,
    from_scratch: bool,
    weights: str | None,
    options: Sequence[str] | None,
) -> Source:
    if not (checkpoint or from_scratch) and not list_models(name, pretrained=True):
        raise UsageError(
            f'no weights were published for {name}: give --checkpoint, or '
            '--from-scratch for random weights.'
        )
    source = checkpoint or f'{zoo.SCHEME}{name}'
    arguments = parse_options(options or ())
    build = build_backbone if task == 'maps' else build_classifier
    pretrained: bool | str = False if from_scratch else source
    try:
        model = build(name, pretrained=pretrained, weights=weights, **arguments)
    except TypeError as error:
        raise UsageError(
            f'--cfg-options {" ".join(options or ())}: {name} does not take them: '
            f'{error}.'
        ) from error
    said = 'random weights' if from_scratch else source
    return Source(model.eval(), said, _CLASSIFIER_SIZE, dict(model=name))


def _from_config(
    path: str,
    checkpoint: str | None,
    task: str | None,
    from_scratch: bool,
    weights: str | None,
    options: Sequence[str] | None,
) -> Source:
    from mmvssm.engine.inference.infer import load_model

    cfg = load_config(path, options, required=('model', 'test_dataloader'))
    if is_detector(cfg) and task != 'maps':
        raise UsageError(
            f'{path} is a detector, whose proposals and boxes are the domain of '
            'mmdeploy: export its backbone alone with --task maps.'
        )
    source = None if from_scratch else checkpoint or published_weights(path)
    model = unwrap(load_model(cfg, source, 'cpu', weights))
    metadata = dict(model=path)
    if is_classifier(cfg):
        size = inference_batches(cfg)[0][1:]
        return Source(model, source or 'random weights', size, metadata)
    if is_detector(cfg):
        model = model.backbone
    else:
        pipeline = cfg.test_dataloader.dataset.pipeline
        metadata['test_pipeline'] = _plain(pipeline)
    size = cfg.get('crop_size') or cfg.model.data_preprocessor.get('size')
    return Source(
        model,
        source or 'random weights',
        tuple(size) if size else _SEGMENTOR_SIZE,
        metadata,
    )


def _plain(value: Any) -> Any:
    """As JSON has it."""
    if isinstance(value, (Config, ConfigDict, dict)):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(part) for part in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return str(value)
