"""Programs of torch.export: one for images of all sizes."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from compare import relative_error
from families import FAMILIES
from mmvssm.backbones import MLLA
from mmvssm.export import DifferenceError, ExportError, to_exported_program
from mmvssm.export.wrappers import wrap
from mmvssm.layers import SS2D
from mmvssm.ops import use_backend

from .models import enliven, segmentor

BOTH = ('batch', 'size')
# Whole patches and not, square and not, as large as the position embedding, and tiny.
SHAPES = [
    *[(1, 64, 64), (3, 48, 80), (2, 33, 47), (1, 61, 35), (2, 32, 32)],
    *[(1, 4, 4), (3, 5, 9), (1, 4, 70), (1, 225, 193)],
]
OPTIONS = dict(vim=dict(return_tokens=True), mambar=dict(return_tokens=True))


def make(name):
    torch.manual_seed(0)
    return enliven(FAMILIES[name](**OPTIONS.get(name, {})))


@pytest.fixture(scope='module')
def programs():
    """Models with their programs, made when they are first asked for."""
    made = {}

    def get(name):
        if name not in made:
            model = make(name)
            made[name] = model, to_exported_program(model, 64, BOTH)
        return made[name]

    return get


def image(batch, height, width):
    generator = torch.Generator().manual_seed(height)
    return torch.randn(batch, 3, height, width, generator=generator)


def leaves(outputs):
    return torch.utils._pytree.tree_leaves(outputs)


@torch.no_grad()
def assert_alike(model, run, x, bound=1e-6):
    got, want = leaves(run(x)), leaves(model(x))
    assert len(got) == len(want)
    for a, b in zip(got, want):
        assert relative_error(a, b) < bound, tuple(x.shape)


def targets(program):
    return [node.target for node in program.graph.nodes if node.op == 'call_function']


@pytest.mark.parametrize('name', FAMILIES)
def test_all_sizes(programs, name):
    model, program = programs(name)
    run = program.module()
    for shape in SHAPES:
        assert_alike(model, run, image(*shape))
    ours = [
        node
        for node in program.graph.nodes
        if getattr(node.target, 'namespace', '') == 'mmvssm'
    ]
    assert ours and not any(node.args[-2] for node in ours), 'nothing is kept'
    # Not every runtime has float64.
    values = [node.meta.get('val') for node in program.graph.nodes]
    dtypes = {x.dtype for x in leaves(values) if isinstance(x, torch.Tensor)}
    assert torch.float32 in dtypes and torch.float64 not in dtypes


def test_a_file(programs, tmp_path):
    model, program = programs('vmamba_v05_noz')
    torch.export.save(program, tmp_path / 'model.pt2')
    run = torch.export.load(tmp_path / 'model.pt2').module()
    for shape in [(1, 1, 1), (2, 33, 47)]:
        assert_alike(model, run, image(*shape))


def test_plain_tensor_code():
    """Backend ``torch``: the scan is one op, and what is around it operators."""
    model = nn.Sequential(nn.Conv2d(3, 8, 2), SS2D(8)).eval()
    with use_backend('torch'):
        program = to_exported_program(model, 64, BOTH)
        for shape in SHAPES[1:7]:
            assert_alike(model, program.module(), image(*shape))


@pytest.mark.long
def test_upernet():
    """With mmseg's pooling and resizing, padded to the size of the test pipeline."""
    model = wrap(segmentor('vmamba'), 'logits')
    program = to_exported_program(model, 64, BOTH)
    for shape in [(2, 33, 47), (1, 96, 225)]:
        assert_alike(model, program.module(), image(*shape))


def test_any_batch_of_one_size_that_is_not_square():
    model = make('vmamba_v05_noz')
    program = to_exported_program(model, (33, 20), ('batch',))
    for batch in (1, 2, 5):
        assert_alike(model, program.module(), image(batch, 33, 20))


def test_one_size():
    model = make('mlla')
    program = to_exported_program(model, (33, 20), batch=2)
    assert_alike(model, program.module(), image(2, 33, 20))
    with pytest.raises(Exception, match='shape|size'):
        program.module()(image(2, 36, 20))


