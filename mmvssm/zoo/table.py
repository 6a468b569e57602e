"""Published weight files, one row each: the only place that knows them.

Facts about the files are those of the authors' repositories. None was downloaded while
this was written: sizes, hashes and what a file holds beside its weights are given
where somebody published them.
"""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from mmvssm.errors import ZooError

SCHEME = 'mmvssm://'


@dataclass(frozen=True)
class Crop:
    """The square that a classifier sees of a test image.

    Attributes:
        size: Its side in pixels.
        ratio: Of that side to the shorter side of the resized image.
        interpolation: Of the resizing.
    """

    size: int
    ratio: float
    interpolation: str = 'bicubic'

    @property
    def resized(self) -> int:
        """Shorter side of the resized image in pixels."""
        return int(self.size / self.ratio)

    def __str__(self) -> str:
        ratio = f'(crop ratio {self.ratio:g})'
        if self.ratio == 1:
            return f'resized to {self.size}, {self.interpolation}, no crop {ratio}'
        return (
            f'shorter side to {self.resized}, {self.interpolation}, centre crop of '
            f'{self.size} {ratio}'
        )


_CROP_875 = Crop(224, 0.875)
_CROP_1 = Crop(224, 1.0)


@dataclass(frozen=True, kw_only=True)
class Weights:
    """A published file, or published figures without a file.

    Attributes:
        name: What it goes by here: the name of a model, or of a config.
        kind: What the file holds.
        model: Model of its backbone, one of :func:`mmvssm.list_models`.
        url: Address, None if no file was ever published.
        file: What to call it on the disk.
        copy: Key of the weights inside the file that the figures belong to, such as
            ``'model_ema'``; None if that is not known.
        metrics: Published figures.
        evaluation: How they were measured.
        crop: Of the test images of a classifier; None if that is not published.
        licence: Of the weights, or ``'none stated'``.
        configs: Configs whose whole model this is.
        megabytes: Size, where known. Files of Vim hold averaged weights (EMA) and the
            states of the optimizer, too.
        sha256: Of the file, where its authors publish one: a file with another one is
            refused.
        note: What else a user should know.
    """

    name: str
    kind: Literal['classifier', 'segmentor', 'detector']
    model: str
    url: str | None
    file: str
    copy: str | None
    metrics: Mapping[str, float]
    evaluation: str
    licence: str
    crop: Crop | None = None
    configs: tuple[str, ...] = ()
    megabytes: float | None = None
    sha256: str | None = None
    note: str = ''


# VMamba (MzeroMiko/VMamba)

_VMAMBA_LICENCE = 'MIT, that of the code; none is stated for the weights'
_VMAMBA_EMA = (
    'the figure is that of averaged weights (EMA), which the file is said to hold '
    'under model'
)


def _vmamba(tag: str, file: str) -> str:
    # The tags on GitHub begin with a number sign.
    return f'https://github.com/MzeroMiko/VMamba/releases/download/%23{tag}/{file}'


def _vmamba_classifier(
    model: str, tag: str, file: str, top_1: float, note: str = _VMAMBA_EMA
) -> Weights:
    return Weights(
        name=model,
        kind='classifier',
        model=model,
        url=_vmamba(tag, file),
        file=file,
        copy='model',
        metrics={'top-1': top_1},
        evaluation=f'{_CROP_875}; float16 autocast',
        configs=(f'{model}_in1k',),
        crop=_CROP_875,
        licence=_VMAMBA_LICENCE,
        note=note,
    )


def _vmamba_segmentor(
    config: str,
    model: str,
    tag: str,
    file: str,
    miou: float,
    multi_scale: float,
    also: tuple[str, ...] = (),
    note: str = '',
) -> Weights:
    return Weights(
        name=config,
        kind='segmentor',
        model=model,
        url=_vmamba(tag, file),
        file=file,
        copy='state_dict',
        metrics={'mIoU': miou, 'mIoU(ms+flip)': multi_scale},
        evaluation='whole images, shorter side as the crop; then 6 scales, flipped',
        licence=_VMAMBA_LICENCE,
        configs=(config, *also),
        note=note,
    )


def _vmamba_detector(
    config: str,
    model: str,
    tag: str,
    file: str,
    box: tuple[float, float, float],
    mask: tuple[float, float, float],
    also: tuple[str, ...] = (),
) -> Weights:
    return Weights(
        name=config,
        kind='detector',
        model=model,
        url=_vmamba(tag, file),
        file=file,
        copy='state_dict',
        metrics=_average_precision(box, mask),
        evaluation='COCO val2017, shorter side 800, longer at most 1333',
        licence=_VMAMBA_LICENCE,
        configs=(config, *also),
    )


