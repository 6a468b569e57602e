import pytest
import torch.distributed as dist
from mmengine.config import Config

from mmvssm.engine import UsageError, prepare_launch
from mmvssm.engine.launching import launch


@pytest.fixture
def cfg(monkeypatch):
    monkeypatch.setattr(launch, 'get_device', lambda: 'cpu')
    head = dict(norm_cfg=dict(type='SyncBN'), convs=[dict(type='SyncBN')])
    model = dict(decode_head=head)
    return Config(dict(model=model, sync_bn='torch', strategy=dict(sync_bn='torch')))


def test_none_changes_nothing(cfg):
    prepare_launch(cfg, 'none')
    assert set(cfg) == {'model', 'sync_bn', 'strategy', 'launcher'}
    assert cfg.sync_bn == cfg.strategy.sync_bn == 'torch'
    assert cfg.model.decode_head.norm_cfg.type == 'SyncBN'


@pytest.mark.parametrize(
    'launcher, starter', [('pytorch', 'torchrun'), ('slurm', 'srun'), ('mpi', 'mpirun')]
)
def test_not_started_by_the_launcher(launcher, starter, cfg, monkeypatch):
    for name in ('RANK', 'SLURM_PROCID', 'OMPI_COMM_WORLD_RANK'):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UsageError, match=starter):
        prepare_launch(cfg, launcher)


def test_with_accelerators_slurm_says_where_and_mmengine_joins(cfg, monkeypatch):
    monkeypatch.setattr('mmvssm.engine.launching.launch.get_device', lambda: 'cuda')
    monkeypatch.setattr(
        'mmvssm.engine.launching.launch.set_rendezvous', lambda: found.append(1)
    )
    for name in ('SLURM_PROCID', 'SLURM_NTASKS', 'SLURM_LOCALID', 'SLURM_STEP_ID'):
        monkeypatch.setenv(name, '0')
    found = []
    prepare_launch(cfg, 'slurm')
    assert found and not dist.is_initialized()
    assert cfg.launcher == 'slurm' and 'model_wrapper_cfg' not in cfg
    assert cfg.model.decode_head.norm_cfg.type == 'SyncBN'


def test_batch_script_without_srun(cfg, monkeypatch):
    for name in ('SLURM_PROCID', 'SLURM_NTASKS', 'SLURM_LOCALID'):
        monkeypatch.setenv(name, '0')
    monkeypatch.delenv('SLURM_STEP_ID', raising=False)
    with pytest.raises(UsageError, match='SLURM_STEP_ID is not set.*srun'):
        prepare_launch(cfg, 'slurm')


@pytest.mark.parametrize(
    'names',
    [
        ('pytorch', 'RANK', 'WORLD_SIZE', 'LOCAL_RANK'),
        ('slurm', 'SLURM_PROCID', 'SLURM_NTASKS', 'SLURM_LOCALID'),
    ],
)
def test_without_accelerator_gloo(names, cfg, monkeypatch):
    launcher, rank, size, local = names
    # Set for monkeypatch to restore what prepare_launch writes.
    for name in ('RANK', 'WORLD_SIZE', 'LOCAL_RANK'):
        monkeypatch.setenv(name, '0')
    for name, value in (
        (rank, '0'),
        (size, '1'),
        (local, '0'),
        ('SLURM_STEP_ID', '0'),
        ('MASTER_ADDR', '127.0.0.1'),
        ('MASTER_PORT', '0'),
    ):
        monkeypatch.setenv(name, value)
    try:
        with pytest.warns(UserWarning, match='SyncBN needs CUDA'):
            prepare_launch(cfg, launcher)
        assert dist.get_backend() == 'gloo'
    finally:
        dist.destroy_process_group()
    head = cfg.model.decode_head
    assert head.norm_cfg.type == head.convs[0].type == 'BN'
    assert 'sync_bn' not in cfg and 'sync_bn' not in cfg.strategy
    assert cfg.model_wrapper_cfg.device_ids is None
    assert cfg.model_wrapper_cfg.find_unused_parameters is False
