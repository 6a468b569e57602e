"""Parts of classifiers where MMPretrain is not installed."""

import pytest
from mmengine.registry import MODELS

from mmvssm import classification
from mmvssm.compat import why_no_classification
from mmvssm.engine import UsageError, load_config
from mmvssm.errors import MissingPackageError
from tiny import REPO

pytestmark = pytest.mark.skipif(
    why_no_classification() is None, reason='MMPretrain is installed'
)


PARTS = [
    (registry, name) for registry, _, names in classification.PARTS for name in names
]


@pytest.mark.parametrize('registry, name', PARTS, ids=[name for _, name in PARTS])
def test_a_part_says_what_to_install(registry, name):
    with pytest.raises(MissingPackageError) as error:
        registry.build(dict(type=f'mmvssm.{name}'))
    text = str(error.value)
    assert text.startswith(f'mmvssm.{name} is a part of a classifier of MMPretrain')
    assert 'make install-vision' in text and '\n' not in text
    with pytest.raises(MissingPackageError):
        getattr(classification, name)


def test_other_parts_are_built():
    assert MODELS.build(
        dict(type='mmvssm.VSSM', arch=dict(depths=(1,), dims=8), out_indices=(0,))
    )


def test_a_config_says_what_to_install():
    path = str(REPO / 'configs/classification/vmamba_quickstart.py')
    with pytest.raises(UsageError, match='is a classifier of MMPretrain') as error:
        load_config(path)
    assert 'make install-vision' in str(error.value) and '\n' not in str(error.value)
