"""pretraining.py: which trainings it starts, what it keeps, and how it compares."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest

from mmvssm import collect_env
from mmvssm.engine import UsageError


@pytest.fixture
def pretraining(load):
    return load('pretraining')


@pytest.fixture
def tool(pretraining, monkeypatch):
    """In the place of the quickstart's tool: the commands, and what it gives."""
    commands, state = [], SimpleNamespace(fails_at=None)

    def run(command, env, stdout, stderr):
        words = [str(word) for word in command]
        commands.append(words)
        if len(commands) == state.fails_at:
            return SimpleNamespace(returncode=1)
        folder = Path(words[words.index('--work-dir') + 1])
        seed = int(words[words.index('--cfg-options') + 1].rpartition('=')[2])
        start = 50 if '--pretrained' in words else 30
        metrics = {'mIoU': start + seed, 'accuracy/top1': 90.0}
        (folder / 'metrics.json').write_text(json.dumps(metrics))
        (folder / 'last_checkpoint').write_text(f'{folder}/iter_7.pth\n')
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(pretraining, 'subprocess', SimpleNamespace(run=run))
    monkeypatch.setattr(collect_env, 'collect_env', dict)
    state.commands = commands
    return state


def arguments(pretraining, tmp_path, *more):
    paths = ['--work-dir', str(tmp_path / 'work'), '--out', str(tmp_path / 'out.json')]
    return pretraining.parse_args([*paths, *more])


def test_every_seed_is_trained_from_both_starts(pretraining, tool, tmp_path, capsys):
    pretraining.main(arguments(pretraining, tmp_path))
    classifier, *segmentors = tool.commands
    assert str(pretraining.CLASSIFIER) in classifier and '1500' in classifier
    assert len(segmentors) == 6
    checkpoint = f'{tmp_path}/work/classifier_1500_iterations/iter_7.pth'
    for number, words in enumerate(segmentors):
        assert str(pretraining.SEGMENTOR) in words and '300' in words
        assert f'randomness.seed={number // 2}' in words
        assert (checkpoint in words) == ('--pretrained' in words) == bool(number % 2)
    folders = {words[words.index('--work-dir') + 1] for words in tool.commands}
    assert len(folders) == 7
    result = json.loads((tmp_path / 'out.json').read_text())
    assert result['comparison'] == dict(
        random=dict(mean=31, spread=1),
        pretrained=dict(mean=51, spread=1),
        gain=20,
        beyond_spread=True,
    )
    assert result['pretraining']['top1'] == 90
    assert result['pretraining']['data']['layout'] == 'imagenet'
    assert '+20.00, more than both spreads together' in capsys.readouterr().out


def test_goes_on_where_it_was_interrupted(pretraining, tool, tmp_path):
    tool.fails_at = 3
    with pytest.raises(UsageError, match='from_1500_seed0 failed, see .*log'):
        pretraining.main(arguments(pretraining, tmp_path))
    tool.commands.clear()
    tool.fails_at = None
    pretraining.main(arguments(pretraining, tmp_path))
    # The one that failed among them.
    assert len(tool.commands) == 5
    tool.commands.clear()
    pretraining.main(arguments(pretraining, tmp_path))
    assert not tool.commands
    # Another classifier is another start, and no other start from random weights.
    more = ('--pretraining-iterations', '9')
    pretraining.main(arguments(pretraining, tmp_path, *more))
    assert len(tool.commands) == 4


def test_what_another_config_was_trained_to_is_not_taken(
    pretraining, tool, tmp_path, monkeypatch
):
    pretraining.main(arguments(pretraining, tmp_path))
    other = tmp_path / pretraining.SEGMENTOR.name
    other.write_text(f'_base_ = {str(pretraining.SEGMENTOR)!r}\nmax_iters = 5\n')
    monkeypatch.setattr(pretraining, 'SEGMENTOR', other)
    with pytest.raises(UsageError, match='another state of upernet_vmamba_quickstart'):
        pretraining.main(arguments(pretraining, tmp_path))


@pytest.mark.parametrize(
    'random, pretrained, beyond',
    [
        ([10, 12, 14], [14.5, 16.5, 18.5], True),
        ([10, 12, 14], [13, 15, 17], False),
        ([10, 12, 14], [9, 11, 10], False),
        ([10, 12, 14], [20, math.nan, 30], False),
        # Nobody knows how far apart single runs are.
        ([10], [30], False),
    ],
)
def test_a_gain_is_more_than_the_spreads(pretraining, random, pretrained, beyond):
    starts = dict(random=random, pretrained=pretrained)
    runs = [
        dict(start=start, mIoU=value)
        for start, values in starts.items()
        for value in values
    ]
    assert pretraining.compare(runs)['beyond_spread'] is beyond
