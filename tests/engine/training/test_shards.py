"""Models of every family in shards compute what they compute whole."""

import json
import os

import pytest

import warm
from families import FAMILIES
from toy import environment

# Prints, of each family and way, the largest differences to a whole model.
_SCRIPT = """
import faulthandler, json, os, sys
import torch, torch.distributed as dist
from torch import nn
from families import FAMILIES
from mmvssm.engine import FSDPStrategy
from mmvssm.engine.training.sharding import (
    class_name, clip_whole_norm, find_blocks, shard, whole_weights)

# Processes that wait for each other say where, and end.
faulthandler.dump_traceback_later(200, exit=True)
# Another test may take a port before it is used here, but no file.
dist.init_process_group('gloo', init_method='file://' + os.environ['MEETING'],
                        rank=int(os.environ['RANK']), world_size=2)
rank = dist.get_rank()

class Net(nn.Module):
    def __init__(self, name, seed, **options):
        super().__init__()
        torch.manual_seed(seed)
        self.backbone = FAMILIES[name](**options)
        self.head = nn.Linear(3, 2)

    def forward(self, x):
        maps = self.backbone(x)
        return sum(y.float().square().mean() * self.head.weight.sum() for y in maps)

def images(seed, size):
    torch.manual_seed(seed)
    return torch.randn(2, 3, size, size)

def apart(a, b):
    a, b = a.detach(), b.detach()
    if not (a.isfinite().all() and b.isfinite().all()):
        return float('inf')
    return float((a - b).abs().max() / b.abs().max().clamp(min=1e-3))

def whole(value):
    return value.full_tensor() if hasattr(value, 'full_tensor') else value

def compare(name, way):
    options = dict(with_cp=True) if way == 'with_cp' else {}
    plain, net = Net(name, 0, **options), Net(name, rank, **options)
    names = [class_name(block) for block in find_blocks(net)]
    total = sum(p.numel() for p in net.parameters())
    shard(net, find_blocks(net))
    assert [class_name(block) for block in find_blocks(net)] == names
    held = sum(p.to_local().numel() for p in net.parameters())
    assert held < 0.7 * total, (held, total)
    # Adam would make of rounding in gradients near zero whole steps.
    optimizers = [
        torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9) for m in (plain, net)]
    cast = lambda: torch.autocast('cpu', torch.bfloat16, enabled=way == 'bfloat16')
    found = dict(validation=0, loss=0, norm=0, gradient=0, weight=0)

    def note(key, a, b):
        found[key] = max(found[key], apart(a, b))

    for step in range(3):
        # First of all, and once more than the other process.
        with whole_weights(net), torch.no_grad(), cast():
            for i in range(1 + rank):
                x = images(i, 32 + 16 * i)
                note('validation', net(x), plain(x))
        # The last step is of the gradients of two batches.
        for batch in range(2 if step == 2 else 1):
            for seed in (0, 1):
                x = images(100 * batch + 10 * step + seed, 32)
                with cast():
                    loss = plain(x) / 2
                loss.backward()
                if seed == rank:
                    with cast():
                        mine = net(x)
                    note('loss', mine, 2 * loss)
            mine.backward()
        for a, b in zip(net.parameters(), plain.parameters()):
            if b.grad is not None:
                note('gradient', whole(a.grad), b.grad)
        norms = [clip(m.parameters(), 0.5) for m, clip in (
            (net, clip_whole_norm), (plain, nn.utils.clip_grad_norm_))]
        note('norm', *norms)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        for a, b in zip(net.parameters(), plain.parameters()):
            note('weight', whole(a), b)
    return found

for name in FAMILIES:
    for way in ('plain', 'with_cp', 'bfloat16'):
        try:
            found = compare(name, way)
        except Exception:
            print('in', name, way, file=sys.stderr)
            raise
        print(json.dumps(dict(name=name, way=way, found=found)), flush=True)

net = Net('vim', 0)
shard(net, find_blocks(net))
optimizer = torch.optim.AdamW(net.parameters(), lr=1.0)
scaler = torch.amp.GradScaler('cpu', init_scale=4.0)
before = [whole(p).clone() for p in net.parameters()]
scaler.scale(net(images(rank, 32))).backward()
if rank:
    # Of its two rows the second process has one.
    net.head.weight.grad.to_local().fill_(float('inf'))
scaler.step(optimizer)
scaler.update()
moved = any(apart(whole(p), b) for p, b in zip(net.parameters(), before))
print(json.dumps(dict(name='scaler', way=rank, found=[moved, scaler.get_scale()])))

torch.manual_seed(rank)
strategy = FSDPStrategy(
    work_dir='.', env_kwargs=dict(launcher='pytorch', randomness=dict(seed=rank)))
net, wrapper = strategy.prepare(
    Net('vim', rank), optim_wrapper=dict(optimizer=dict(type='AdamW', lr=0.1)))
wrapper.update_params(net(images(rank, 32)))
strategy.save_checkpoint(
    os.environ['CHECKPOINT'], extra_ckpt=dict(meta=dict(iter=1)))
before = [whole(x).clone() for x in net.state_dict().values()]
wrapper.update_params(net(images(rank, 32)))
dist.barrier()
strategy.resume(os.environ['CHECKPOINT'])
same = all(torch.equal(whole(a), b) for a, b in zip(net.state_dict().values(), before))
steps = {int(x['step']) for x in wrapper.optimizer.state.values()}
print(json.dumps(dict(name='saved', way=rank, found=[same, sorted(steps)])))
dist.destroy_process_group()
"""


@pytest.fixture(scope='module')
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp('shards')
    script = folder / 'script.py'
    script.write_text(_SCRIPT)
    files = dict(MEETING=str(folder / 'meeting'), CHECKPOINT=str(folder / 'saved.pth'))
    paths = [folder / f'{rank}.txt' for rank in range(2)]
    ranks = []
    try:
        for rank, path in enumerate(paths):
            own = dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE='2')
            env = {**os.environ, **environment(), **files, **own}
            errors = path.with_suffix('.err')
            ranks.append(warm.start([script], path, errors, cwd=folder, env=env))
        codes = [rank.wait() for rank in ranks]
    except BaseException:
        for rank in ranks:
            warm.kill(rank)
        raise
    errors = ''.join(path.with_suffix('.err').read_text() for path in paths)
    assert codes == [0, 0], errors
    lines = [
        json.loads(line)
        for path in paths
        for line in path.read_text().splitlines()
        if line.startswith('{')
    ]
    return {
        name: [line for line in lines if line['name'] == name]
        for name in [*FAMILIES, 'scaler', 'saved']
    }


@pytest.mark.parametrize('name', FAMILIES)
def test_family_in_shards_is_as_whole(name, found):
    """Both add two gradients, which has one order, but norms in another one."""
    assert len(found[name]) == 6
    for line in found[name]:
        for what, apart in line['found'].items():
            assert apart <= 1e-4, (line['way'], what)


def test_one_process_with_infinite_gradients_stops_the_step_of_all(found):
    assert [line['found'] for line in found['scaler']] == [[False, 2.0]] * 2


def test_strategy_saves_and_resumes_by_itself(found):
    """With all processes, as mmengine's ``FlexibleRunner`` calls it."""
    assert [line['found'] for line in found['saved']] == [[True, [1]]] * 2
