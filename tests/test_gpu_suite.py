"""benchmarks/gpu_suite.sh: its logic, on the CPU; no time means anything here."""

import contextlib
import importlib
import json
import os
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from mmvssm import ops
from mmvssm.backbones import VSSM
from mmvssm.heads import ClassificationHead, ImageClassifier
from mmvssm.ops import mamba_ssm
from tiny import REPO

BENCHMARKS = REPO / 'benchmarks'
if not BENCHMARKS.exists():
    pytest.skip('there are none in a source distribution', allow_module_level=True)


@pytest.fixture
def load(monkeypatch):
    """Import a module from beside the benchmarks."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


@pytest.fixture
def device(load):
    return load('gpu_device').Device('cpu')


def in_double(inputs):
    return [x.detach().double().requires_grad_() for x in inputs]


def results(function, inputs):
    """The output and the gradients of a random projection of it."""
    out = function(*inputs)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    return out, *torch.autograd.grad((out * weight).sum(), inputs)


# Rows of a part


class Clock:
    """Seconds that pass only when a row is measured."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    def row(self, name, seconds=1.0, error=None):
        def measure():
            self.now += seconds
            if error:
                raise error
            return dict(value=name)

        return name, measure


def read(file):
    found = json.loads(file.read_text())
    return found, {row['name']: row for row in found['rows']}


def test_part_stops_when_its_time_is_out_and_goes_on_later(load, tmp_path):
    part, clock = load('gpu_part'), Clock()
    file = tmp_path / 'new' / 'op.json'
    rows = [clock.row(name) for name in 'abcd']
    assert part.run(rows, file, dict(first=1), 1.5, clock=clock)
    found, by_name = read(file)
    assert list(by_name) == ['a', 'b'] and found['left_out'] == ['c', 'd']
    assert by_name['a'] == dict(name='a', run=0, took=1.0, value='a')
    assert part.run(rows, file, dict(second=2), 10, clock=clock)
    found, by_name = read(file)
    assert list(by_name) == list('abcd') and found['left_out'] == []
    assert found['runs'] == [dict(first=1), dict(second=2)]
    assert [row['run'] for row in found['rows']] == [0, 0, 1, 1]
    assert clock.now == 4.0
    assert not list(file.parent.glob('*.[0-9]*'))


def test_row_that_fails_does_not_end_the_part(load, tmp_path):
    part, clock = load('gpu_part'), Clock()
    file = tmp_path / 'op.json'
    rows = [clock.row('a', error=ValueError('no\nmore')), clock.row('b')]
    assert part.run(rows, file, {}, 10, clock=clock)
    _, by_name = read(file)
    assert by_name['a']['failed'] == 'ValueError: no'
    assert by_name['b']['value'] == 'b'


def test_part_ends_with_its_device(load, tmp_path):
    part, clock = load('gpu_part'), Clock()
    file = tmp_path / 'op.json'

    def alive():
        if clock.now == 1.0:
            raise RuntimeError('illegal access')

    rows = [clock.row('a'), clock.row('b')]
    assert not part.run(rows, file, {}, 10, alive, clock)
    assert part.run(rows, file, {}, 10, alive, clock)
    assert list(read(file)[1]) == ['a', 'b']


@pytest.mark.parametrize('text', ['{"rows": [', '[]', '{"rows": 3}', ''])
def test_broken_file_is_started_anew(load, tmp_path, text):
    part, clock = load('gpu_part'), Clock()
    file = tmp_path / 'op.json'
    file.write_text(text)
    part.run([clock.row('a')], file, {}, 10, clock=clock)
    assert list(read(file)[1]) == ['a']


# Measuring


def test_measure_keeps_every_repetition(load, device):
    timing = load('timing')
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
        {'short': lambda: calls.append(1)}, load('timing').Effort(rounds=1, turn=0.0)
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
    effort = load('timing').Effort(rounds=1, turn=0.0)
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