@pytest.mark.parametrize('name', ['vmamba_v05_noz', 'vim'])
def test_a_program_for_training(name):
    """torch's own export, with gradients: maps of less than a chunk of 32, and more."""
    model = make(name).train()
    dims = dict.fromkeys((0, 2, 3), torch.export.Dim.DYNAMIC)
    program = torch.export.export(model, (image(2, 72, 56),), dynamic_shapes=(dims,))
    run = program.module()

    def gradient(function, module, x):
        loss = sum(y.square().mean() for y in leaves(function(x)))
        wanted = [p for _, p in sorted(module.named_parameters())]
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, wanted)])

    for shape in [(1, 64, 64), (3, 61, 35), (2, 16, 20)]:
        x = image(*shape)
        got, want = gradient(run, run, x), gradient(model, model, x)
        assert relative_error(got, want) < 1e-6, shape


def test_blocks_share_their_tables():
    model = MLLA(dict(depths=(3, 1), dims=16, num_heads=(2, 4)), out_indices=(1,))
    model.eval()
    program = to_exported_program(model, (32, 24))
    # Two maps with two axes, each with a coarse and a fine angle.
    assert targets(program).count(torch.ops.aten.cos.default) == 2 * 4
    assert_alike(model, program.module(), image(1, 32, 24))


class Convolution(nn.Module):
    """Another image model, which looks at the size of the image."""

    def __init__(self, branch):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, stride=2, padding=1)
        self.branch = branch

    def forward(self, x):
        y = self.conv(x)
        return self.branch(x, y)


def test_a_branch_at_large_sizes():
    model = Convolution(lambda x, y: 2 * y if x.shape[2] > 300 else y).eval()
    with pytest.raises(ExportError, match=r'under the condition .*300: leave out'):
        to_exported_program(model, 64, ['size'])
    assert_alike(
        model, to_exported_program(model, 64, ['batch']).module(), image(1, 64, 64)
    )


def test_a_branch_at_a_small_size():
    model = Convolution(lambda x, y: 2 * y if x.shape[3] == 70 else y).eval()
    with pytest.raises(DifferenceError, match=r'at an image of \(.*70\)'):
        to_exported_program(model, 64, ['size'])


def test_images_that_the_model_refuses():
    def branch(x, y):
        if min(x.shape[2:]) < 24:
            raise ValueError('too small')
        return F.adaptive_avg_pool2d(y, 3)

    model = Convolution(branch).eval()
    program = to_exported_program(model, 64, BOTH)
    assert {str(r.lower) for r in program.range_constraints.values()} == {'1', '24'}
    assert_alike(model, program.module(), image(1, 24, 25))
    with pytest.raises(Exception, match='24'):
        program.module()(image(1, 23, 25))


@pytest.mark.parametrize(
    'options, message',
    [
        (dict(size=(64, 64, 64)), 'height and width'),
        (dict(size=0), 'height and width'),
        (dict(size=3), '4x4 pixels or more'),
        (dict(dynamic=['height']), r"got \['height'\]"),
        (dict(batch=0), 'batch must be 1 or more'),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ExportError, match=message):
        to_exported_program(FAMILIES['vim']().eval(), **{'size': 64} | options)


def test_models_that_it_refuses():
    with pytest.raises(ExportError, match=r'call model.eval\(\)'):
        to_exported_program(FAMILIES['vim'](), 64)
    hilbert = FAMILIES['vmamba_v05_noz'](orders='hilbert').eval()
    with pytest.raises(ExportError, match="'hilbert' is a table for one size"):
        to_exported_program(hilbert, 64, BOTH)
    program = to_exported_program(hilbert, 64, ['batch'])
    assert_alike(hilbert, program.module(), image(3, 64, 64))
    masked = FAMILIES['mlla'](mask_padding=True).eval()
    with pytest.raises(ExportError, match='mask_padding'):
        to_exported_program(masked, 64)
