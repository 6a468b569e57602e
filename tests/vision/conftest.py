"""tests/vision needs torchvision, timm, MMPretrain and segmentation-models-pytorch.

`make test-vision` runs it in an environment that has them. Elsewhere each of its files
is one skip, and is not imported. MMVSSM_REQUIRE_VISION=1, which `make test-vision`
sets, turns every skip in this folder into a failure.
"""

import os
from importlib.util import find_spec

import pytest

NEEDED = ('torchvision', 'timm', 'mmpretrain', 'segmentation_models_pytorch')
REQUIRED = os.environ.get('MMVSSM_REQUIRE_VISION', '0') not in ('', '0')
MISSING = [name for name in NEEDED if find_spec(name) is None]


class MissingPackages(pytest.Module):
    """A file whose imports would fail."""

    def collect(self):
        reason = f'{", ".join(MISSING)} not installed: make install-vision'
        if REQUIRED:
            pytest.fail(f'MMVSSM_REQUIRE_VISION is set, but {reason}')
        pytest.skip(reason, allow_module_level=True)


def pytest_pycollect_makemodule(module_path, parent):
    return MissingPackages.from_parent(parent, path=module_path) if MISSING else None


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector):
    return _refuse_skip((yield))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    return _refuse_skip((yield))


def _refuse_skip(report):
    # What is expected to fail is reported as skipped, too.
    if REQUIRED and report.skipped and not hasattr(report, 'wasxfail'):
        *_, reason = report.longrepr
        report.outcome = 'failed'
        report.longrepr = (
            f'MMVSSM_REQUIRE_VISION is set, but this was skipped: {reason}'
        )
    return report
