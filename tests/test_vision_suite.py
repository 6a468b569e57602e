"""tests/vision is skipped where its packages are missing, but not where it is required.

Its conftest.py is tried on files of its own.
"""

import os
import re
import subprocess
import sys

import pytest

from tiny import REPO

FILES = {
    'test_file.py': """
        import json, pytest
        def test_passes(): pass
        def test_skips(): pytest.importorskip('mmvssm_no_such_package')
        @pytest.mark.skip(reason='for a mark')
        def test_marked(): pass
        @pytest.mark.xfail
        def test_expected(): raise RuntimeError
        """,
    'test_whole.py': """
        import pytest
        pytest.importorskip('mmvssm_no_such_package')
        """,
}


def run(folder, needed, required, files=FILES):
    """Exit status and output of the suite."""
    text = (REPO / 'tests/vision/conftest.py').read_text()
    text, number = re.subn(r'(?m)^NEEDED = .*$', f'NEEDED = {needed!r}', text)
    assert number == 1
    (folder / 'conftest.py').write_text(text)
    for name, lines in files.items():
        text = lines.replace('\n        ', '\n')
        (folder / name).write_text(f'import {", ".join(needed)}\n{text}')
    done = subprocess.run(
        [sys.executable, '-m', 'pytest', '-q', '-ra', '-p', 'no:xdist', folder],
        cwd=folder,
        env={**os.environ, 'MMVSSM_REQUIRE_VISION': required},
        capture_output=True,
        text=True,
    )
    assert not done.stderr
    return done.returncode, done.stdout


@pytest.mark.parametrize('required', ['', '0'])
def test_missing_package_is_one_skip_a_file(tmp_path, required):
    code, output = run(tmp_path, ('json', 'mmvssm_missing'), required)
    assert code == pytest.ExitCode.NO_TESTS_COLLECTED
    assert '2 skipped in' in output
    assert 'mmvssm_missing not installed: make install-vision' in output


def test_missing_package_fails_where_the_suite_is_asked_for(tmp_path):
    code, output = run(tmp_path, ('json', 'mmvssm_missing'), '1')
    assert code == pytest.ExitCode.INTERRUPTED
    assert '2 errors in' in output
    assert 'MMVSSM_REQUIRE_VISION is set, but mmvssm_missing not installed' in output


def test_skips(tmp_path):
    code, output = run(tmp_path, ('json',), '')
    assert code == pytest.ExitCode.OK
    assert '1 passed, 3 skipped, 1 xfailed in' in output


def test_skips_fail_where_the_suite_is_asked_for(tmp_path):
    said = 'MMVSSM_REQUIRE_VISION is set, but this was skipped: '
    code, output = run(tmp_path, ('json',), '1')
    assert code == pytest.ExitCode.INTERRUPTED
    assert re.search(f'ERROR test_whole.py - {said}', output)
    (tmp_path / 'test_whole.py').unlink()
    code, output = run(tmp_path, ('json',), '1', dict(list(FILES.items())[:1]))
    assert code == pytest.ExitCode.TESTS_FAILED
    assert '1 failed, 1 passed, 1 xfailed, 1 error in' in output
    assert output.count(said) >= 2
