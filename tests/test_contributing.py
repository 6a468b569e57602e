"""The scan order and the config of CONTRIBUTING.md work as it says."""

import re
import shutil

import pytest
import torch
from mmengine.config import Config

from compare import relative_error
from contributing import example_code, run_example
from mmvssm import ops
from mmvssm.ops.scan_orders import registry
from tiny import REPO, shrink, write_ade, write_config


@pytest.fixture
def outwards(monkeypatch):
    """What the example defines; its order is forgotten afterwards."""
    monkeypatch.setattr(registry, '_functions', dict(registry._functions))
    yield run_example('Adding a scan order')
    # Tables are kept by name.
    registry.table_of.cache_clear()
    registry._kept_routes.cache_clear()


def test_example_of_a_scan_order(outwards):
    assert 'outwards' in ops.list_scan_orders()
    row = [4, 1, 3, 5, 7, 0, 2, 6, 8]
    assert outwards['table'].tolist() == [row, row[::-1]]
    assert outwards['y'].shape == (1, 8, 5, 7) and outwards['y'].isfinite().all()
    layer, x = outwards['layer'], torch.randn(2, 8, 5, 7)
    assert layer.A_logs.shape[0] == 2 * 8, 'each scan has parameters of its own'
    got = layer(x)
    with ops.use_backend('reference'):
        assert relative_error(got, layer(x)) < 1e-5


@pytest.fixture
def config(tmp_path):
    """The example under its name, among the configs that it inherits from."""
    (path,) = re.findall(
        r'It is\n`(configs/\w+\.py)`', (REPO / 'CONTRIBUTING.md').read_text()
    )
    folder = tmp_path / 'configs'
    shutil.copytree(REPO / 'configs', folder)
    path = tmp_path / path
    assert not path.exists(), 'the example takes the name of another config'
    path.write_text(example_code('Adding a config'))
    return path


def test_example_of_a_config(config, tmp_path):
    pytest.importorskip('mmseg')
    from mmengine.runner import Runner

    cfg = Config.fromfile(config)
    base = Config.fromfile(REPO / 'configs' / 'upernet_vmamba_t.py')
    backbone = dict(base.model.backbone, orders='hilbert', drop_path_rate=0.1)
    assert cfg.model.backbone == backbone
    assert cfg.model.decode_head.num_classes == 20
    assert cfg.model.auxiliary_head.num_classes == 20
    assert cfg.optim_wrapper == base.optim_wrapper

    model = shrink(cfg).model
    cfg = Config.fromfile(
        write_config(tmp_path / 'tiny.py', write_ade(tmp_path / 'ade'))
    )
    model.data_preprocessor.size = (64, 64)
    for head in (model.decode_head, model.auxiliary_head):
        head.norm_cfg = dict(type='BN')
    cfg.model, cfg.work_dir = model, str(tmp_path / 'work')
    runner = Runner.from_cfg(cfg)
    scan = runner.model.backbone.layers[0].blocks[0].op
    assert scan.orders == 'hilbert'
    before = scan.A_logs.detach().clone()
    runner.train()
    assert runner.iter == 2
    after = scan.A_logs.detach()
    assert after.isfinite().all() and not torch.equal(after, before)
