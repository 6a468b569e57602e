"""The ``torch`` backend divided as on a GPU, and in any other way."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from mmvssm.ops import selective_scan
from mmvssm.ops.selective_scan import torch_backend
from mmvssm.ops.selective_scan.declaration import ScanInputs, ScanOptions
from mmvssm.ops.selective_scan.op import SELECTIVE_SCAN
from mmvssm.ops.selective_scan.torch_backend import Sizes, sizes

from .ops_under_test import selective_scan as scan_case
from .scan_inputs import as_double, gradients, relative_error, scan_inputs

GPU = sizes('cuda')
# Chunks of a few positions, with pieces within them, and without.
SHORT = Sizes(work=2000, quarters=0, beside=0, positions=1, step=2**19)
NO_PIECES = Sizes(work=2000, quarters=0, beside=2, positions=1, step=0)
# The shorter the pieces, the deeper they are within each other.
WAYS = {
    'gpu': (GPU, 8),
    'gpu, pieces of 2': (GPU, 2),
    'gpu, pieces of 3': (GPU, 3),
    'short chunks': (SHORT, 8),
    'short chunks, pieces of 2': (SHORT, 2),
    'no pieces': (NO_PIECES, 8),
}
LENGTHS = (1, 2, 3, 8, 16, 17, 65, 127, 197, 600)


@pytest.fixture
def divide(monkeypatch):
    """Divide the work on the CPU in another way."""

    def divide(way):
        of_device, piece = WAYS[way]
        monkeypatch.setattr(torch_backend, 'sizes', lambda device_type: of_device)
        monkeypatch.setattr(torch_backend, '_PIECE', piece)

    return divide


@pytest.fixture
def depths(monkeypatch):
    """How deep pieces were within pieces, at every call of the recurrence."""
    solve, depth, found = torch_backend._linear_scan_, [0], []

    def watched(*arguments, **options):
        depth[0] += 1
        found.append(depth[0])
        solve(*arguments, **options)
        depth[0] -= 1

    monkeypatch.setattr(torch_backend, '_linear_scan_', watched)
    return found


def errors(inputs, want, **options):
    out, last = selective_scan(
        **inputs, return_last_state=True, backend='torch', **options
    )
    got = dict(out=out, last=last, **gradients((out, last), inputs))
    return {name: relative_error(got[name], want[name]) for name in want}


def truth(inputs, **options):
    inputs = as_double(inputs)
    out, last = selective_scan(
        **inputs, return_last_state=True, backend='reference', **options
    )
    return dict(out=out, last=last, **gradients((out, last), inputs))


@pytest.mark.parametrize('length', LENGTHS)
def test_however_it_is_divided(divide, length):
    inputs = scan_inputs(2, 6, length, 3, 2)
    want = truth(inputs, delta_softplus=True)
    for way in WAYS:
        divide(way)
        found = errors(inputs, want, delta_softplus=True)
        assert max(found.values()) < 1e-12, (way, found)


@pytest.mark.parametrize('length', [2048, 2053])
def test_pieces_within_pieces_within_pieces(divide, depths, length):
    """As for large maps on a GPU: pieces of 8, 64 and 512 positions."""
    divide('gpu')
    inputs = scan_inputs(1, 2, length, 1, optional=('D',))
    found = errors(inputs, truth(inputs, delta_softplus=True), delta_softplus=True)
    assert max(found.values()) < 1e-12, found
    assert max(depths) == 4


@pytest.mark.parametrize('way', WAYS)
@pytest.mark.parametrize('channels_last', [False, True])
def test_float32_and_layouts(divide, way, channels_last):
    divide(way)
    inputs = scan_inputs(
        3, 4, 211, 2, 2, dtype=torch.float32, channels_last=channels_last
    )
    found = errors(inputs, truth(inputs, delta_softplus=True), delta_softplus=True)
    assert max(found.values()) < 2e-6, found


@pytest.mark.parametrize('way', WAYS)
def test_growth_from_a_zero_state(divide, way):
    """Products of growths overflow at every depth; a state of zero stays zero."""
    divide(way)
    inputs = scan_inputs(1, 2, 400, 1, optional=(), dtype=torch.float32)
    inputs = {k: v.detach() for k, v in inputs.items()}
    inputs['A'].fill_(40.0)
    inputs['delta'].fill_(1.0)
    inputs['u'].zero_()
    out = selective_scan(**inputs, backend='torch')
    assert torch.equal(out, torch.zeros_like(out))


@pytest.mark.parametrize('way', WAYS)
def test_same_bits_at_any_number_of_threads(divide, set_threads, way):
    divide(way)
    case = scan_case(2, 48, 1021, 2, 2, dtype=torch.float32)
    results = []
    for threads in (1, 3):
        set_threads(threads)
        results.append(case.run('torch'))
    for name, want in results[0].items():
        assert not want.isnan().any() and torch.equal(results[1][name], want), name


@pytest.mark.parametrize('size', [(2, 384, 64000, 1), (16, 384, 197, 16), (1, 1, 1, 1)])
def test_tracing_knows_what_a_device_saves(size):
    """The promise for a GPU is what the pass itself saves, and not a CPU's."""

    def arguments(device):
        batch, channels, length, states = size
        sequence = torch.empty(batch, channels, length, device=device)
        A = torch.empty(channels, states, device=device)
        weights = torch.empty(batch, 1, states, length, device=device)
        inputs = ScanInputs(sequence, sequence, A, weights, weights)
        return inputs, ScanOptions(True, torch.float32)

    def promised(device):
        with FakeTensorMode():
            inputs, options = arguments(device)
            _, _, saved = SELECTIVE_SCAN.torch_op(*inputs, *options, True, 'torch')
        return saved.shape

    inputs, options = arguments('meta')
    result = SELECTIVE_SCAN.backends['torch'].forward(inputs, options, True)
    assert promised('cuda') == result.saved[0].shape
    assert len(result.saved[0]) < 24
    if size != (1, 1, 1, 1):
        assert promised('cpu') != promised('cuda')


def test_a_cpu_keeps_its_cache_and_others_their_launches():
    assert sizes('cpu').chunk_length(128, 3136, 1, 384) == 16
    for device in ('cuda', 'mps', 'xpu', 'meta'):
        assert sizes(device).chunk_length(128, 3136, 1, 384) == 3136 // 4
    assert sizes('cuda').chunk_length(1, 196, 1, 384) == 196
