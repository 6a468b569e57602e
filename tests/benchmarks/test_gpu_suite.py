"""benchmarks/gpu_suite.sh: parts, time, table, command, tried on the CPU."""

import contextlib
import json
import os
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tiny import REPO

BENCHMARKS = REPO / 'benchmarks'
if not BENCHMARKS.exists():
    pytest.skip('there are none in a source distribution', allow_module_level=True)


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


# The report


def times(median, peak=None):
    return dict(median=median, samples=[median], calls=1, peak=peak)


def parts():
    """A made-up result of every part."""
    op = dict(
        name='shape, bf16',
        floor=dict(forward=1e-3, both=4e-3),
        contenders={
            'cuda': dict(
                forward=times(2e-3, 2**20),
                both=times(8e-3, 2**22),
                error=dict(output=1e-3, gradients=2e-3),
            ),
            'torch': dict(failed_early=None, error=dict(output=0, gradients=0)),
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
                'cuda fused': dict(forward=times(2e-3, 2**20), both=times(6e-3)),
                'cuda unfused': dict(forward=times(6e-3), both=times(12e-3)),
                'published (oflex)': dict(forward=times(10e-3), both=times(30e-3)),
            },
            left_out={},
        )

    model = dict(
        name='net, 8x8, b4, bf16, eager',
        case=dict(model='net', rival='deit_t', batch=4, height=8),
        contenders={
            'cuda': dict(inference=times(2e-2), training=times(8e-2, 3 * 2**20)),
            'mamba_ssm': dict(inference=times(4e-2), training=times(8e-2)),
            'deit_t, fused': dict(inference=times(1e-2), training=times(4e-2)),
            'deit_t, unfused': dict(inference=times(3e-2), training=times(9e-2)),
        },
        left_out={},
    )
    gone = dict(name='gone', failed='OOM')
    # Beside another model, on the same images and on others.
    swins = [
        dict(
            name=f'other, {side}x8, b4, bf16, eager',
            case=dict(model='other', rival='swin_t', batch=4, height=side),
            contenders={'swin_t, mmseg': dict(training=times(median, 2**22))},
            left_out={},
        )
        for side, median in ((8, 0.2), (16, 0.9))
    ]
    hardware = dict(
        device='Chip', torch='9.9', tf32_matmul=False, tf32_convolution=True
    )
    return dict(
        check=dict(verdict='linear by torch'),
        tests={'passed': 12, 'failed': 1, 'failures': ['t.py::a'], 'why': None},
        op=dict(runs=[dict(hardware=hardware)], rows=[op, compiled], left_out=['x']),
        blocks=dict(rows=[stage(1, 2), stage(2, 3)], left_out=[]),
        models=dict(rows=[model, *swins, gone], left_out=[]),
    )


def test_table(load):
    report = load('gpu_report')
    lines = report.table(parts()).splitlines()
    modes = 'TF32 in products off, in convolutions on'
    assert lines[0] == f'Chip, torch 9.9; {modes}'
    assert lines[1] == 'check: linear by torch'
    assert lines[2] == 'tests: 12 passed, 1 failed' and lines[3] == '  t.py::a'
    text = '\n'.join(' '.join(line.split()) for line in lines)
    assert 'shape, bf16 f cuda 2.000 2.00x 2.50x - 11.00x 1 1.0e-03' in text
    assert 'shape, bf16 f+b cuda 8.000 2.00x 5.00x - - 4 2.0e-03' in text
    # Twice 2 ms and three times 2 ms.
    assert 'net (2 stages) f cuda fused 10.000 2.00x 3.00x 5.00x 1 -' in text
    assert 'b4, bf16, eager inference cuda 200.0 2.00x 0.50x 1.50x - - -' in text
    ratios = '1.00x 0.50x 1.12x 2.50x 3 0.75x'
    assert f'net, 8x8, b4, bf16, eager training cuda 50.0 {ratios}' in text
    assert 'op: oflex left out: not installed (1 of 2 rows)' in text
    assert 'op: torch, both: OOM (1 of 2 rows)' in text
    assert 'models: OOM (1 of 4 rows)' in text
    assert 'op: out of time before 1 rows, from "x" on; --part op goes on' in text


def test_ours_is_the_fastest_that_is_whole(load):
    ours_of = load('gpu_report').ours_of
    medians = {'torch': 2.0, 'cuda': 1.0, 'torch unfused': 0.1, 'mamba_ssm': 0.5}
    assert ours_of(list(medians), medians) == 'cuda'
    assert ours_of(['mamba_ssm'], medians) is None
    assert ours_of(['cuda'], dict(cuda=None)) is None


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


@pytest.mark.parametrize(
    'text,status,verdict',
    [
        (
            '3 calls\n{\n "ops": {"linear": {"backend": "torch"}}\n}',
            1,
            'linear by torch',
        ),
        ('ImportError: no such module', 1, 'ImportError: no such module'),
        ('5 calls to check', None, 'stopped, it went on for too long'),
    ],
)
def test_check(load, monkeypatch, tmp_path, text, status, verdict):
    suite = load('gpu_suite')

    def execute(command, seconds, environment=None, file=None):
        assert command[1:] == ['mmvssm.check_gpu', '--json', '--device', 'cuda']
        file.write(text)
        return status

    monkeypatch.setattr(suite, 'execute', execute)
    args = SimpleNamespace(out=tmp_path, device='cuda', quick=False)
    assert suite.run_check(args, 60) == 1
    assert suite.collect(tmp_path)['check']['verdict'] == verdict


def test_wheels_to_bring_along(load):
    """With what they need, and nothing that would replace torch."""
    wheels = load('gpu_wheels').wheels()
    names = {wheel.partition('==')[0] for wheel in wheels}
    assert names >= {'onedl-mmengine', 'addict', 'rich', 'pygments', 'pytest', 'timm'}
    assert not names & {'torch', 'numpy', 'torchvision', 'tomli'}
    assert f'pytest=={pytest.__version__}' in wheels


def run_suite(*arguments, **environment):
    return subprocess.run(
        ['bash', BENCHMARKS / 'gpu_suite.sh', *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, 'PYTHON': sys.executable, **environment},
    )


def test_quick_run(load, tmp_path):
    """The check, some tests and a part."""
    out = tmp_path / 'results'
    parts = ['--part', 'check', 'tests', 'op']
    arguments = ['--device', 'cpu', '--quick', '--out', out, *parts]
    done = run_suite(*arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((out / 'gpu_suite.json').read_text())
    assert found['check']['verdict'] == 'selective_scan by cuda'
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
