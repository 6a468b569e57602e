"""The published numbers, on every backend that runs on the CPU."""

import numpy as np
import pytest
import torch

import mmvssm
from mmvssm.layers import SS2D, PatchMerging2d, VSSBlock
from mmvssm.ops import cross_merge, cross_scan, selective_scan, use_backend
from ops.backends_under_test import BACKENDS, EMULATED, on_backends, takes
from parity import DATA, Case, list_cases, make_input, make_weight

SCANS = list_cases('op_selective_scan_*')
# Whole models take too long in the emulator.
on_every_backend = on_backends(
    *(b for b in BACKENDS if takes(b, torch.float32) and b != EMULATED)
)


def precision(backend):
    """Dtype and tolerance for the layer and operator cases."""
    if takes(backend, torch.float64):
        return torch.float64, 1e-8
    return torch.float32, 3e-5


def leaves(tensors, dtype):
    return {name: value.to(dtype).requires_grad_() for name, value in tensors.items()}


# ------------------------------------------------------------------ the loader
@pytest.mark.parametrize(
    'name', [case for case in list_cases() if 'state_dict' in Case(case).meta]
)
def test_generated_weights_are_the_published_ones(name):
    assert Case(name).weights()


def test_every_number_has_its_description():
    assert list_cases() == sorted(path.stem for path in DATA.glob('*.npz'))
    assert len(SCANS) == 10


def test_weight_rule():
    shape = (4, 6, 3)
    assert make_weight('a.bias', (5,)).dtype == np.float32
    n = make_input('a.x_proj_weight', shape)
    np.testing.assert_allclose(
        make_weight('a.x_proj_weight', shape), n / 3**0.5, rtol=1e-6
    )
    n = make_input('a.fc.weight', shape)
    np.testing.assert_allclose(
        make_weight('a.fc.weight', shape), n / 18**0.5, rtol=1e-6
    )
    step = np.logaddexp(0, make_weight('op.dt_projs_bias', (4, 99)))
    assert 1e-3 <= step.min() < 2e-3 and 0.08 < step.max() <= 0.1
    # A name of its own, numbers of its own.
    assert (make_weight('a.bias', (5,)) != make_weight('b.bias', (5,))).all()


def test_loader_notices_other_weights():
    case = Case('mod_vss_block')
    case.meta['state_dict'][0][0] = 'renamed.weight'
    with pytest.raises(AssertionError, match='not the weights'):
        case.weights()


def test_loader_notices_other_numbers():
    case = Case('op_cross_scan')
    want = torch.from_numpy(case._numbers['out'])
    good = torch.from_numpy(case._numbers['out_channel_last'])
    case.check({'out': want, 'out_channel_last': good}, rtol=1e-12)
    bad = want.clone()
    bad[1, 2, 1, 7] += 1e-6
    for wrong in (bad, want * float('nan'), want.flip(-1), want[:1]):
        with pytest.raises(AssertionError):
            case.check({'out': wrong, 'out_channel_last': good}, rtol=1e-8)
    with pytest.raises(AssertionError, match='has the outputs'):
        case.check({'out': want})


# --------------------------------------------------------------- the operators
@on_every_backend
@pytest.mark.parametrize('name', SCANS)
def test_selective_scan(name, backend):
    case = Case(name)
    dtype, rtol = precision(backend)
    inputs = leaves(case.inputs(), dtype)
    g = inputs.pop('g')
    out, state = selective_scan(
        **inputs,
        delta_softplus=case.arguments['delta_softplus'],
        return_last_state=True,
        backend=backend,
    )
    (out * g).sum().backward()
    gradients = {f'grad_{name}': value.grad for name, value in inputs.items()}
    case.check({'out': out, 'last_state': state, **gradients}, rtol)


def test_cross_scan():
    case = Case('op_cross_scan')
    x, g = leaves(case.inputs(), torch.float64).values()
    out = cross_scan(x)
    (out * g).sum().backward()
    case.check(
        {'out': out, 'out_channel_last': out.permute(0, 3, 1, 2), 'grad_x': x.grad},
        1e-8,
    )


def test_cross_merge():
    case = Case('op_cross_merge')
    ys, g = leaves(case.inputs(), torch.float64).values()
    out = cross_merge(ys.flatten(3), ys.shape[3:])
    (out * g).sum().backward()
    case.check({'out': out, 'out_channel_last': out.mT, 'grad_ys': ys.grad}, 1e-8)


# ------------------------------------------------------------------ the layers
# Name of the case -> how to build the layer.
LAYERS = {
    'mod_ss2d_v0': lambda: SS2D(12, 16, 2.0, gated=True),
    'mod_ss2d_v05_noz': lambda: SS2D(12),
    'mod_ss2d_v05_noz_ratio2': lambda: SS2D(20, ssm_ratio=2.0),
    'mod_vss_block': lambda: VSSBlock(12),
    'mod_vss_block_v0': lambda: VSSBlock(12, 16, 2.0, gated=True, mlp_ratio=0),
    'mod_vmamba_patch_merging': lambda: PatchMerging2d(6, 12),
}


@on_every_backend
@pytest.mark.parametrize('name', LAYERS)
def test_layer(name, backend):
    case = Case(name)
    dtype, rtol = precision(backend)
    module = LAYERS[name]().to(dtype)
    module.load_state_dict(case.weights())
    x, g = leaves(case.inputs(), dtype).values()
    with use_backend(backend):
        if 'channel-last' in case.meta['notes']:
            out = module(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        else:
            out = module(x)
        (out * g).sum().backward()
    gradients = {f'grad/{name}': p.grad for name, p in module.named_parameters()}
    case.check({'out': out, 'grad_x': x.grad, **gradients}, rtol)


# ------------------------------------------------------------------ the models
@on_every_backend
@torch.no_grad()
def test_backbone(backend):
    case = Case('vmamba_t_s1l8_feats')
    net = mmvssm.build_backbone('vmamba_t_s1l8').eval()
    report = mmvssm.load_checkpoint(net, case.weights())
    assert not report.missing and not report.unexpected
    with use_backend(backend):
        maps = net(case.inputs()['input'])
    case.check({f'feat{i}': x for i, x in enumerate(maps)})


@on_every_backend
@pytest.mark.parametrize('name', ['vmamba_t_s1l8', 'vmamba_t_v0'])
@torch.no_grad()
def test_classifier(name, backend):
    case = Case(f'{name}_logits')
    net = mmvssm.build_classifier(name).eval()
    report = mmvssm.load_checkpoint(net, case.weights())
    assert not report.missing and not report.unexpected
    assert report.arch == name
    with use_backend(backend):
        maps = net.backbone(case.inputs()['input'])
    features = net.classifier.pre_logits(maps[-1])
    case.check({'logits': net.classifier.head(features), 'pre_logits': features})
