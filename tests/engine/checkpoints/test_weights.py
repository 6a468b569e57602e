import pytest
import torch
from torch import nn

from mmvssm.checkpoints import CheckpointError
from mmvssm.engine import UsageError, check_load_from, load_weights
from mmvssm.engine.checkpoints.weights import check_resumed


class Segmentor(nn.Module):
    def __init__(self, classes=5):
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
        self.decode_head = nn.Conv2d(4, classes, 1)
        self.auxiliary_head = nn.Conv2d(4, classes, 1)


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / 'w.pth')


def test_all_is_loaded(path):
    source, target = Segmentor(), Segmentor()
    torch.save(dict(state_dict=source.state_dict(), meta={}), path)
    load_weights(target, path)
    for key in ('backbone.0.weight', 'decode_head.bias'):
        assert torch.equal(target.state_dict()[key], source.state_dict()[key])


def test_auxiliary_head_may_be_absent_or_other(path):
    state = Segmentor().state_dict()
    state['auxiliary_head.weight'] = torch.ones(1)
    del state['auxiliary_head.bias']
    torch.save(state, path)
    load_weights(Segmentor(), path)


def test_one_tensor_less_is_refused_and_nothing_loaded(path):
    state = Segmentor().state_dict()
    del state['backbone.1.running_mean']
    torch.save(state, path)
    model = Segmentor()
    before = model.decode_head.weight.detach().clone()
    with pytest.raises(UsageError) as error:
        load_weights(model, path)
    said = str(error.value)
    assert 'backbone: 6 of 7 tensors match' in said
    assert 'decode_head: 2 of 2 tensors match' in said
    assert 'backbone.1.running_mean (4,) is not in the file' in said
    assert torch.equal(before, model.decode_head.weight)


def test_other_number_of_classes(path):
    torch.save(Segmentor(19).state_dict(), path)
    with pytest.raises(UsageError, match=r'is \(19, 4, 1, 1\) in the file'):
        load_weights(Segmentor(), path)
    # Fine-tuning may start from it.
    check_load_from(Segmentor(), path)


def test_start_from_another_backbone_is_refused(path):
    torch.save({'conv1.weight': torch.ones(2)}, path)
    with pytest.raises(UsageError, match='0 of 7 tensors match'):
        check_load_from(Segmentor(), path)


def test_published_names_are_converted(path):
    """A segmentor of the first published version, with its old names."""
    pytest.importorskip('mmseg')
    from mmvssm.backbones import VSSM
    from mmvssm.backbones.vssm import ARCH_ZOO

    arch = dict(ARCH_ZOO['t_v0'], depths=(1, 1, 1, 1), dims=8)
    source, target = (Segmentor() for _ in range(2))
    source.backbone, target.backbone = VSSM(arch), VSSM(arch)
    old = {}
    for key, value in source.state_dict().items():
        key = (
            key.replace('patch_embed.0', 'patch_embed.proj')
            .replace('patch_embed.2', 'patch_embed.norm')
            .replace('.op.', '.self_attention.')
        )
        if '.blocks.' in key:
            key = key.replace('.norm.', '.ln_1.')
        old[key] = value
    torch.save(dict(state_dict=old), path)
    load_weights(target, path)
    key = 'layers.3.blocks.0.norm.weight'
    assert torch.equal(
        target.backbone.state_dict()[key], source.backbone.state_dict()[key]
    )
    key = 'layers.2.blocks.0.op.in_proj.weight'
    assert torch.equal(
        target.backbone.state_dict()[key], source.backbone.state_dict()[key]
    )


def test_not_a_checkpoint(path):
    with pytest.raises(UsageError, match='no checkpoint at'):
        load_weights(Segmentor(), path)
    with open(path, 'wb') as file:
        file.write(b'PK' + bytes(100))
    with pytest.raises(CheckpointError):
        load_weights(Segmentor(), path)


def test_start_from_a_part_of_the_backbone_is_refused(path):
    state = Segmentor().state_dict()
    state['backbone.1.renamed'] = state.pop('backbone.1.running_mean')
    torch.save(state, path)
    with pytest.raises(UsageError, match='6 of 7 tensors match'):
        check_load_from(Segmentor(), path)


def test_numbers_of_another_kind_are_refused(path):
    state = Segmentor().state_dict()
    state['decode_head.bias'] = state['decode_head.bias'].long()
    torch.save(state, path)
    with pytest.raises(UsageError, match=r'decode_head\.bias .* holds torch\.int64'):
        load_weights(Segmentor(), path)


def test_weights_once_bare_and_once_wrapped_are_refused(path):
    state = Segmentor().state_dict()
    state['module.decode_head.bias'] = state['decode_head.bias'] + 1
    torch.save(state, path)
    with pytest.raises(CheckpointError, match='decode_head.bias twice'):
        load_weights(Segmentor(), path)


def test_resuming_from_another_model_is_refused():
    state = Segmentor(19).state_dict()
    check_resumed(Segmentor(19).state_dict(), state)
    with pytest.raises(UsageError, match='of another model'):
        check_resumed(Segmentor().state_dict(), state)


def test_positions_of_another_image_size_are_resized(path, monkeypatch):
    from mmvssm.backbones import Vim
    from mmvssm.engine.checkpoints import weights

    arch = dict(embed_dims=16, depth=2)
    source, target = (Segmentor() for _ in range(2))
    source.backbone = Vim(arch, img_size=64)
    target.backbone = Vim(arch, img_size=(96, 64))
    with torch.no_grad():
        # The mean of a smooth embedding is that of the resized one.
        source.backbone.pos_embed.fill_(0.25)
        target.backbone.pos_embed.fill_(7.0)
    torch.save(dict(state_dict=source.state_dict()), path)
    said = []
    monkeypatch.setattr(weights, 'print_log', lambda text, logger: said.append(text))
    load_weights(target, path)
    assert target.backbone.pos_embed.shape[1] == 24
    assert torch.allclose(target.backbone.pos_embed, torch.tensor(0.25))
    key = 'layers.1.mixer.in_proj.weight'
    found, wanted = (x.backbone.state_dict()[key] for x in (target, source))
    assert torch.equal(found, wanted)
    (text,) = said
    assert 'pos_embed was resized from 4x4 to 6x4' in text
    assert 'weights: state_dict' in text


@pytest.mark.parametrize('value', (float('nan'), float('inf')))
def test_weights_that_are_not_finite_are_refused(value, path):
    state = Segmentor().state_dict()
    state['decode_head.bias'] = torch.full((5,), value)
    torch.save(state, path)
    with pytest.raises(CheckpointError, match='infinite weights: decode_head.bias'):
        load_weights(Segmentor(), path)
    # Nothing predicts with it.
    good = Segmentor().state_dict()
    torch.save({**good, 'auxiliary_head.bias': torch.full((5,), value)}, path)
    load_weights(Segmentor(), path)
