"""What gpu_suite.sh measures with: times, peak memory, the floor of the card."""

import json
import time
from types import SimpleNamespace

import pytest
import torch

from mmvssm.analysis.measuring import timing
from mmvssm.ops.cuda import nvrtc


def test_measure_keeps_every_repetition(load, device):
    calls = []

    def broken():
        raise ValueError('not here')

    found = device.measure(
        {'sleeps': lambda: calls.append(time.sleep(0.004)), 'broken': broken},
        timing.Effort(rounds=3, turn=0.0),
    )
    assert found['broken'] == dict(failed='ValueError: not here')
    taken = found['sleeps']
    assert len(taken['samples']) == 3 and taken['calls'] == 1
    assert taken['median'] == sorted(taken['samples'])[1] >= 0.004
    # Two that are not counted, one to begin with, three that are.
    assert len(calls) == 6


def test_short_calls_share_a_sample(load, device):
    calls = []
    found = device.measure(
        {'short': lambda: calls.append(1)}, timing.Effort(rounds=1, turn=0.0)
    )
    assert found['short']['calls'] == 50
    assert len(calls) >= 2 + 50


def test_inputs_take_turns(load):
    next_item = load('gpu_device').turns('ab')
    assert [next_item() for _ in range(5)] == list('ababa')


def test_sets_fill_the_cache_several_times(load, monkeypatch):
    gpu = SimpleNamespace(L2_cache_size=60)
    monkeypatch.setattr(torch.cuda, 'get_device_properties', lambda name: gpu)
    card = load('gpu_device').Device('cuda')
    assert [card.sets(n) for n in (1, 20, 90, 179, 1000)] == [16, 9, 2, 2, 1]


class PretendedGpu:
    """torch.cuda as far as it is used; its clock runs 3 ms in a call."""

    def __init__(self):
        self.now, self.log = 0.0, []

    def install(self, monkeypatch):
        gpu = self
        properties = SimpleNamespace(
            name='A chip',
            major=9,
            minor=0,
            multi_processor_count=2,
            total_memory=3,
            L2_cache_size=4,
        )

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                gpu.log.append('record')
                self.at = gpu.now

            def synchronize(self):
                gpu.log.append('wait')

            def elapsed_time(self, end):
                return end.at - self.at

        replaced = dict(
            Event=Event,
            _sleep=lambda cycles: gpu.log.append(('pause', cycles)),
            synchronize=lambda name: None,
            reset_peak_memory_stats=lambda name: None,
            memory_allocated=lambda name: 100,
            max_memory_allocated=lambda name: 175,
            mem_get_info=lambda name: (5, 9),
            empty_cache=lambda: None,
            get_device_properties=lambda name: properties,
        )
        for name, value in replaced.items():
            monkeypatch.setattr(torch.cuda, name, value)

    def call(self):
        self.now += 3.0
        self.log.append('call')


@pytest.mark.parametrize('hide_host', [True, False])
def test_measuring_a_gpu(load, monkeypatch, hide_host):
    gpu = PretendedGpu()
    gpu.install(monkeypatch)
    card = load('gpu_device').Device('cuda')
    effort = timing.Effort(rounds=1, turn=0.0)
    found = card.measure({'call': gpu.call}, effort, hide_host)['call']
    assert found['peak'] == 75
    assert found['samples'] == pytest.approx([0.003]) and found['median'] == 0.003
    calls = found['calls'] * ['call']
    log = gpu.log[-len(calls) - 4 :]
    if hide_host:
        (what, cycles), *rest = log
        # Twice as long as it takes to submit all calls.
        assert what == 'pause' and cycles > 0
        assert rest == ['record', *calls, 'record', 'wait']
    else:
        assert log[1:] == ['record', *calls, 'record', 'wait']
        assert not any('pause' in entry for entry in gpu.log)


def test_facts_of_a_gpu(load, monkeypatch):
    PretendedGpu().install(monkeypatch)
    card = load('gpu_device').Device('cuda')
    facts = card.facts()
    assert facts['device'] == 'A chip' and facts['capability'] == '9.0'
    assert json.loads(json.dumps(facts))['cache'] == 4
    assert card.free_memory() == 5


# The floor


def test_floors_are_those_of_the_tables(load):
    """Milliseconds on an H200 by counts of bytes and exponentials."""
    floor, blocks, op = load('gpu_floor'), load('gpu_blocks'), load('gpu_op')
    rates = dict(copy=4.3e12, exp2=4.18e12, fma=33.4e12)

    def scan(name):
        shape = vars(op.FULL[name])
        work = floor.scan_work(**shape, size=2)
        return [1e6 * work[which].seconds(rates) for which in ('forward', 'backward')]

    assert scan('VMamba-T stage 1, 224, b128') == pytest.approx([217, 362], rel=0.01)
    assert scan('VMamba-T stage 3, 224, b128') == pytest.approx([54, 90], rel=0.01)
    assert scan('Vim-S, 224, b128') == pytest.approx([83, 137], rel=0.04)
    assert scan('Vim-S, 1248, b1') == pytest.approx([20, 33], rel=0.04)
    assert scan('VMamba-T v0 stage 1, 224, b128') == pytest.approx(
        [1327, 2175], rel=0.04
    )
    for name, forward in (
        ('VMamba-T, 224, b128', 0.58),
        ('VMamba-T, 512x512, b4', 0.095),
        ('VMamba-T, 1280x800, b2', 0.185),
    ):
        total = sum(
            shape.depth
            * floor.ss2d_work(
                shape.batch, shape.channels, shape.height * shape.width, 1, 2
            )['forward'].seconds(rates)
            for shape in blocks.SS2D[name]
        )
        assert 1e3 * total == pytest.approx(forward, rel=0.03)
    work = floor.two_way_work(1, 768, 6085, 16, 2)
    assert 1e6 * work['forward'].seconds(rates) == pytest.approx(46.9, rel=0.01)


def test_rates_that_are_not_known_cost_nothing(load):
    work = load('gpu_floor').Work(bytes=10, exponentials=1000, multiply_adds=30)
    assert work.seconds(dict(copy=5, exp2=100, fma=1)) == 30
    assert work.seconds(dict(copy=5, exp2=None, fma=None)) == 2


def test_rates_on_this_machine(load, device):
    rates = load('gpu_floor').measure_rates(device, quick=True)
    assert set(rates) == {'copy', 'exp2', 'fma'} and min(rates.values()) > 1e3


@pytest.mark.parametrize(
    'name,instruction', [('exp2', 'ex2.approx'), ('fma', 'fma.rn.f32')]
)
def test_floor_kernels_do_what_they_count(load, tmp_path, name, instruction):
    """Compiled for a GPU: one instruction for each operation."""
    library = nvrtc.find_library()
    if library is None:
        pytest.skip('there is no NVRTC')
    source = load('gpu_floor').kernel_source(name, 4096)
    # torch says itself that functions are for the device.
    source = source.replace('\nT floor', '\n__device__ T floor')
    file = tmp_path / 'floor.cu'
    file.write_text(
        f'{source}extern "C" __global__ void kernel(float* x)'
        f' {{ *x = floor_{name}(*x); }}'
    )
    ptx = nvrtc.Nvrtc(library).compile(file, {}, 'compute_90').decode()
    # The loop is unrolled 16 times, and counts by 16.
    assert ptx.count(instruction) == 16 and ', 16;' in ptx and ', 4096;' in ptx
