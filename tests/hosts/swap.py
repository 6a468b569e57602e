"""Put one of our backbones into the model of another config, as docs/hosts.md says.

The result is small. What is changed for its size alone is in :func:`shrink`.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.config import Config, ConfigDict
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import MODELS, init_default_scope
from torch import nn

from mmvssm.backbones.hierarchical import HierarchicalBackbone
from mmvssm.engine.model_check.probe import look, lost_parameters, without_traces
from mmvssm.families import families

FAMILIES = {family.backbone.__name__: family.backbone for family in families()}
HIERARCHICAL = [
    name for name, cls in FAMILIES.items() if issubclass(cls, HierarchicalBackbone)
]
ISOTROPIC = [name for name in FAMILIES if name not in HIERARCHICAL]
# The smallest model of each family. A family that is not in MORE needs nothing more.
STAGES = dict(depths=(1, 1, 1, 1), dims=8)
BLOCKS = dict(embed_dims=16, depth=4, d_state=4)
MORE = {'MLLA': dict(num_heads=(1, 1, 2, 4)), 'LinearAttentionStudy': dict(head_dim=8)}
# What PlainPyramid makes of patches of 16 pixels: strides of 4, 8, 16 and 32.
SCALES = (4, 2, 1, 0.5)
# Heads that read the maps where there is no neck.
HEADS = ('decode_head', 'auxiliary_head', 'panoptic_head')
# Backbones of hosts whose maps have all one size, as those of Vim and Mamba®.
ONE_SIZE = ('VisionTransformer', 'BEiT', 'MAE')


@dataclass(frozen=True)
class Host:
    """A config of mmseg or mmdet, and what is special about it.

    Attributes:
        file: Its path without the ending.
        fits: Names of our classes that it takes.
        changes: What to change beside the backbone, by dotted keys.
        fit: The same, where it depends on the channels of the maps.
        maps: The maps that neck and heads get, if their settings do not say so.
        unread: It takes a map that it then does not read.
        nested: The backbone is inside another one, under ``backbone_cfg``.
        tiny: What to change for the size of the model alone.
        size: Height and width of its images, where it does not take any size.
        by: Its widths are divided by this number.
        detection: It needs mmdet, or the compiled ops of mmcv, which mmdet needs too.
    """

    file: str
    fits: Collection[str] = tuple(FAMILIES)
    changes: Mapping[str, Any] = field(default_factory=dict)
    fit: Callable[[list[int]], Mapping[str, Any]] = lambda channels: {}
    maps: Sequence[int] = ()
    unread: bool = False
    nested: bool = False
    tiny: Mapping[str, Any] = field(default_factory=dict)
    size: tuple[int, int] | None = None
    by: int = 8
    detection: bool = False


def without_gradient(model: nn.Module) -> list[str]:
    """Names of the parameters with no gradient, which DDP refuses, or no finite one."""
    return [
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
        and (parameter.grad is None or not parameter.grad.isfinite().all())
    ]


def complaints(model: nn.Module, sample: Any) -> list[str]:
    """What tools/train.py would say of a model before its training.

    Args:
        model: As built.
        sample: A made-up data sample, with its size.
    """
    with without_traces():
        seen = look(model, sample.img_shape, sample)
        if seen.all_used:
            return seen.idle
        return seen.idle + lost_parameters(model.backbone, sample.img_shape, seen.used)


def cases(hosts: Sequence[Host], long: Collection[str] = ()) -> list:
    """Parameters of a test: all pairs of a host and a backbone that fits.

    Args:
        hosts: The hosts.
        long: Families whose cases are left out unless long tests are asked for.
    """
    return [
        pytest.param(host, family, marks=[pytest.mark.long] * (family in long))
        for host in hosts
        for family in host.fits
    ]


def case_name(value: Any) -> str:
    """Name of a parameter of a test."""
    return value.file.rpartition('/')[2] if isinstance(value, Host) else str(value)


def build(
    path: Path, scope: str, host: Host, family: str, **preprocessor: Any
) -> nn.Module:
    """The small model of a host with one of our backbones, as a runner makes it."""
    model = deepcopy(_model(path))
    model.data_preprocessor.update(preprocessor)
    shrink(model, host.by)
    put(model, host.tiny)
    swap(model, host, family)
    init_default_scope(scope)
    torch.manual_seed(0)
    net = revert_sync_batchnorm(MODELS.build(model))
    net.init_weights()
    return net


@cache
def _model(path: Path) -> ConfigDict:
    # Some name the package of the backbone, which is not needed without it.
    return Config.fromfile(path, import_custom_modules=False).model


def swap(model: ConfigDict, host: Host, family: str) -> None:
    """Replace the backbone of a model, and change what depends on it.

    Args:
        model: The model of the host's config.
        host: What is special about this config.
        family: Name of our class.
    """
    model.pop('pretrained', None)
    put(model, host.changes)
    place, key = (model, 'backbone')
    if host.nested:
        place, key = (model.backbone, 'backbone_cfg')
    one_size = place[key].type in ONE_SIZE
    if one_size and family in HIERARCHICAL:
        # It makes maps of several sizes. The stages have them already.
        model.neck = None
    necks = as_list(model.get('neck'))
    heads = [head for name in HEADS for head in as_list(model.get(name))]
    # K-Net has the head that reads the maps inside another one.
    heads = [head.get('kernel_generate_head', head) for head in heads]
    readers = [] if host.maps else necks[:1] or heads
    maps = host.maps or sorted({i for reader in readers for i in maps_of(reader)})

    place[key], channels = backbone(family, maps)
    for reader in readers:
        read(reader, maps, channels)
    put(model, host.fit(channels))
    if family in HIERARCHICAL:
        # The norm of a map that nobody reads gets no gradient.
        place[key].out_norm = not host.unread
    elif not one_size:
        pyramid = ConfigDict(
            type='mmvssm.PlainPyramid',
            channels=channels[0],
            scales=tuple(SCALES[i] for i in maps),
            learned=not host.unread,
        )
        if host.nested:
            place[key] = [place[key], pyramid]
        else:
            model.neck = [pyramid, *necks]


def backbone(family: str, maps: Sequence[int]) -> tuple[ConfigDict, list[int]]:
    """Config of the backbone, and the channels of its maps.

    Args:
        family: Name of the class.
        maps: Which of the four stages, or quarters of the blocks, are returned.
    """
    arch = dict(STAGES if family in HIERARCHICAL else BLOCKS, **MORE.get(family, {}))
    cfg = dict(type=f'mmvssm.{family}', arch=arch, out_indices=tuple(maps))
    if family in HIERARCHICAL:
        return ConfigDict(cfg), [arch['dims'] * 2**i for i in maps]
    return ConfigDict(cfg, img_size=64), [arch['embed_dims']] * len(maps)


def maps_of(reader: ConfigDict) -> list[int]:
    """The maps that a neck or head reads; the backbone should return no others."""
    channels = reader.get('in_channels')
    if 'in_index' in reader:
        maps = [i % 4 for i in as_list(reader.in_index)]
    elif 'embed_dim' in reader:
        maps = [0, 1, 2, 3]  # mmseg's Feature2Pyramid
    elif isinstance(channels, (list, tuple)):
        maps = list(range(4 - len(channels), 4))[reader.get('start_level', 0) :]
    else:
        maps = [3]
    return [0, *maps] if 'c1_in_channels' in reader else maps


def read(reader: ConfigDict, maps: Sequence[int], channels: Sequence[int]) -> None:
    """Let a neck or head read its maps where they are, with their channels."""
    places = [maps.index(i) for i in maps_of(reader)]
    if 'c1_in_channels' in reader:
        reader.c1_in_channels = channels[places.pop(0)]
    if 'embed_dim' in reader:
        reader.embed_dim = channels[0]
        return
    many = type(reader.in_channels)
    wanted = [channels[i] for i in places]
    reader.in_channels = wanted[0] if many is int else many(wanted)
    if 'in_index' in reader:
        reader.in_index = places[0] if many is int else places
    if 'start_level' in reader:
        reader.start_level = 0


def put(model: ConfigDict, values: Mapping[str, Any]) -> None:
    """Set what dotted keys name; numbers in them count in lists."""
    for dotted, value in values.items():
        *path, last = (int(key) if key.isdigit() else key for key in dotted.split('.'))
        node = model
        for key in path:
            node = node[key]
        node[last] = value


def as_list(value: Any) -> list:
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]


# ------------------------------------------------------------------------------ size
WIDTHS = {
    'block_mid_channels',
    'c1_channels',
    'channels',
    'context_channels',
    'conv_out_channels',
    'ema_channels',
    'embed_dims',
    'fc_channels',
    'fc_out_channels',
    'feat_channels',
    'feedforward_channels',
    'in_channels',
    'inner_channels',
    'mid_channels',
    'mla_channels',
    'num_deconv_filters',
    'num_feats',
    'ocr_channels',
    'out_channels',
    'out_conv_channels',
    'pam_channels',
    'point_feat_channels',
    'post_process_channels',
    'project_channels',
    'proposal_feature_channel',
    'spatial_channels',
}
# The most that is left of them.
COUNTS = {
    'max_per_img': 10,
    'nms_pre': 50,
    'num': 16,
    'num_blocks': 1,
    'num_convs': 2,
    'num_layers': 2,
    'num_proposals': 10,
    'num_queries': 10,
    'stacked_convs': 1,
    'subdivision_num_points': 32,
}


def shrink(node: Any, by: int) -> None:
    """Make necks, heads and the settings of their training and test small.

    Args:
        node: Settings, or a list of them; changed in place.
        by: Widths are divided by this number.
    """
    if isinstance(node, list):
        for item in node:
            shrink(item, by)
    if not isinstance(node, dict):
        return
    for key, value in node.items():
        if key in WIDTHS and value is not None:
            narrow = [w if w <= by else w // by for w in as_list(value)]
            node[key] = narrow[0] if isinstance(value, int) else type(value)(narrow)
        elif key in COUNTS and isinstance(value, int):
            node[key] = min(value, COUNTS[key])
        elif key == 'num_points' and value > 1000:
            # Points at which masks are compared. Deformable attention has some, too.
            node[key] = 32
        elif key in ('score_thr', 'filter_thr'):
            node[key] = 0.0
        else:
            shrink(value, by)