def test_floor_kernels_do_what_they_count(load):
    """Compiled for a GPU: one instruction for each operation."""
    triton = pytest.importorskip('triton')
    if os.environ.get('TRITON_INTERPRET') == '1':
        pytest.skip('the interpreter leaves nothing to compile')
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernels = load('gpu_floor_kernels')
    constants = {(2,): kernels.BLOCK, (3,): kernels.UNROLLED}
    signature = dict(x='*fp32', turns='i32', BLOCK='constexpr', UNROLLED='constexpr')
    per_thread = kernels.BLOCK * kernels.UNROLLED // 128
    for kernel, instruction in (
        (kernels.exp2_kernel, 'ex2.approx'),
        (kernels.fma_kernel, 'fma.rn.f32'),
    ):
        source = ASTSource(kernel, signature, constants)
        compiled = triton.compile(
            source, target=GPUTarget('cuda', 90, 32), options=dict(num_warps=4)
        )
        assert compiled.asm['ptx'].count(instruction) == per_thread


# The peers


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
    mamba_ssm.scan_function.cache_clear()
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
    assert len({case.name for case in cases}) == len(cases) == 6 * 3 * 2 * 2
    assert {case.model for case in cases} <= set(load('mmvssm').list_models())


# The report


def times(median, peak=None):
    return dict(median=median, samples=[median], calls=1, peak=peak)


def parts():
    """A made-up result of every part."""
    op = dict(
        name='shape, bf16',
        floor=dict(forward=1e-3, both=4e-3),
        contenders={
            'triton': dict(
                forward=times(2e-3, 2**20),
                both=times(8e-3, 2**22),
                error=dict(output=1e-3, gradients=2e-3),
            ),
            'cuda': dict(failed_early=None, error=dict(output=0, gradients=0)),
            'mamba_ssm': dict(forward=times(5e-3), both=times(40e-3), error={}),
        },
        left_out={'oflex': 'not installed'},
    )
    compiled = dict(
        name='shape, bf16, compiled torch',
        floor=op['floor'],
        contenders=dict(torch=dict(forward=times(22e-3), both=dict(failed='OOM'))),
        left_out={},
    )

    def stage(number, depth):
        return dict(
            name=f'net: stage {number}',
            shape=dict(depth=depth),
            floor=dict(forward=1e-3, both=2e-3),
            contenders={
                'triton fused': dict(forward=times(2e-3, 2**20), both=times(6e-3)),
                'triton unfused': dict(forward=times(6e-3), both=times(12e-3)),
                'published (oflex)': dict(forward=times(10e-3), both=times(30e-3)),
            },
            left_out={},
        )

    model = dict(
        name='net, 8x8, b4, bf16, eager',
        case=dict(batch=4),
        contenders={
            'triton': dict(inference=times(2e-2), training=times(8e-2)),
            'mamba_ssm': dict(inference=times(4e-2), training=times(8e-2)),
            'deit_t, fused': dict(inference=times(1e-2), training=times(4e-2)),
            'deit_t, unfused': dict(inference=times(3e-2), training=times(9e-2)),
        },
        left_out={},
    )
    hardware = dict(device='Chip', torch='9.9', triton='8.8')
    return dict(
        tests={'passed': 12, 'failed': 1, 'failures': ['t.py::a'], 'why': None},
        op=dict(runs=[dict(hardware=hardware)], rows=[op, compiled], left_out=['x']),
        blocks=dict(rows=[stage(1, 2), stage(2, 3)], left_out=[]),
        models=dict(rows=[model, dict(name='gone', failed='OOM')], left_out=[]),
    )


