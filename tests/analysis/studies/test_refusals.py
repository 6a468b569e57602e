"""What a user may do wrong ends in one sentence, and exit code 2."""

import numpy as np
import pytest
import torch
from PIL import Image

import mmvssm
from mmvssm.analysis.studies.subjects import parse_subjects
from studies import analyze, write_segmentor

pytest.importorskip('mmseg')


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp('refusals')
    write_segmentor(path, 'vmamba')
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(path / 'a.png')
    torch.save(dict(state_dict=dict(a=torch.zeros(2))), path / 'other.pth')
    backbone = mmvssm.build_backbone('vim_t')
    torch.save(backbone.state_dict(), path / 'backbone.pth')
    for name in ('x', 'y'):
        (path / 'set' / name).mkdir(parents=True)
        (path / f'set/{name}/a.png').write_bytes((path / 'a.png').read_bytes())
    (path / 'a_file').touch()
    (path / 'work').mkdir()
    return path


@pytest.mark.parametrize(
    'command, said',
    [
        ('erf --models vim_x', 'vim_x is neither a config'),
        ('erf --models none.py', 'no config file at'),
        ('erf --models vmamba.py=none.pth', 'no checkpoint at'),
        ('erf --models vmamba.py=other.pth', 'does not belong to this config'),
        ('erf --models vim_t=other.pth', 'belongs to none of the families'),
        ('erf --models vmamba.py --size 0', '--size takes positive numbers'),
        ('erf --models vmamba.py --size 32 32 32', '--size of erf is HEIGHT WIDTH'),
        ('erf --models vim_t --size 8', 'at least 16x16 pixels'),
        ('erf --models vmamba.py --images none.png', 'none.png cannot be read'),
        ('erf --models vmamba.py --data none', 'no folder'),
        ('erf --models vmamba.py --num-images 0', 'there is no image'),
        ('erf --models vmamba.py --num-images -1', 'must not be negative'),
        ('erf --models vmamba.py --seed -1', 'must not be negative'),
        ('erf --models vmamba.py --device cuda:99', 'cannot use the device'),
        ('erf --models vmamba.py --out-dir a_file/x', 'cannot make the folder'),
        ('norms --models vmamba.py --layers 4', '--layers are numbers from 0 to 3'),
        ('norms --models vmamba.py --every 2', 'needs --work-dir'),
        ('norms --models vmamba.py --work-dir work', 'has no checkpoints iter_N.pth'),
        ('norms --models vmamba.py vim_t --work-dir work', 'takes one model without'),
        ('norms --models vmamba.py --cutoff-ratio 0', 'must be positive'),
        ('norms --models vmamba.py --cutoff 0', 'must be positive'),
        ('norms --models vmamba.py --masks a.png', '--masks needs --images'),
        ('registers --models vmamba.py', 'neither registers nor class tokens'),
        ('cam --models vim_t=backbone.pth', 'has no head for vim_t'),
        ('scaling --models vim_t=backbone.pth --data set', 'has no head for vim_t'),
        ('tokens --models vmamba.py --images a.png', 'needs labels'),
        ('tokens --models vmamba.py --data work', 'no image in'),
        ('tokens --models vmamba.py --num-images 7', 'there are too few images'),
        ('tokens --models vmamba.py --batch-size 0', '--batch-size is at least 1'),
        ('tokens --models vmamba.py --decay -1', '--decay at least 0'),
        ('attention --models vmamba.py --query 0.5 1.5', '--query takes Y X from 0'),
        ('attention --models vmamba.py --query nan 0', '--query takes Y X from 0'),
        ('attention --models vmamba.py --stage 4', '--stage of vmamba is 0 to 3'),
        ('attention --models vmamba.py --block 1', '--block of vmamba is 0 to 0'),
        ('gates --models vmamba.py --layers 4', '--layers of vmamba are 0 to 3'),
        ('cam --models vmamba.py --layer x', 'the backbone of vmamba has no module x'),
        ('cam --models vmamba.py --target 150', '--target is 0 to 149'),
        ('scaling --models vmamba.py --peers vgg', '--peers: there is no vgg'),
        ('scaling --models vmamba.py --batch 0', '--batch must be at least 1'),
        ('scaling --models vmamba.py --seconds nan', '--seconds must not be negative'),
    ],
)
def test_one_sentence(command, said, folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    small = [] if '--size' in command else ['--size', 32]
    small += [] if '--num' in command or '--data' in command else ['--num-images', 1]
    assert analyze(monkeypatch, *command.split(), *small) == 2
    message = capsys.readouterr().err.strip().splitlines()
    at = next(i for i, line in enumerate(message) if 'error: ' in line)
    assert said in '\n'.join(message[at:])


def test_weights_that_are_not_finite(folder, monkeypatch, capsys):
    """They do not end as empty pictures."""
    monkeypatch.chdir(folder)
    (subject,) = parse_subjects(['vmamba.py'])
    net = subject.build().net
    net.backbone.layers[1].blocks[0].norm.weight.data[0] = float('nan')
    torch.save(dict(state_dict=net.state_dict()), 'nan.pth')
    assert analyze(monkeypatch, 'erf', '--models', 'vmamba.py=nan.pth') == 2
    assert 'nan.pth holds NaN or infinite weights' in capsys.readouterr().err


@pytest.mark.parametrize(
    'stage, studies',
    [
        (0, ['erf', 'attention', 'gates', 'cam']),
        (3, ['erf', 'norms', 'features', 'tokens']),
    ],
)
def test_outputs_that_are_not_finite(stage, studies, folder, monkeypatch, capsys):
    """Weights may be finite and too large."""
    monkeypatch.chdir(folder)
    (subject,) = parse_subjects(['vmamba.py'])
    net = subject.build().net
    for name, parameter in net.backbone.named_parameters():
        if name.startswith(f'layers.{stage}.') and name.endswith('fc2.weight'):
            parameter.data.fill_(3e38)
    torch.save(dict(state_dict=net.state_dict()), 'large.pth')
    for study in studies:
        command = [study, '--models', 'vmamba.py=large.pth', '--size', 32]
        command += ['--num-images', 28 if study == 'tokens' else 1]
        code = analyze(monkeypatch, *command)
        assert code == 2, capsys.readouterr().err
