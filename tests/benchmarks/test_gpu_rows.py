"""What gpu_suite.sh compares: peers with stand-ins, rows at tiny sizes, on the CPU."""

import sys
from types import ModuleType

import pytest
import torch

from mmvssm import ops
from mmvssm.backbones import VSSM
from mmvssm.heads import ClassificationHead, ImageClassifier
from mmvssm.ops import mamba_ssm
from test_benchmarks import in_double, results


def reference(u, delta, A, B, C, D, bias):
    return ops.selective_scan(
        u, delta, A, B, C, D, None, bias, True, backend='reference'
    )


@pytest.fixture
def oflex(monkeypatch):
    """A stand-in for VMamba's module, with the published signatures."""
    module = ModuleType('selective_scan_cuda_oflex')
    inputs = []

    def fwd(u, delta, A, B, C, D, delta_bias, delta_softplus, nrows, out_float):
        assert delta_softplus is True and nrows == 1 and isinstance(out_float, bool)
        inputs[:] = [u, delta, A, B, C, D, delta_bias]
        out = reference(*(x.detach() for x in inputs))
        return out.float() if out_float and out.dtype != torch.float64 else out, A

    def bwd(u, delta, A, B, C, D, delta_bias, dout, x, delta_softplus, nrows):
        assert delta_softplus is True and nrows == 1 and dout.is_contiguous()
        given = in_double((u, delta, A, B, C, D, delta_bias))
        with torch.enable_grad():
            out = reference(*given)
        return torch.autograd.grad(out, given, dout.double())

    module.fwd, module.bwd = fwd, bwd
    monkeypatch.setitem(sys.modules, 'selective_scan_cuda_oflex', module)


def test_scans_compute_the_scan(load, device, oflex, monkeypatch):
    monkeypatch.setattr(
        mamba_ssm,
        'scan_function',
        lambda: (
            lambda u, delta, A, B, C, D, z, bias, softplus: ops.selective_scan(
                u, delta, A, B, C, D, z, bias, softplus, backend='torch'
            )
        ),
    )
    peers = load('gpu_peers')
    found, missing = peers.scans(device)
    assert {'torch', 'mamba_ssm', 'oflex'} <= found.keys()
    found['compiled'] = peers.compiled_scan(device)
    inputs = [
        x.detach().requires_grad_()
        for x in load('scan_cpu_inputs').op_inputs(2, 2, 3, 7, 4, True)
    ]
    want = results(reference, in_double(inputs))
    for name, scan in found.items():
        for got, x in zip(results(scan.function, inputs), want):
            torch.testing.assert_close(got.double(), x, rtol=1e-4, atol=1e-5, msg=name)


def test_peers_that_are_missing_say_so(load, device):
    peers = load('gpu_peers')
    mamba_ssm._found.cache_clear()
    found, missing = peers.scans(device)
    assert 'selective_scan_cuda_oflex is not installed' in missing['oflex']
    assert 'mamba_ssm is not installed' in missing['mamba_ssm']
    with pytest.raises(ImportError, match='oflex.*mamba_ssm'):
        peers.published_ss2d()


def test_published_core_computes_ss2d(load, oflex):
    name, core = load('gpu_peers').published_ss2d()
    assert name == 'oflex'
    inputs = [
        x.detach().requires_grad_()
        for x in load('scan_cpu_inputs').ss2d_inputs(2, 8, 3, 5, 2)
    ]

    def ours(*inputs):
        return ops.ss2d_scan(*inputs, backend='reference')

    for got, want in zip(results(core, inputs), results(ours, in_double(inputs))):
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-5)


def test_errors_are_found(load, device):
    op = load('gpu_op')
    inputs = op.make_inputs(device, op.OpShape(2, 2, 4, 9, 3), torch.float32, True, 0)

    def wrong(*inputs):
        return 1.5 * reference(*inputs)

    found = op.error_of(reference, inputs)
    assert found['output'] < 1e-6 and found['gradients'] < 1e-5
    found = op.error_of(wrong, inputs)
    assert found['output'] == pytest.approx(0.5, rel=1e-3)
    assert found['gradients'] == pytest.approx(0.5, rel=1e-2)


