"""The published numbers of MLLA, by the O(L) attention and by its definition."""

import pytest
import torch

import mmvssm
from mmvssm.backbones.mlla import Downsample
from mmvssm.layers import MLLABlock, rotary_tables, rotate
from mmvssm.ops import use_backend
from parity import Case

every_form = pytest.mark.parametrize('backend', ['torch', 'reference'])


def leaves(tensors):
    return {name: x.double().requires_grad_() for name, x in tensors.items()}


def as_map(x, size):
    return x.mT.unflatten(2, size)


def as_tokens(x):
    return x.flatten(2).mT


def test_rotary_embedding():
    case = Case('op_mlla_rope')
    x = case.inputs()['x'].double()
    _, height, width, channels = x.shape
    tables = rotary_tables(height, width, channels, like=x)
    turned = rotate(x.flatten(1, 2), *tables).view_as(x)
    rotations = tables.movedim(0, -1).unflatten(0, (height, width))
    # Published tables are made in float32.
    case.check({'out': turned, 'rotations': rotations}, 1e-5)


def check_layer(case, module, size, rtol):
    """Outputs and gradients of a layer, in double precision and eval mode."""
    module = module.double().eval()
    missing, unexpected = module.load_state_dict(case.weights(), strict=False)
    assert {key.rpartition('.')[2] for key in missing} <= {'num_batches_tracked'}
    assert not unexpected
    x, g = leaves(case.inputs()).values()
    out = as_tokens(module(as_map(x, size)))
    (out * g).sum().backward()
    gradients = {f'grad/{name}': p.grad for name, p in module.named_parameters()}
    case.check({'out': out, 'grad_x': x.grad, **gradients}, rtol)


@every_form
@pytest.mark.parametrize(
    'name,size', [('mod_mlla_block', (5, 5)), ('mod_mlla_block_down', (5, 7))]
)
def test_block(name, size, backend):
    with use_backend(backend):
        # Published rotary tables are made in float32.
        check_layer(Case(name), MLLABlock(16, 2), size, 1e-6)


def test_downsampling():
    case = Case('mod_mlla_patch_merging_down')
    check_layer(case, Downsample(8, 16), tuple(case.arguments['hw_shape']), 1e-8)


def record(backbone):
    """Intermediate maps under their names in the cases."""
    found = {}

    def keep(name):
        def hook(module, args, out):
            found[f'debug/{name}'] = as_tokens(out)

        return hook

    backbone.patch_embed.register_forward_hook(keep('patch_embed'))
    backbone.layers[0].blocks[0].register_forward_hook(keep('block0'))
    backbone.layers[0].downsample.register_forward_hook(keep('stage0_downsampled'))
    return found


def load(net, case):
    report = mmvssm.load_checkpoint(net, case.weights())
    assert (report.family, report.arch) == ('MLLA', 'mlla_t')
    assert not report.unexpected and not report.notes
    # What counts batches has no say in eval mode and is not among the numbers.
    assert {key.rpartition('.')[2] for key in report.missing} == {'num_batches_tracked'}
    return report


@every_form
@torch.no_grad()
def test_classifier(backend):
    case = Case('mlla_t_logits')
    net = mmvssm.build_classifier('mlla_t').eval()
    assert sum(p.numel() for p in net.parameters()) == case.meta['param_count']
    assert load(net, case).contents == 'classifier'
    debug = record(net.backbone)
    with use_backend(backend):
        maps = net.backbone(case.inputs()['input'])
    features = net.classifier.pre_logits(maps[-1])
    logits = net.classifier.head(features)
    case.check({'logits': logits, 'pre_logits': features, **debug})


@every_form
@torch.no_grad()
def test_backbone(backend):
    case = Case('mlla_t_feats')
    net = mmvssm.build_backbone('mlla_t').eval()
    assert sum(p.numel() for p in net.parameters()) == case.meta['param_count']
    assert load(net, case).contents == 'backbone'
    debug = record(net)
    with use_backend(backend):
        maps = net(case.inputs()['input'])
    case.check({f'feat{i}': x for i, x in enumerate(maps)} | debug)
