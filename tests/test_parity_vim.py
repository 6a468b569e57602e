"""The published numbers of Vim and Mamba®, on every backend that runs here."""

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS
from torch import nn

import mmvssm
from mmvssm.layers import (
    BidirectionalMamba,
    insert_tokens,
    resize_position,
    rotary_angles,
    rotate,
    token_positions,
)
from mmvssm.necks import PlainPyramid
from mmvssm.ops import (
    BackendUnavailableError,
    add_rms_norm,
    choose_backend,
    list_backends,
    use_backend,
)
from parity import RTOL, Case, list_cases
from tiny import REPO


def _takes(backend, dtype):
    try:
        return choose_backend('cpu', dtype, backend) == backend
    except BackendUnavailableError:
        return False


BACKENDS = [b for b in list_backends() if _takes(b, torch.float32)]
on_every_backend = pytest.mark.parametrize('backend', BACKENDS)


def precision(backend):
    """Dtype and tolerance for the layer and operator cases."""
    if _takes(backend, torch.float64):
        return torch.float64, 1e-8
    return torch.float32, RTOL


def leaves(tensors, dtype):
    return {name: value.to(dtype).requires_grad_() for name, value in tensors.items()}


# --------------------------------------------------------------- the operators
@on_every_backend
def test_add_rms_norm(backend):
    case = Case('op_add_rms_norm')
    dtype, rtol = precision(backend)
    inputs = {name: value.to(dtype) for name, value in case.inputs().items()}
    eps = case.arguments['eps']
    out, stream = add_rms_norm(**inputs, eps=eps, backend=backend)
    del inputs['residual']
    alone, first = add_rms_norm(**inputs, eps=eps, backend=backend)
    case.check(
        {
            'out': out,
            'residual_out': stream,
            'out_without_residual': alone,
            'residual_out_without_residual': first,
        },
        rtol,
    )


@pytest.mark.parametrize('name', list_cases('op_vim_rope_*'))
def test_rotary_embedding(name):
    case = Case(name)
    x = case.inputs()['x'].double()
    size, grid = (case.arguments[key] for key in ('ft_seq_len', 'pt_seq_len'))
    angles = rotary_angles(size, size, x.shape[2], (grid, grid), like=x)
    cos, sin = angles.cos(), angles.sin()
    tables = (t.repeat_interleave(2, dim=1) for t in (cos, sin))
    # Published tables are made in float32.
    case.check(
        dict(zip(('out', 'freqs_cos', 'freqs_sin'), (rotate(x, cos, sin), *tables))),
        1e-5,
    )


def test_register_index():
    case = Case('op_register_index')
    outputs = {}
    for height, width, n in case.arguments['H_W_n']:
        patches = height * width
        positions = token_positions(patches, n, 'even')
        numbers = torch.arange(patches + n)[None]
        index = insert_tokens(numbers[:, :patches], numbers[:, patches:], positions)
        outputs[f'token_idx_{height}x{width}_{n}'] = index[0]
        outputs[f'cls_positions_{height}x{width}_{n}'] = torch.tensor(positions)
    case.check(outputs)


def test_position_embedding():
    case = Case('op_vim_pos_embed_resize')
    embedding = case.inputs()['ckpt_pos_embed'].double()
    old, new = (tuple(case.arguments[k]) for k in ('source_grid', 'target_grid'))
    dense = resize_position(embedding[:, 1:], old, new)
    resized = insert_tokens(dense, embedding[:, :1], (0,))
    case.check({'dense': dense, 'resized': resized}, 1e-8)


# ------------------------------------------------------------------- the mixer
@on_every_backend
@pytest.mark.parametrize(
    'name', ['mod_vim_mixer_div2', 'mod_vim_mixer_sum', 'mod_mambar_mixer']
)
def test_mixer(name, backend):
    case = Case(name)
    dtype, rtol = precision(backend)
    average = case.arguments.get('if_divide_out', True)
    mixer = BidirectionalMamba(24, average=average).to(dtype)
    mixer.load_state_dict(case.weights())
    x, g = leaves(case.inputs(), dtype).values()
    with use_backend(backend):
        out = mixer(x)
        (out * g).sum().backward()
    gradients = {f'grad/{name}': p.grad for name, p in mixer.named_parameters()}
    case.check({'out': out, 'grad_x': x.grad, **gradients}, rtol)