def _average_precision(
    box: tuple[float, float, float], mask: tuple[float, float, float]
) -> dict[str, float]:
    names = ('AP', 'AP50', 'AP75')
    boxes = {f'box {name}': value for name, value in zip(names, box, strict=True)}
    masks = {f'mask {name}': value for name, value in zip(names, mask, strict=True)}
    return boxes | masks


_VMAMBA = (
    _vmamba_classifier(
        'vmamba_t_s1l8', 'v2cls', 'vssm1_tiny_0230s_ckpt_epoch_264.pth', 82.6
    ),
    _vmamba_classifier(
        'vmamba_s_s1l20', 'v2cls', 'vssm1_small_0229s_ckpt_epoch_240.pth', 83.3
    ),
    _vmamba_classifier(
        'vmamba_b_s1l20', 'v2cls', 'vssm1_base_0229s_ckpt_epoch_225.pth', 83.8
    ),
    _vmamba_classifier(
        'vmamba_t_s2l5', 'v2cls', 'vssm_tiny_0230_ckpt_epoch_262.pth', 82.5
    ),
    _vmamba_classifier(
        'vmamba_s_s2l15', 'v2cls', 'vssm_small_0229_ckpt_epoch_222.pth', 83.6
    ),
    _vmamba_classifier(
        'vmamba_b_s2l15', 'v2cls', 'vssm_base_0229_ckpt_epoch_237.pth', 83.9
    ),
    _vmamba_classifier(
        *('vmamba_t_v0', 'v0cls', 'vssmtiny_dp01_ckpt_epoch_292.pth', 82.2),
        note='raw weights; trained with a drop path of 0.1 (the paper says 0.2)',
    ),
    _vmamba_classifier(
        'vmamba_s_v0', 'v0cls', 'vssmsmall_dp03_ckpt_epoch_238.pth', 83.5
    ),
    _vmamba_classifier(
        *('vmamba_b_v0', 'v0cls', 'vssmbase_dp06_ckpt_epoch_241.pth', 83.7),
        note=f'{_VMAMBA_EMA}; trained with a drop path of 0.6 (its config says 0.5)',
    ),
    _vmamba_segmentor(
        *('upernet_vmamba_t', 'vmamba_t_s1l8', 'v2seg'),
        'upernet_vssm_4xb4-160k_ade20k-512x512_tiny_s_iter_160000.pth',
        *(47.9, 48.8),
        also=('upernet_vmamba_t_ema', 'upernet_vmamba_t_accum8'),
        note='the paper has 48.0',
    ),
    _vmamba_segmentor(
        *('upernet_vmamba_t_s2l5', 'vmamba_t_s2l5', 'v2seg'),
        'upernet_vssm_4xb4-160k_ade20k-512x512_tiny_iter_160000.pth',
        *(48.3, 48.6),
    ),
    _vmamba_segmentor(
        *('upernet_vmamba_s', 'vmamba_s_s2l15', 'v2seg'),
        'upernet_vssm_4xb4-160k_ade20k-512x512_small_iter_144000.pth',
        *(50.6, 51.2),
    ),
    _vmamba_segmentor(
        *('upernet_vmamba_b', 'vmamba_b_s2l15', 'v2seg'),
        'upernet_vssm_4xb4-160k_ade20k-512x512_base_iter_160000.pth',
        *(51.0, 51.6),
    ),
    _vmamba_segmentor(
        *('upernet_vmamba_v0_t', 'vmamba_t_v0', 'v0seg'),
        'vssmtiny_upernet_4xb4-160k_ade20k-512x512_iter_160000.pth',
        *(47.3, 48.3),
    ),
    _vmamba_segmentor(
        *('upernet_vmamba_v0_s', 'vmamba_s_v0', 'v0seg'),
        'vssmsmall_upernet_4xb4-160k_ade20k-512x512_iter_160000.pth',
        *(49.5, 50.5),
    ),
    _vmamba_segmentor(
        *('upernet_vmamba_v0_b', 'vmamba_b_v0', 'v0seg'),
        'vssmbase_upernet_4xb4-160k_ade20k-512x512_iter_128000.pth',
        *(50.0, 51.3),
    ),
    _vmamba_segmentor(
        *('upernet_vmamba_v0_s_640', 'vmamba_s_v0', '20240223'),
        'vssmsmall_upernet_4xb4-160k_ade20k-640x640_iter_112000.pth',
        *(50.8, 50.8),
    ),
    _vmamba_detector(
        *('mask_rcnn_vmamba_t_1x', 'vmamba_t_s1l8', 'v2det'),
        'mask_rcnn_vssm_fpn_coco_tiny_s_epoch_12.pth',
        *((47.3, 69.3, 52.0), (42.7, 66.4, 45.9)),
        also=('mask_rcnn_vmamba_t_1x_bf16', 'mask_rcnn_vmamba_t_1x_fp16'),
    ),
    _vmamba_detector(
        *('mask_rcnn_vmamba_t_3x', 'vmamba_t_s1l8', 'v2det'),
        'mask_rcnn_vssm_fpn_coco_tiny_ms_3x_s_epoch_31.pth',
        *((48.8, 70.4, 53.5), (43.7, 67.4, 47.0)),
    ),
    _vmamba_detector(
        *('mask_rcnn_vmamba_t_s2l5_1x', 'vmamba_t_s2l5', 'v2det'),
        'mask_rcnn_vssm_fpn_coco_tiny_epoch_12.pth',
        *((47.4, 69.5, 52.0), (42.7, 66.3, 46.0)),
    ),
    _vmamba_detector(
        *('mask_rcnn_vmamba_t_s2l5_3x', 'vmamba_t_s2l5', 'v2det'),
        'mask_rcnn_vssm_fpn_coco_tiny_ms_3x_epoch_36.pth',
        *((48.9, 70.6, 53.6), (43.7, 67.7, 46.8)),
    ),
    _vmamba_detector(
        *('mask_rcnn_vmamba_s_1x', 'vmamba_s_s2l15', 'v2det'),
        'mask_rcnn_vssm_fpn_coco_small_epoch_11.pth',
        *((48.7, 70.0, 53.4), (43.7, 67.3, 47.0)),
    ),
    _vmamba_detector(
        *('mask_rcnn_vmamba_s_3x', 'vmamba_s_s2l15', 'v2det'),
        'mask_rcnn_vssm_fpn_coco_small_ms_3x_epoch_32.pth',
        *((49.9, 70.9, 54.7), (44.2, 68.2, 47.7)),
    ),
    _vmamba_detector(
        *('mask_rcnn_vmamba_b_1x', 'vmamba_b_s2l15', 'v2det'),
        'mask_rcnn_vssm_fpn_coco_base_epoch_11.pth',
        *((49.2, 71.4, 54.0), (44.1, 68.3, 47.7)),
    ),
    _vmamba_detector(
        *('mask_rcnn_vmamba_b_1x_bs8', 'vmamba_b_s2l15', 'v2det'),
        'mask_rcnn_vssm_fpn_coco_base_epoch_12_bs8.pth',
        *((49.2, 70.9, 53.9), (43.9, 67.7, 47.6)),
    ),
    _vmamba_detector(
        *('mask_rcnn_vmamba_v0_t_1x', 'vmamba_t_v0', 'v0det'),
        'vssmtiny_mask_rcnn_swin_fpn_coco_epoch_12.pth',
        *((46.5, 68.5, 50.7), (42.1, 65.5, 45.3)),
    ),
    _vmamba_detector(
        *('mask_rcnn_vmamba_v0_s_1x', 'vmamba_s_v0', 'v0det'),
        'vssmsmall_mask_rcnn_swin_fpn_coco_epoch_12.pth',
        *((48.2, 69.7, 52.5), (43.0, 66.6, 46.4)),
    ),
    _vmamba_detector(
        *('mask_rcnn_vmamba_v0_b_1x', 'vmamba_b_v0', 'v0det'),
        'vssmbase_mask_rcnn_swin_fpn_coco_epoch_12.pth',
        *((48.6, 70.0, 53.1), (43.3, 67.1, 46.7)),
    ),
    _vmamba_detector(
        *('mask_rcnn_vmamba_v0_t_3x', 'vmamba_t_v0', 'v0det'),
        'vssmtiny_mask_rcnn_swin_fpn_coco_ms_3x_epoch_34.pth',
        *((48.5, 70.0, 52.7), (43.2, 66.9, 46.4)),
    ),
    _vmamba_detector(
        *('mask_rcnn_vmamba_v0_s_3x', 'vmamba_s_v0', 'v0det'),
        'vssmsmall_mask_rcnn_swin_fpn_coco_ms_3x_epoch_34.pth',
        *((49.7, 70.4, 54.2), (44.0, 67.6, 47.3)),
    ),
)