def test_table(load):
    report = load('gpu_report')
    lines = report.table(parts()).splitlines()
    assert lines[0] == 'Chip, torch 9.9, Triton 8.8'
    assert lines[1] == 'tests: 12 passed, 1 failed' and lines[2] == '  t.py::a'
    text = '\n'.join(' '.join(line.split()) for line in lines)
    assert 'shape, bf16 f triton 2.000 2.00x 2.50x - 11.00x 1 1.0e-03' in text
    assert 'shape, bf16 f+b triton 8.000 2.00x 5.00x - - 4 2.0e-03' in text
    # Twice 2 ms and three times 2 ms.
    assert 'net (2 stages) f triton fused 10.000 2.00x 3.00x 5.00x 1 -' in text
    assert 'b4, bf16, eager inference triton 200.0 2.00x 0.50x 1.50x' in text
    assert 'op: oflex left out: not installed (1 of 2 rows)' in text
    assert 'op: torch, both: OOM (1 of 2 rows)' in text
    assert 'models: OOM (1 of 2 rows)' in text
    assert 'op: out of time before 1 rows, from "x" on; --part op goes on' in text


def test_ours_is_the_fastest_that_is_whole(load):
    ours_of = load('gpu_report').ours_of
    medians = {'triton': 2.0, 'cuda': 1.0, 'torch unfused': 0.1, 'mamba_ssm': 0.5}
    assert ours_of(list(medians), medians) == 'cuda'
    assert ours_of(['mamba_ssm'], medians) is None
    assert ours_of(['triton'], dict(triton=None)) is None


# The suite


def test_budgets_share_the_time(load):
    suite = load('gpu_suite')
    found = suite.budgets(list(suite.SHARES), 500)
    assert sum(found.values()) == pytest.approx(500)
    assert suite.budgets(['models'], 500) == dict(models=500)


def test_process_that_goes_on_for_too_long_is_stopped(load, tmp_path):
    execute = load('gpu_suite').execute
    file = tmp_path / 'child'
    script = (
        'import pathlib, subprocess, time\n'
        'child = subprocess.Popen(["sleep", "60"])\n'
        f'pathlib.Path({str(file)!r}).write_text(str(child.pid)); time.sleep(60)'
    )
    assert execute(['-c', script], 5) is None
    child = int(file.read_text())
    for _ in range(100):
        # Killed, if perhaps not yet buried.
        state = None
        with contextlib.suppress(FileNotFoundError):
            text = Path(f'/proc/{child}/stat').read_text()
            state = text.rpartition(')')[2].split()[0]
        if state in (None, 'Z'):
            break
        time.sleep(0.05)
    assert state in (None, 'Z')
    assert execute(['-c', 'raise SystemExit(3)'], 60) == 3


def test_lost_device_means_a_new_process(load, monkeypatch, tmp_path):
    suite, statuses, commands = load('gpu_suite'), [3, 3, 0], []

    def execute(command, seconds, *rest):
        commands.append(command)
        return statuses.pop(0)

    monkeypatch.setattr(suite, 'execute', execute)
    args = SimpleNamespace(out=tmp_path, device='cpu', quick=False)
    assert suite.run_part('op', args, 60) == 0
    assert len(commands) == 3 and commands[0][1] == 'op'


def test_no_pytest_is_said(load, monkeypatch, tmp_path):
    suite = load('gpu_suite')
    monkeypatch.setattr(suite, 'find_spec', lambda name: None)
    assert suite.run_tests(SimpleNamespace(out=tmp_path), 60) == 1
    found = suite.collect(tmp_path)
    line = load('gpu_report').table(found)
    assert line == 'tests: pytest is not installed; bring its wheel (--wheels)'


def test_tests_compile_on_several_cores(load, monkeypatch, tmp_path):
    suite, commands = load('gpu_suite'), []

    def execute(command, seconds, environment, file):
        commands.append(command)
        assert environment['MMVSSM_GPU_TESTS_SECONDS'] == '60'
        file.write('FAILED tests/gpu/a.py::b[1] - no\n')
        file.write('1 failed, 12 passed, 3 skipped in 3.21s\n')
        return 1

    monkeypatch.setattr(suite, 'execute', execute)
    monkeypatch.setattr(suite.os, 'cpu_count', lambda: 16)
    for device in ('cuda', 'cpu'):
        args = SimpleNamespace(out=tmp_path, device=device, quick=False)
        assert suite.run_tests(args, 60) == 1
    on_cuda, on_cpu = (' '.join(command) for command in commands)
    assert '-n 6' in on_cuda and '-n' not in on_cpu.replace('no:', '')
    found = suite.collect(tmp_path)['tests']
    assert (found['passed'], found['failed'], found['skipped']) == (12, 1, 3)
    assert found['failures'] == ['tests/gpu/a.py::b[1]'] and found['why'] is None


