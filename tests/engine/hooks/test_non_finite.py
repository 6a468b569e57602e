"""A loss that is not finite."""

import re

import pytest
import torch

from mmvssm.engine.hooks.non_finite import first_non_finite
from toy import (
    ToyModel,
    environment,
    final_weights,
    train_each,
    train_pair,
    write_toy,
    write_vmamba,
)

SKIP = 'custom_hooks[2].update(max_skipped=1)\n'


def test_training_stops_and_says_where(tmp_path):
    write_toy(tmp_path)
    image, weight = train_each(
        tmp_path,
        ('nan@13', '--work-dir', 'image'),
        ('weight@14', '--work-dir', 'weight'),
    )
    assert (image[0], weight[0]) == (2, 2)
    assert re.search(
        r'error: loss not finite in iteration 13: loss nan for '
        r'image_\d+\.png, image_\d+\.png; first in the input\. '
        r'The last checkpoint is \S+/image/iter_10\.pth',
        image[1],
    )
    assert 'the weight norm.weight is not finite' in weight[1]
    state = torch.load(tmp_path / 'image/iter_10.pth')['state_dict']
    assert all(value.isfinite().all() for value in state.values())


def test_batches_are_skipped_up_to_a_limit_on_all_ranks(tmp_path):
    write_toy(tmp_path, SKIP, iters=8)
    ((code, log),) = train_each(tmp_path, ('nan@3', '--work-dir', 'one'))
    assert code == 0, log
    assert 'iteration 3' in log and 'Skipped (1 of at most 1)' in log
    assert all(v.isfinite().all() for v in final_weights(tmp_path, 'one').values())
    variables = environment('nan@3', TOY_RANK='1')
    codes, logs = zip(*train_pair(tmp_path, 'toy_config.py', **variables))
    log = ''.join(logs)
    assert codes == (0, 0), log
    assert 'rank 1: loss nan' in log and 'rank 0: loss' not in log
    write_toy(tmp_path, iters=8)
    ((code, log),) = train_each(tmp_path, ('nan@3', '--work-dir', 'none'))
    assert code == 2


def test_first_module_is_the_innermost_and_statistics_stay():
    model = ToyModel()
    torch.nn.Module.register_forward_hook(
        model.drop, lambda module, args, output: output / 0
    )
    batch = dict(inputs=list(torch.rand(2, 3, 4, 4)), img_path=['a', 'b'])
    mean = model.norm.running_mean.clone()
    assert first_non_finite(model, batch) == 'drop (Dropout)'
    assert torch.equal(model.norm.running_mean, mean)


def test_in_the_training_of_a_segmentor(tmp_path):
    pytest.importorskip('mmseg')
    write_vmamba(tmp_path, iters=6, interval=2)
    event = 'module:backbone.layers.2.blocks.0.norm2@4'
    skip = ('--cfg-options', 'default_hooks.non_finite.max_skipped=1')
    stopped, skipped = train_each(
        tmp_path, (event, '--work-dir', 'stop'), (event, '--work-dir', 'skip', *skip)
    )
    images = rf'{tmp_path}/ade/images/training/\d\.jpg'
    said = (
        rf'loss not finite in iteration 4: loss nan for {images}, {images}; '
        r'first in backbone\.layers\.2\.blocks\.0\.norm2 \(LayerNorm2d\)'
    )
    assert stopped[0] == 2
    assert re.search(
        rf'error: {said}\. The last checkpoint is \S+/iter_2\.pth', stopped[1]
    )
    state = torch.load(tmp_path / 'stop/iter_2.pth')['state_dict']
    assert all(value.isfinite().all() for value in state.values())
    assert skipped[0] == 0, skipped[1]
    assert re.search(rf'{said}\. Skipped \(1 of at most 1\)', skipped[1])
    final = final_weights(tmp_path, 'skip')
    assert all(value.isfinite().all() for value in final.values())