# ------------------------------------------------------------------ the models
def record(backbone, case):
    """Outputs of patch embedding and blocks, under their names in the case."""
    found = {}

    def keep(name):
        def hook(module, args, out):
            outs = (
                dict(zip((name, f'{name}_residual'), out))
                if isinstance(out, tuple)
                else {name: out.flatten(2).mT}
            )
            found.update({k: v for k, v in outs.items() if k in case.meta['outputs']})

        return hook

    backbone.patch_embed.register_forward_hook(keep('debug/patch_embed'))
    for i, block in enumerate(backbone.layers):
        block.register_forward_hook(keep(f'debug/layer{i}'))
    return found


@on_every_backend
@pytest.mark.parametrize('name', ['vim_t', 'vim_s', 'mambar_t', 'mambar_s'])
@torch.no_grad()
def test_classifier(name, backend):
    case = Case(f'{name}_logits')
    net = mmvssm.build_classifier(name).eval()
    assert sum(p.numel() for p in net.parameters()) == case.meta['param_count']
    report = mmvssm.load_checkpoint(net, case.weights())
    assert not report.missing and not report.unexpected and not report.notes
    assert (report.arch, report.contents) == (name, 'classifier')
    debug = record(net.backbone, case)
    with use_backend(backend):
        outs = net.backbone(case.inputs()['input'])
        features = net.classifier.pre_logits(outs[-1])
        logits = net.classifier.head(features)
    assert len(debug) >= 3
    case.check({'logits': logits, 'pre_logits': features, **debug})


class Pyramid(nn.Module):
    """A backbone and a neck, as a segmentor has them."""

    def __init__(self, backbone, neck):
        super().__init__()
        self.backbone = backbone
        self.neck = neck

    def forward(self, x):
        return self.neck(self.backbone(x))


def mmseg_neck():
    pytest.importorskip('mmseg')
    from mmseg.models.necks import Feature2Pyramid

    return Feature2Pyramid(192, norm_cfg=dict(type='BN'))


@on_every_backend
@pytest.mark.parametrize(
    'neck', [lambda: PlainPyramid(192), mmseg_neck], ids=['own', 'mmseg']
)
@torch.no_grad()
def test_segmentation_backbone(backend, neck):
    case = Case('vim_t_seg_feats')
    backbone = mmvssm.build_backbone('vim_t', residual_in_fp32=False)
    net = Pyramid(backbone, neck()).eval()
    report = mmvssm.load_checkpoint(net, case.weights())
    assert report.missing == ['neck.upsample_4x.1.num_batches_tracked']
    # No published segmentation model uses its last norm.
    assert report.unexpected == ['norm_f.weight']
    assert (report.arch, report.format) == ('vim_t', 'vim-fpn')
    debug = record(backbone, case)
    with use_backend(backend):
        maps = net(case.inputs()['input'])
    case.check({f'feat{i}': x for i, x in enumerate(maps)} | debug)


@on_every_backend
@torch.no_grad()
def test_detection_backbone(backend):
    case = Case('vim_t_det_feat')
    cfg = Config.fromfile(REPO / 'configs/cascade_mask_rcnn_vim_t_lsj_100ep.py')
    # The case was computed at a quarter of the published side.
    net = MODELS.build(dict(cfg.model.backbone, img_size=256)).eval()
    assert sum(p.numel() for p in net.parameters()) == case.meta['param_count']
    report = mmvssm.load_checkpoint(net, case.weights())
    assert not report.missing and not report.unexpected
    debug = record(net, case)
    with use_backend(backend):
        (out,) = net(case.inputs()['input'])
    case.check({'feat': out, **debug})
