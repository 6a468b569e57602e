"""Files with published names, fetched by the names of the zoo and loaded whole."""

import argparse
from urllib.parse import urlsplit

import pytest
import torch

import mmvssm
from mmvssm.zoo import TABLE, fetch, find
from parity import Case

CLASSIFIERS = [row for row in TABLE.values() if row.kind == 'classifier' and row.url]


def address(row):
    split = urlsplit(row.url)
    return split.path + (f'?{split.query}' if split.query else '')


def serve(server, row, state, folder):
    """Offer what a training writes: weights, other ones beside them, and the rest."""
    other = {
        key: value + 1 for key, value in state.items() if value.is_floating_point()
    }
    wrong = {'model': 'model_ema', 'model_ema': 'model'}.get(row.copy)
    content = {row.copy or 'model': state, 'epoch': 299}
    content['args'] = argparse.Namespace(lr=1e-3)
    content['optimizer'] = dict(state={0: dict(step=torch.tensor(3.0))})
    if wrong:
        content[wrong] = other
    torch.save(content, folder / 'file.pth')
    server.files[address(row)] = (folder / 'file.pth').read_bytes()


def published_names(model, state):
    """Own names of a classifier -> those of the published file."""
    found = {key.removeprefix('backbone.'): value for key, value in state.items()}
    if model.startswith('vmamba') and not model.endswith('_v0'):
        return found
    return {key.removeprefix('classifier.'): value for key, value in found.items()}


def check(name, server, folder, state):
    row = find(name)
    serve(server, row, state, folder)
    net = mmvssm.build_classifier(name)
    report = mmvssm.load_checkpoint(net, f'mmvssm://{name}')
    # Counters of batch norms, which no file needs.
    assert report.missing == report.new_by_design and not report.unexpected, report
    assert all(key.endswith('.num_batches_tracked') for key in report.missing)
    assert report.copy == (row.copy or 'model')
    return net.eval()


@pytest.mark.parametrize(
    'name', ['vmamba_t_s1l8', 'vmamba_t_v0', 'vim_t', 'mambar_s', 'mlla_t']
)
@torch.no_grad()
def test_published_numbers(name, mirror, tmp_path):
    """One full-size file of each family and format."""
    case = Case(f'{name}_logits')
    net = check(name, mirror, tmp_path, case.weights())
    case.check({'logits': net(case.inputs()['input'])})
    # Backbones take the same file; output norms are new by design.
    dense = mmvssm.build_backbone(name, pretrained=True)
    want = net.backbone.layers[0].state_dict()
    for key, value in dense.layers[0].state_dict().items():
        assert torch.equal(value, want[key])


@pytest.mark.long
@pytest.mark.parametrize('row', CLASSIFIERS, ids=lambda row: row.name)
def test_every_classifier(row, mirror, tmp_path):
    torch.manual_seed(0)
    source = mmvssm.build_classifier(row.model)
    state = published_names(row.model, source.state_dict())
    if row.model.startswith('mlla'):
        state['layers.0.blocks.0.attn.rope.rotations'] = torch.zeros(3)
    net = check(row.name, mirror, tmp_path, state)
    for key, value in source.state_dict().items():
        assert torch.equal(net.state_dict()[key], value)
    fetch(f'mmvssm://{row.name}')
    assert len(mirror.requests) == 1
