"""docs/messages.md quotes what mmengine, mmseg, mmdet and torch say."""

import io
import re
from contextlib import redirect_stdout

import mmengine.runner.runner
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
from mmengine.runner import Runner
from mmengine.runner.checkpoint import load_state_dict
from torch import nn

from mmvssm.compat import why_no_detection
from mmvssm.engine.launching.quiet import _NOISE
from tiny import REPO, write_ade, write_config

pytest.importorskip('mmseg')
PAGE = (REPO / 'docs' / 'messages.md').read_text()
# Behind the message: cause, cure.
QUOTED = re.findall(r'^\| `([^`]+)` \| .+ \| .+ \|$', PAGE, re.M)


@pytest.fixture(scope='module')
def path(tmp_path_factory):
    folder = tmp_path_factory.mktemp('messages')
    write_ade(folder / 'ade')
    return write_config(folder / 'tiny.py', folder / 'ade')


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    # It asks compilers for their versions.
    monkeypatch.setattr(mmengine.runner.runner, 'collect_env', dict)
    monkeypatch.setattr(Config, 'pretty_text', 'the config')
    monkeypatch.setattr(Config, 'dump', lambda *_: '')


def build(options=None, scope='mmseg'):
    """Build a model as the tools of mmseg do."""

    def run(path, _):
        cfg = Config.fromfile(path)
        cfg.merge_from_dict(options or {})
        with DefaultScope.overwrite_default_scope(scope):
            MODELS.build(cfg.model)

    return run


def train(options):
    """Train as the tools of mmseg do."""

    def run(path, folder):
        cfg = Config.fromfile(path)
        cfg.merge_from_dict(options)
        cfg.work_dir, cfg.experiment_name = str(folder), f'messages_{id(cfg)}'
        Runner.from_cfg(cfg).train()

    return run


def one_image(path, folder):
    cfg = Config.fromfile(path)
    cfg.model.decode_head.norm_cfg = dict(type='BN')
    cfg.model.auxiliary_head = None
    with DefaultScope.overwrite_default_scope('mmseg'):
        model = MODELS.build(cfg.model)
    model.train().decode_head(model.backbone(torch.randn(1, 3, 64, 64)))


def label_of_no_class(path, folder):
    nn.functional.cross_entropy(torch.zeros(1, 2, 3), torch.full((1, 3), 7))


def unused_parameter(path, folder):
    torch.distributed.init_process_group(
        'gloo', init_method=f'file://{folder}/store', rank=0, world_size=1
    )
    try:
        model = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
        model.forward = lambda x: model[0](x)
        wrapped = nn.parallel.DistributedDataParallel(model)
        for _ in range(2):
            wrapped(torch.ones(1, 2)).sum().backward()
    finally:
        torch.distributed.destroy_process_group()


PROVOKE = {
    "KeyError: 'VSSM is not": build({'model.backbone.type': 'VSSM'}),
    "KeyError: 'mmvsm.VSSM is": build({'model.backbone.type': 'mmvsm.VSSM'}),
    "KeyError: 'EncoderDecoder": build(scope='mmdet'),
    "KeyError: 'MaskRCNN": build({'model.type': 'MaskRCNN'}),
    "KeyError: 'SegLocalVisualizer": train({'default_scope': 'mmnothing'}),
    "KeyError: 'Cannot find None": build({'model.decode_head.norm_cfg.type': 'Bn'}),
    'TypeError: VSSM.__init__': build({'model.backbone.depth': 3}),
    'TypeError: None is not': train({'optim_wrapper.optimizer.type': 'AdmW'}),
    'TypeError: DataLoader': train({'train_dataloader.batchsize': 3}),
    'ValueError: Expected more': one_image,
    'IndexError: Target': label_of_no_class,
    'RuntimeError: Expected to have': unused_parameter,
}


@pytest.mark.parametrize('quoted', QUOTED)
def test_the_message_is_quoted_as_it_is(quoted, path, tmp_path):
    starts = [start for start in PROVOKE if quoted.startswith(start)]
    assert len(starts) == 1, 'nothing provokes this message'
    if 'mmdet' in quoted and why_no_detection():
        pytest.skip('no mmdet')
    with pytest.raises(Exception) as error, redirect_stdout(io.StringIO()):
        PROVOKE[starts[0]](path, tmp_path)
    said = f'{error.typename}: {error.value}'
    pattern = '.*'.join(map(re.escape, quoted.split('...')))
    assert re.fullmatch(pattern, said, re.S), said


def test_every_message_is_on_the_page():
    assert len(QUOTED) == len(PROVOKE)


def test_what_does_not_stop_is_quoted_as_it_is(caplog):
    with redirect_stdout(io.StringIO()) as printed:
        load_state_dict(nn.Linear(2, 2), {'other': torch.ones(1)})
    text = printed.getvalue() + caplog.text
    first = re.search(r'The model and loaded .*', PAGE)
    assert first and first[0].partition('`')[0] in text
    for start in (
        'Could not import OneDL',
        'The prefix is not set',
        '"FileClient" will',
    ):
        assert f'`{start}' in PAGE
        assert any(re.match(pattern, start) for pattern in _NOISE) or any(
            pattern.startswith(start) for pattern in _NOISE
        )
