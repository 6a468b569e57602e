"""The benchmarks: what they compare with is right, and they run."""

import importlib
import json
import re
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import warm
from mmvssm import ops
from tiny import REPO

BENCHMARKS = REPO / 'benchmarks'
if not BENCHMARKS.exists():
    pytest.skip('there are none in a source distribution', allow_module_level=True)


@pytest.fixture
def load(monkeypatch):
    """Import a module from beside the benchmarks."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


def in_double(inputs):
    return [x.detach().double().requires_grad_() for x in inputs]


def results(function, inputs):
    """The output and the gradients of a random projection of it."""
    out = function(*inputs)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    return out, *torch.autograd.grad((out * weight).sum(), inputs)


@pytest.mark.parametrize('channels_last', [True, False])
@pytest.mark.parametrize(
    'shape', [(2, 1, 6, 13, 3), (1, 3, 2, 16, 1), (2, 2, 2, 1, 2), (1, 2, 3, 5, 1)]
)
@pytest.mark.parametrize('peer', ['loop_scan', 'parallel_scan'])
def test_peers_compute_the_scan(load, peer, shape, channels_last):
    inputs = in_double(load('scan_cpu_inputs').op_inputs(*shape, channels_last))

    def reference(u, delta, A, B, C, D, bias):
        return ops.selective_scan(
            u, delta, A, B, C, D, None, bias, True, backend='reference'
        )

    got = results(getattr(load('scan_cpu_peers'), peer), inputs)
    for x, want in zip(got, results(reference, inputs)):
        torch.testing.assert_close(x, want)


def test_inputs_have_the_layout_they_are_asked_for(load):
    op_inputs = load('scan_cpu_inputs').op_inputs
    for channels_last in (True, False):
        u, delta, A, B, *_ = op_inputs(2, 3, 4, 5, 6, channels_last)
        assert u.shape == delta.shape == (2, 12, 5)
        assert A.shape == (12, 6) and B.shape == (2, 3, 6, 5)
        strides = (60, 1, 12) if channels_last else (60, 5, 1)
        assert u.stride() == delta.stride() == strides
        assert B.stride() == ((90, 6, 1, 18) if channels_last else (90, 30, 5, 1))


def test_published_core_computes_ss2d(load):
    peers = load('scan_cpu_peers')
    inputs = in_double(load('scan_cpu_inputs').ss2d_inputs(2, 8, 3, 5, 2))
    want = ops.ss2d_scan(*inputs, backend='reference')
    torch.testing.assert_close(peers.loop_ss2d(*inputs), want)
    assert torch.equal(peers.no_ss2d(*inputs), inputs[0])


def test_floor_is_the_larger_of_bytes_and_arithmetic(load):
    floor_seconds = load('scan_cpu_floor').floor_seconds
    shape = dict(batch=2, groups=3, channels=5, length=7, states=4)
    elements, weights = 2 * 3 * 5 * 7, 2 * 3 * 7 * 4
    free = dict(stream=0.0, exp2=0.0, softplus=0.0, fma=0.0)

    def seconds(which, **costs):
        return floor_seconds(which, {**free, **costs}, **shape)

    assert seconds('forward', stream=1) == 12 * elements + 8 * weights
    assert seconds('backward', stream=1) == 20 * elements + 16 * weights
    assert seconds('forward', exp2=1) == 4 * elements
    assert seconds('backward', exp2=1, softplus=1, fma=1) == (5 + 1 + 68) * elements
    assert seconds('forward', stream=1, softplus=1) == seconds('forward', stream=1)


def test_marks_are_held_against_the_worst(load):
    report = load('scan_cpu_report')

    def network(threads, loop, ours):
        times = dict(ours=ours, loop=loop, **{'no core': 2.0})
        seconds = {core: dict(median=time) for core, time in times.items()}
        return dict(name='VMamba-T s1l8', threads=threads, seconds=seconds)

    rows = [network(1, 4.0, 2.2), network(2, 8.0, 2.4), network(2, 9.0, 2.1)]
    (over_none,) = report.marks(dict(network=rows))
    assert (over_none['at most'], over_none['aim']) == (1.15, 1.12)
    assert [(worst['value'], worst['met']) for worst in over_none['worst']] == [
        (1.1, True),
        (1.2, False),
    ]
    lines = report.marks_table([over_none], [1, 2]).splitlines()
    assert re.search(r'<= 1.15 +1.12 +1.1 +1.2 !', lines[1])


@pytest.mark.parametrize('arguments', [['--quick'], ['--only', 'op,ss2d']])
def test_only_a_complete_run_replaces_the_result(load, monkeypatch, arguments):
    monkeypatch.setattr(sys, 'argv', ['scan_cpu.py', *arguments])
    assert load('scan_cpu').parse_args().out is None
    monkeypatch.setattr(sys, 'argv', ['scan_cpu.py'])
    path = Path(load('scan_cpu').parse_args().out)
    assert path.parent.name == 'scan_cpu' and ops.cpu.library.isa() in path.name


def run_benchmark(name, out, *options):
    done = warm.run([BENCHMARKS / name, *options, '--out', out], timeout=300)
    assert done.returncode == 0, done.stderr
    assert f'written to {out}' in done.stdout
    return json.loads(out.read_text())


def test_quick_run(load, tmp_path):
    pytest.importorskip('matplotlib')
    reason = ops.backend_status()['cpu']
    if reason:
        pytest.skip(reason)
    out = tmp_path / 'new' / 'scan.json'
    result = run_benchmark('scan_cpu.py', out, '--quick', '--threads', '1')
    assert result['environment']['Packages']['torch'].startswith(torch.__version__)
    assert result['settings']['threads'] == [1]
    plan = load('scan_cpu').QUICK
    for part in ('op', 'ss2d', 'network'):
        rows = result[part]
        assert [row['name'] for row in rows] == list(getattr(plan, part))
        assert {row['threads'] for row in rows} == {1}
    for row in result['op']:
        for who in ('ours', 'loop', 'parallel', 'torch'):
            for layout in ('channels_last', 'channels_first'):
                for which in ('forward', 'both'):
                    assert row['seconds'][which][who][layout]['median'] > 0
        assert row['seconds']['backward']['ours']['channels_last']['calls'] >= 2
        assert all(rate > 0 for rate in row['rates'].values())
        assert set(row['floor']) == {'forward', 'backward'}
    if sys.platform == 'linux':
        for row in result['memory']:
            made = row['bytes']['outputs'] + row['bytes']['gradients']
            assert row['bytes']['peak'] >= 0.9 * made
    assert {'op memory: peak / (inputs + outputs + gradients)'} < {
        mark['what'] for mark in result['marks']
    }
    assert Image.open(out.with_suffix('.png')).width > 1000


@pytest.mark.parametrize('contender', ['torch linear', 'plain', 'loop'])
def test_contenders_compute_the_block(load, contender):
    blocks = load('blocks_cpu')
    block, *inputs = blocks.make_block(blocks.Shape(32, 11, 2))
    leaves = [*inputs, *block.parameters()]
    reason = ops.backend_status()['cpu']
    if reason:
        pytest.skip(reason)
    for average in (True, False):
        block.mixer.average = average
        outs = [blocks.CONTENDERS[name](block, *inputs) for name in ('ours', contender)]
        torch.testing.assert_close(*outs)
        grads = [torch.autograd.grad(out, leaves, inputs) for out in outs]
        torch.testing.assert_close(*grads)


def test_quick_run_of_blocks(load, tmp_path):
    reason = ops.backend_status()['cpu']
    if reason:
        pytest.skip(reason)
    out = tmp_path / 'new' / 'blocks.json'
    result = run_benchmark('blocks_cpu.py', out, '--quick', '--threads', '1')
    assert result['environment']['Packages']['torch'].startswith(torch.__version__)
    (row,) = result['blocks']
    blocks = load('blocks_cpu')
    assert row['name'] in blocks.QUICK and row['threads'] == 1
    for which in blocks.PASSES:
        times = row['seconds'][which]
        assert list(times) == list(blocks.CONTENDERS)
        assert all(taken['median'] > 0 for taken in times.values())
        assert row['over_ours'][which]['plain'] == pytest.approx(
            times['plain']['median'] / times['ours']['median']
        )
    assert result['mark']['worst'] == min(
        ratios['plain'] for ratios in row['over_ours'].values()
    )


def test_only_a_complete_run_of_blocks_replaces_the_result(load, monkeypatch):
    monkeypatch.setattr(sys, 'argv', ['blocks_cpu.py', '--quick'])
    assert load('blocks_cpu').parse_args().out is None
    monkeypatch.setattr(sys, 'argv', ['blocks_cpu.py'])
    assert load('blocks_cpu').parse_args().out.endswith('results/blocks_cpu.json')


def test_quick_run_of_attention(load, tmp_path):
    pytest.importorskip('matplotlib')
    reason = ops.backend_status()['cpu']
    if reason:
        pytest.skip(reason)
    out = tmp_path / 'new' / 'attention.json'
    result = run_benchmark('attention_cpu.py', out, '--quick', '--threads', '1')
    assert result['settings']['threads'] == 1
    assert [row['length'] for row in result['rows']] == [16, 36, 64]
    for row in result['rows']:
        for which in ('forward', 'both'):
            times = row['seconds'][which]
            assert set(times) == {'linear', 'softmax', 'scan'}
            assert all(found['median'] > 0 for found in times.values())
    for row in result['stages']:
        assert row['channels'] * row['side'] == 32 * 8 and row['batch'] == 1
        for times in row['seconds'].values():
            assert {'compiled', 'torch', 'one head', 'scan'} < set(times)
            assert all(found['median'] > 0 for found in times.values())
    assert len(result['stages']) == 4
    assert Image.open(out.with_suffix('.png')).width > 1000


def test_growth_of_attention_by_hand(load):
    attention = load('attention_cpu')

    def row(length, seconds):
        times = {who: dict(median=seconds) for who in attention.MIXERS}
        return dict(length=length, seconds=dict(forward=times, both=times))

    rows = [row(16, 9.0), row(36, 2.0), row(72, 5.0)]
    found = attention.growth(rows)
    assert found['both']['linear'] == pytest.approx(1.25)
    text = attention.table(rows, found)
    assert text.splitlines()[-1].endswith('linear at most 1.1 !')
    for who in attention.MIXERS:
        function, inputs = attention.MIXERS[who](attention.QUICK, 16)
        assert function(*inputs).numel() == 16 * 16


def test_memory_of_a_training_step(tmp_path):
    """Many narrow blocks, whose activations are larger than their weights."""
    pytest.importorskip('mmseg')
    if sys.platform != 'linux':
        pytest.skip('reads the counters of Linux')
    out = tmp_path / 'memory.json'
    done = warm.run(
        [BENCHMARKS / 'training_memory.py']
        + [REPO / 'configs/upernet_vim_quickstart.py', '--out', out]
        + ['--cfg-options', 'model.backbone.arch.depth=48']
    )
    assert done.returncode == 0, done.stderr
    saving, plain = json.loads(out.read_text())['runs']
    assert saving['with_cp'] and not plain['with_cp']
    assert saving['parameters'] == plain['parameters'] > 1e6
    assert saving['loss'] == pytest.approx(plain['loss'], rel=1e-4)
    assert saving['peak'] < plain['peak'] - 1e8
    assert '4 x 128x128' in done.stdout


def test_memory_of_an_evaluation(tmp_path):
    pytest.importorskip('mmseg')
    if sys.platform != 'linux':
        pytest.skip('reads the counters of Linux')
    out = tmp_path / 'memory.json'
    done = warm.run(
        [BENCHMARKS / 'evaluation_memory.py', '--json', out, '--tasks', 'test']
        + ['--config', REPO / 'configs/upernet_vmamba_quickstart.py']
        + ['--size', '700', '1000', '--images', '1']
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    whole, small = found['runs']
    assert whole['logits'] and not small['logits']
    assert found['map_bytes'] == 4 * 150 * 700 * 1000
    # A block of the map, and maps of labels, are left.
    assert small['peak'] < whole['peak'] - 0.3 * found['map_bytes']
    assert 'one map of all logits at full size: 0.42 GB' in done.stdout


def test_efficiency_by_hand(load):
    scaling = load('scaling_cpu')
    first = {'alone': [1.0, 1.0], 'side by side': [1.0, 1.5], 'together': [2.0, 2.0]}
    second = {'alone': [], 'side by side': [1.25, 1.0], 'together': [2.0, 2.5]}
    found = scaling.summarise(
        [
            dict(seconds=times, cpu_seconds=times, parameters=10, batch_size=3)
            for times in (first, second)
        ]
    )
    assert found['seconds'] == {'alone': 1.0, 'side by side': 1.375, 'together': 2.25}
    assert found['efficiency']['of_medians'] == pytest.approx(1 / 2.25)
    assert found['efficiency']['of_fastest'] == pytest.approx(1 / 2)
    assert found['efficiency']['of_cpu_seconds'] == pytest.approx(1 / 2.25)
    assert found['efficiency_of_machine']['of_medians'] == pytest.approx(1 / 1.375)
    assert found['efficiency_of_exchange']['of_medians'] == pytest.approx(1.375 / 2.25)
    assert (found['ranks'], found['turns'], found['gradient_bytes']) == (2, 2, 40)


def test_quick_run_of_scaling(tmp_path):
    pytest.importorskip('mmseg')
    options = ('--rounds', '2')
    found = run_benchmark('scaling_cpu.py', tmp_path / 'scaling.json', *options)
    assert found['ranks'] == found['turns'] == 2
    assert found['batch_size'] == 4 and found['parameters'] > 2e6
    assert min(found['seconds'].values()) > 0


def test_memory_of_shards(tmp_path):
    pytest.importorskip('mmseg')
    if sys.platform != 'linux':
        pytest.skip('reads the counters of Linux')
    config = REPO / 'configs/upernet_mambar_quickstart.py'
    # Many parameters, so that they are what memory goes to.
    wide = ('--cfg-options', 'model.backbone.arch.depth=48')
    found = run_benchmark('sharding_memory.py', tmp_path / 'm.json', config, *wide)
    whole, sharded = (run['ranks'] for run in found['runs'])
    parameters = whole[0]['parameters']
    assert parameters > 4e6
    for one, other in zip(whole, sharded, strict=True):
        assert one['loss'] == pytest.approx(other['loss'], rel=1e-4)
        # A half of the 12 bytes of weights and moments, and not much of the rest.
        assert other['held'] < one['held'] - 5 * parameters