def run_suite(*arguments, **environment):
    return subprocess.run(
        ['bash', BENCHMARKS / 'gpu_suite.sh', *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, 'PYTHON': sys.executable, **environment},
    )


def test_quick_run(load, tmp_path):
    """Some tests and a part."""
    out = tmp_path / 'results'
    parts = ['--part', 'tests', 'op']
    arguments = ['--device', 'cpu', '--quick', '--out', out, *parts]
    done = run_suite(*arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((out / 'gpu_suite.json').read_text())
    assert found['tests']['passed'] > 3 and found['tests'].get('failed') is None
    device, op = load('gpu_device').Device('cpu'), load('gpu_op')
    names = [name for name, _ in op.rows(device, None, quick=True)]
    assert [row['name'] for row in found['op']['rows']] == names
    row = found['op']['rows'][0]
    assert row['contenders']['torch']['error']['gradients'] < 0.02
    assert len(row['contenders']['torch']['both']['samples']) == 2
    assert row['floor']['both'] > row['floor']['forward'] > 0
    (facts,) = found['op']['runs']
    assert facts['quick'] and facts['hardware']['torch'] == torch.__version__
    assert 'Machine' in facts['environment']
    assert done.stdout.splitlines()[-1] == f'written to {out / "gpu_suite.json"}'
    assert 'selective_scan, ms' in done.stdout


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


# The command


def wheel(folder, name, text):
    folder.mkdir(exist_ok=True)
    with zipfile.ZipFile(folder / f'{name}-1.0-py3-none-any.whl', 'w') as file:
        file.writestr(f'{name}.py', text)
        info = f'{name}-1.0.dist-info'
        file.writestr(
            f'{info}/METADATA', f'Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n'
        )
        file.writestr(
            f'{info}/WHEEL',
            'Wheel-Version: 1.0\nGenerator: test\n'
            'Root-Is-Purelib: true\nTag: py3-none-any\n',
        )
        file.writestr(f'{info}/RECORD', '')


def test_wheels_are_brought_along(tmp_path):
    """They serve the one run, and do not hide what is installed."""
    file = tmp_path / 'said'
    wheel(tmp_path / 'wheels', 'brought_along', f"open({str(file)!r}, 'w').write('x')")
    # Runs whatever the environment says at the start of each Python.
    (tmp_path / 'sitecustomize.py').write_text(
        'import contextlib\nwith contextlib.suppress(ImportError):\n'
        '    import brought_along\n'
    )
    done = run_suite(
        '--wheels', tmp_path / 'wheels', '--help', PYTHONPATH=str(tmp_path)
    )
    assert done.returncode == 0, done.stderr
    assert 'gpu_suite.sh' in done.stdout and file.read_text() == 'x'
    done = run_suite('--wheels', tmp_path / 'nowhere', '--help')
    assert done.returncode == 2 and 'error: no wheels in' in done.stderr


def test_without_a_gpu_it_says_so():
    if torch.cuda.is_available():
        pytest.skip('there is a GPU')
    done = run_suite('--part', 'op')
    assert done.returncode == 2 and 'torch sees no CUDA device' in done.stderr


def test_python_without_what_is_needed(tmp_path):
    (tmp_path / 'mmengine.py').write_text('raise ImportError("no mmengine here")')
    done = run_suite('--help', PYTHONPATH=str(tmp_path))
    assert done.returncode == 2
    assert '--wheels DIR' in done.stderr and 'no mmengine here' in done.stderr