# Vim (hustvl/Vim)

_VIM_LICENCE = (
    'the model card says Apache-2.0 in its header and non-commercial in its text'
)


def _vim_classifier(
    model: str,
    repository: str,
    file: str,
    metrics: Mapping[str, float],
    megabytes: float,
    copy: str = 'model',
    note: str = '',
) -> Weights:
    return Weights(
        name=model,
        kind='classifier',
        model=model,
        url=f'https://huggingface.co/hustvl/{repository}/resolve/main/{file}',
        file=file,
        copy=copy,
        metrics=metrics,
        evaluation=f'{_CROP_875}; float32',
        configs=(f'{model}_in1k',),
        crop=_CROP_875,
        licence=_VIM_LICENCE,
        megabytes=megabytes,
        note=note,
    )


def _without_file(
    name: str,
    kind: Literal['classifier', 'segmentor', 'detector'],
    model: str,
    metrics: Mapping[str, float],
    note: str = '',
) -> Weights:
    """Published figures whose file was never published."""
    return Weights(
        name=name,
        kind=kind,
        model=model,
        url=None,
        file='',
        copy=None,
        metrics=metrics,
        evaluation='as published',
        licence='none stated',
        configs=(f'{name}_in1k',) if kind == 'classifier' else (name,),
        note=note,
    )