def test_attention_is_fused_or_not(load, device, monkeypatch):
    """By timm's own switch, which is left as it was."""
    models, made, state = load('gpu_models'), [], [True, False]
    timm, layers = ModuleType('timm'), ModuleType('timm.layers')

    def create_model(name, img_size, num_classes):
        made.append((name, img_size, num_classes, *state))
        return torch.nn.Identity()

    timm.create_model, timm.layers = create_model, layers

    def set_fused_attn(enable=True, experimental=False):
        state[:] = enable, experimental

    layers.use_fused_attn = lambda experimental=False: int(state[experimental])
    layers.set_fused_attn = set_fused_attn
    monkeypatch.setitem(sys.modules, 'timm', timm)
    monkeypatch.setitem(sys.modules, 'timm.layers', layers)
    for build in models.rivals('deit_s', (32, 64)).values():
        build()
    size = 'deit_small_patch16_224', (32, 64), 1000
    assert made == [(*size, True, True), (*size, False, False)]
    assert state == [True, False]


def test_swin_of_mmseg_stands_in(load, monkeypatch):
    pytest.importorskip('mmseg')
    models = load('gpu_models')
    monkeypatch.setitem(sys.modules, 'timm', None)
    monkeypatch.setitem(models.MMSEG, 'swin_t', dict(depths=(1, 1, 1, 1)))
    ((name, build),) = models.rivals('swin_t', (64, 64)).items()
    assert name == 'swin_t, mmseg'
    assert build()(torch.zeros(2, 3, 64, 64)).shape == (2, 1000)
    for build in models.rivals('deit_t', (64, 64)).values():
        with pytest.raises(ImportError, match='timm is not installed'):
            build()


def test_models_of_the_issue_are_all_there(load):
    cases = load('gpu_models').cases(quick=False)
    assert len({case.name for case in cases}) == len(cases) == 7 * 3 * 2 * 2 + 5
    first = [(case.model, case.batch, case.compiled) for case in cases[:6]]
    assert first == [
        (model, 128, compiled)
        for compiled in (False, True)
        for model in ('vmamba_t_s1l8', 'vim_s', 'mlla_t')
    ]
    assert {case.model for case in cases} <= set(load('mmvssm').list_models())


# Rows


def test_rows_of_blocks_and_models(load, device, monkeypatch):
    """In this process: one row of each kind."""
    part, blocks, models = (load(f'gpu_{n}') for n in ('part', 'blocks', 'models'))
    rows = dict(blocks.rows(device, part.QUICK_EFFORT, quick=True))
    assert list(rows) == ['tiny: stage 1', 'tiny: stage 2', 'tiny']
    for name in ('tiny: stage 2', 'tiny'):
        row = rows[name]()
        assert row['floor']['both'] > row['floor']['forward'] > 0
        for who, taken in row['contenders'].items():
            assert taken['difference'] < 0.02, who
            for which in ('forward', 'both'):
                assert len(taken[which]['samples']) == 2, (who, which)
        assert 'torch unfused' in row['contenders']
        assert row['left_out']['torch fused'] == 'it has no fused form'
    # The models of the quick run take a second each; these none.
    monkeypatch.setattr(models.mmvssm, 'build_classifier', tiny_classifier)
    for compiled in (False, True):
        case = models.Case('vmamba_t', 'deit_t', 2, 32, 32, compiled=compiled)
        monkeypatch.setattr(torch, 'compile', lambda model, dynamic: model)
        row = models.measure(device, part.QUICK_EFFORT, case)
        (ours,) = row['contenders'].values()
        assert len(ours['inference']['samples']) == 2
        assert ours['training']['median'] > 0
        assert set(row['left_out']) == {'mamba_ssm', 'deit_t, fused', 'deit_t, unfused'}


def tiny_classifier(name, num_classes):
    backbone = VSSM(dict(depths=(1, 1, 1, 1), dims=8), out_indices=(3,), out_norm=False)
    return ImageClassifier(backbone, ClassificationHead(64, num_classes))


def test_training_step_trains(load, device):
    models = load('gpu_models')
    model = tiny_classifier('', 10)
    images, labels = torch.randn(2, 3, 32, 32), torch.tensor([1, 2])
    for dtype in ('bf16', 'fp32'):
        case = models.Case('vmamba_t', 'deit_t', 2, 32, 32, dtype)
        logits = models.infer(device, case, model, lambda: images, labels)()
        assert not logits.requires_grad
        assert logits.dtype == (torch.bfloat16 if dtype == 'bf16' else torch.float32)
        before = [p.detach().clone() for p in model.parameters()]
        models.train(device, case, model, lambda: images, labels)()
        changed = [not torch.equal(p, x) for p, x in zip(model.parameters(), before)]
        # A zero of a bias moves; a scale of one is moved by less than its digits.
        assert sum(changed) > len(changed) / 2
