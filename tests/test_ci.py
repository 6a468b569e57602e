"""What .ci/run says and returns, with stand-ins for make and the environments."""

import os
import shutil
import subprocess

import pytest

from tiny import REPO

MAKE = """#!/bin/sh
case $1 in
test) echo "$MAIN_SAYS"; exit $MAIN;;
test-vision) echo "$VISION_SAYS"; exit $VISION;;
*) [ "$1" != "$FAILS" ] || exit 7;;
esac
"""
GOOD = '==== 5000 passed, 12 skipped, 3 warnings in 1000.10s (0:16:40) ===='
SMALL = '==== 100 passed, 1 warning in 200.22s (0:03:20) ===='
BAD = '==== 2 failed, 98 passed, 1 error in 200.22s ===='
NONE = 'make: *** Error'


@pytest.fixture
def checkout(tmp_path):
    scripts = {'.ci/install_slurm': 'exit 1', 'bin/make': MAKE}
    scripts |= {f'{name}/bin/python': '' for name in ('.venv', '.venv-vision')}
    for name, text in scripts.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text if text.startswith('#!') else f'#!/bin/sh\n{text}\n')
        path.chmod(0o755)
    shutil.copy(REPO / '.ci/run', tmp_path / '.ci/run')
    return tmp_path


def run(checkout, main, vision, main_status, vision_status, fails=''):
    """Exit status and lines."""
    # These tests may run within a .ci/run that has set its own.
    outer = {k: v for k, v in os.environ.items() if not k.startswith('MMVSSM_')}
    done = subprocess.run(
        [checkout / '.ci/run'],
        env=dict(
            outer,
            PATH=f'{checkout}/bin:{os.environ["PATH"]}',
            MAIN_SAYS=main,
            VISION_SAYS=vision,
            MAIN=str(main_status),
            VISION=str(vision_status),
            FAILS=fails,
        ),
        capture_output=True,
        text=True,
    )
    assert not done.stderr
    return done.returncode, done.stdout.splitlines()


@pytest.mark.parametrize(
    ('main', 'vision', 'statuses', 'code', 'last'),
    [
        (GOOD, SMALL, (0, 0), 0, '5100 passed, 12 skipped, 4 warnings in 1200.32s'),
        (
            *(GOOD, BAD, (0, 1), 1),
            '2 failed, 5098 passed, 12 skipped, 3 warnings, 1 error in 1200.32s',
        ),
        (BAD, SMALL, (1, 0), 1, '2 failed, 198 passed, 1 warning, 1 error in 400.44s'),
        # Failed after its tests: a lint, a crash at the end.
        (
            *(GOOD, SMALL, (2, 0), 2),
            '5100 passed, 12 skipped, 4 warnings, 1 error in 1200.32s',
        ),
        (NONE, SMALL, (2, 0), 2, '100 passed, 1 warning, 1 error in 200.22s'),
        (
            *(GOOD, NONE, (0, 3), 3),
            '5000 passed, 12 skipped, 3 warnings, 1 error in 1000.10s',
        ),
        (NONE, NONE, (2, 3), 2, '2 errors in 0.00s'),
        # Make is content, and no test was run.
        (
            GOOD,
            '',
            (0, 0),
            1,
            '5000 passed, 12 skipped, 3 warnings, 1 error in 1000.10s',
        ),
    ],
)
def test_failure_of_either_suite(checkout, main, vision, statuses, code, last):
    found, lines = run(checkout, main, vision, *statuses)
    assert (found, lines[-1]) == (code, last)
    ends = [line for line in lines if ' ended with status ' in line]
    for line, target, says in zip(ends, ('test', 'test-vision'), (main, vision)):
        assert line.startswith(f'make {target} ended with status ')
        said = says if says.startswith('=') else 'pytest printed no summary'
        assert line.endswith(said)
    assert len(ends) == 2


@pytest.mark.parametrize('target', ['install', 'install-vision'])
def test_failed_install_runs_no_test_and_the_other_suite(checkout, target):
    code, lines = run(checkout, GOOD, SMALL, 0, 0, fails=target)
    assert code == 7
    (left,) = {GOOD, SMALL} & set(lines)
    assert left == (GOOD if target == 'install-vision' else SMALL)
    assert ', 1 error in' in lines[-1]