_VIM = (
    _vim_classifier(
        *('vim_t', 'Vim-tiny-midclstok', 'vim_t_midclstok_76p1acc.pth'),
        {'top-1': 76.1, 'top-5': 93.0},
        109.7,
    ),
    _vim_classifier(
        *('vim_t_stride8', 'Vim-tiny-midclstok', 'vim_t_midclstok_ft_78p3acc.pth'),
        {'top-1': 78.3, 'top-5': 94.2},
        111.2,
    ),
    _vim_classifier(
        *('vim_s', 'Vim-small-midclstok', 'vim_s_midclstok_80p5acc.pth'),
        {'top-1': 80.5, 'top-5': 95.1},
        394.2,
        note='the paper has 80.3; a third party noted the SHA-256 '
        'aae4583e2def6389b66cfaf292cfade47a873182a39adbec19ec55b730ea9fe3',
    ),
    _vim_classifier(
        *('vim_s_stride8', 'Vim-small-midclstok', 'vim_s_midclstok_ft_81p6acc.pth'),
        {'top-1': 81.6, 'top-5': 95.4},
        397.4,
        note='the paper has 81.4',
    ),
    _vim_classifier(
        *('vim_b', 'Vim-base-midclstok', 'vim_b_midclstok_81p9acc.pth'),
        {'top-1': 81.9, 'top-5': 95.8},
        1489.8,
        copy='model_ema',
        note='that the figure is that of averaged weights (EMA) is said by one third '
        'party',
    ),
    _without_file('upernet_vim_t', 'segmentor', 'vim_t', {'mIoU': 41.0}),
    _without_file('upernet_vim_s', 'segmentor', 'vim_s', {'mIoU': 44.9}),
    _without_file(
        'cascade_mask_rcnn_vim_t_lsj_100ep',
        'detector',
        'vim_t',
        _average_precision((45.7, 63.9, 49.6), (39.2, 60.9, 41.7)),
    ),
)

# Mamba® (wangf3014/Mamba-Reg)


def _mambar_classifier(model: str, size: str, top_1: float, note: str = '') -> Weights:
    file = f'mambar_{size}_patch16_224.pth'
    return Weights(
        name=model,
        kind='classifier',
        model=model,
        url=f'https://huggingface.co/Wangf3014/Mamba-Reg/resolve/main/{file}',
        file=file,
        copy='model',
        metrics={'top-1': top_1},
        evaluation=f'{_CROP_1}; bfloat16 autocast',
        # The file is that of the last of three trainings.
        configs=(f'{model}_stage3_in1k',),
        crop=_CROP_1,
        licence='none stated',
        note=note,
    )


_MAMBAR = (
    _mambar_classifier('mambar_s', 'small', 81.4),
    _mambar_classifier(
        'mambar_b', 'base', 83.0, 'the first version of the paper: 82.9'
    ),
    _mambar_classifier(
        'mambar_l', 'large', 83.6, 'the first version of the paper: 83.2'
    ),
    _without_file(
        'mambar_l_384',
        'classifier',
        'mambar_l',
        {'top-1': 84.5},
        'fine-tuned and tested at 384x384',
    ),
    _without_file('upernet_mambar_s', 'segmentor', 'mambar_s', {'mIoU': 45.3}),
    _without_file('upernet_mambar_b', 'segmentor', 'mambar_b', {'mIoU': 47.7}),
    _without_file('upernet_mambar_l', 'segmentor', 'mambar_l', {'mIoU': 49.1}),
)

# MLLA (LeapLabTHU/MLLA)

_MLLA_LICENCE = 'MIT, that of the code; none is stated for the weights'


def _mlla(identifier: str) -> str:
    return f'https://cloud.tsinghua.edu.cn/f/{identifier}/?dl=1'


def _mlla_classifier(
    model: str, identifier: str, top_1: float, note: str = ''
) -> Weights:
    return Weights(
        name=model,
        kind='classifier',
        model=model,
        url=_mlla(identifier),
        file=f'{model}.pth',
        copy=None,
        metrics={'top-1': top_1},
        evaluation=f'{_CROP_875}; float32',
        configs=(f'{model}_in1k',),
        crop=_CROP_875,
        licence=_MLLA_LICENCE,
        note=note,
    )


def _mlla_detector(
    config: str,
    model: str,
    identifier: str,
    box: tuple[float, float, float],
    mask: tuple[float, float, float],
) -> Weights:
    return Weights(
        name=config,
        kind='detector',
        model=model,
        url=_mlla(identifier),
        file=f'{config}.pth',
        copy='state_dict',
        metrics=_average_precision(box, mask),
        evaluation='COCO val2017, shorter side 800, longer at most 1333',
        licence=_MLLA_LICENCE,
        configs=(config,),
        note='a file of mmdet 2.x',
    )


_MLLA = (
    _mlla_classifier('mlla_t', '7a19712877cb4242889c', 83.5),
    _mlla_classifier('mlla_s', '0e5d0b1409d540aaa80c', 84.4, 'one table: 84.3'),
    _mlla_classifier('mlla_b', '91c85c5a1061496d8796', 85.3),
    Weights(
        name='upernet_mlla_b',
        kind='segmentor',
        model='mlla_b',
        url=_mlla('41760d4a531a4ffc9cbf'),
        file='upernet_mlla_b.pth',
        copy='state_dict',
        metrics={'mIoU': 51.9, 'mIoU(ms+flip)': 52.5},
        evaluation='whole images, shorter side as the crop; then 6 scales, flipped',
        licence=_MLLA_LICENCE,
        configs=('upernet_mlla_b',),
        note='a file of mmseg 0.x',
    ),
    _mlla_detector(
        *('mask_rcnn_mlla_t_1x', 'mlla_t', 'ce362e868fb5491ca55c'),
        *((46.8, 69.5, 51.5), (42.1, 66.4, 45.0)),
    ),
    _mlla_detector(
        *('mask_rcnn_mlla_s_1x', 'mlla_s', '3d29bec850e0441a8842'),
        *((49.2, 71.5, 53.9), (44.2, 68.5, 47.2)),
    ),
    _mlla_detector(
        *('mask_rcnn_mlla_b_1x', 'mlla_b', '826278b01bed4df2bbc1'),
        *((50.5, 72.0, 55.4), (45.0, 69.3, 48.6)),
    ),
    _mlla_detector(
        *('mask_rcnn_mlla_t_3x', 'mlla_t', '339d49127565432fb912'),
        *((48.8, 71.0, 53.6), (43.8, 68.0, 46.8)),
    ),
    _mlla_detector(
        *('mask_rcnn_mlla_s_3x', 'mlla_s', 'b501c886982e4c7f926d'),
        *((50.5, 71.8, 55.2), (44.9, 69.1, 48.2)),
    ),
)

TABLE: dict[str, Weights] = {
    row.name: row for row in (*_VMAMBA, *_VIM, *_MAMBAR, *_MLLA)
}


def find(name: str) -> Weights:
    """The row of a name, with or without ``mmvssm://`` in front.

    Raises:
        ZooError: There is no such row.
    """
    bare = name.removeprefix(SCHEME)
    if bare in TABLE:
        return TABLE[bare]
    near = difflib.get_close_matches(bare, TABLE, n=3, cutoff=0.5)
    hint = f'did you mean {" or ".join(near)}? ' if near else ''
    raise ZooError(
        f"the zoo has no weights '{bare}'; {hint}`python -m mmvssm.zoo list` lists all"
    )


def of_config(config: str) -> Weights | None:
    """The whole model that was published for a config, named without ``.py``."""
    return next((row for row in TABLE.values() if config in row.configs), None)
