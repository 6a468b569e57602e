"""Adapters, parametrisations, pruning, norms of weights and hooks take effect.

Each is attached to one layer or parameter after the other, of a small classifier of
each family. What comes out is held against a plain model whose weights were set by
hand to those that the layer should have, and so are the gradients.
"""

import copy
import functools
import re
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import utils
from torch.nn.utils import parametrizations, parametrize, prune

import mmvssm
from compare import relative_error
from families import FAMILIES, PLAIN, V0
from mmvssm.backbones import MLLA, VSSM, LinearAttentionStudy, MambaR, Vim
from mmvssm.heads import (
    ClassificationHead,
    ClassTokenHead,
    ImageClassifier,
    RegisterHead,
)
from mmvssm.layers import Linear2d
from mmvssm.layers.linear import Linear
from mmvssm.necks import PlainPyramid, SimpleFeaturePyramid

ISOTROPIC = dict(classification=True, drop_path_rate=0.0)
STAGES = dict(out_indices=(1,), drop_path_rate=0.0)
STUDY = dict(depths=(1, 1), dims=16, head_dim=8)
MLLA_ARCH = dict(depths=(1, 1), dims=16, num_heads=(2, 4))


def study(**options):
    switches = dict(input_gate=True, forget_gate=True, shortcut=True, design='sub')
    return LinearAttentionStudy(STUDY, **STAGES | switches | options)


MODELS = {
    'vmamba_v0': lambda: ImageClassifier(VSSM(V0, **STAGES), ClassificationHead(32, 5)),
    'vmamba_v05_noz': lambda: ImageClassifier(
        VSSM(dict(depths=(1, 1), dims=16), **STAGES), ClassificationHead(32, 5)
    ),
    'vim': lambda: ImageClassifier(
        Vim(PLAIN, img_size=32, cls_token='middle', **ISOTROPIC), ClassTokenHead(16, 5)
    ),
    'mambar': lambda: ImageClassifier(
        MambaR(dict(PLAIN, registers=3), img_size=32, **ISOTROPIC),
        RegisterHead(16, 5, 3, 2),
    ),
    'mlla': lambda: ImageClassifier(
        MLLA(MLLA_ARCH, **STAGES), ClassificationHead(32, 5)
    ),
    'study': lambda: ImageClassifier(study(), ClassificationHead(32, 5)),
}
# Of what is on its way out of torch.
pytestmark = [
    pytest.mark.filterwarnings('ignore:.*deprecated:DeprecationWarning'),
    pytest.mark.filterwarnings('ignore:.*deprecated:FutureWarning'),
    pytest.mark.filterwarnings('ignore:.*deprecated:UserWarning'),
    pytest.mark.filterwarnings('ignore:Full backward hook:UserWarning'),
]
every_model = pytest.mark.parametrize('name', MODELS)


@functools.cache
def model(name):
    """Never changed; no weight is zero, and batch norms have seen an image."""
    torch.manual_seed(0)
    net = MODELS[name]().train()
    with torch.no_grad():
        for key, parameter in net.named_parameters():
            # So large that a change of any of them shows.
            if key.endswith('weight') and parameter.ndim > 1:
                parameter.normal_(std=1.5 * parameter[0].numel() ** -0.5)
            elif 'dt_' in key or 'A_' in key:
                parameter.normal_()
            else:
                parameter.add_(torch.randn_like(parameter) / 2)
        net(image())
    return net.eval()


def image(size=32):
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))


# ------------------------------------------------------------------ the kinds
class LowRank(nn.Module):
    """A parametrisation: the weight and a product of two thin matrices."""

    def __init__(self, weight):
        super().__init__()
        rows = weight.shape[0]
        self.up = nn.Parameter(torch.randn(rows, 2) / 8)
        self.down = nn.Parameter(torch.randn(2, weight[0].numel()) / 8)

    def forward(self, weight):
        return weight + (self.up @ self.down).view_as(weight)


class Adapter(nn.Module):
    """In the place of a layer: it, and a small one beside it.

    For a linear layer that is one of low rank, for a convolution another convolution.
    """

    def __init__(self, base):
        super().__init__()
        self.base = base
        if isinstance(base, nn.Linear):
            self.down = nn.Linear(base.in_features, 2, bias=False)
            self.up = nn.Linear(2, base.out_features, bias=False)
        else:
            self.beside = copy.deepcopy(base)
            self.beside.bias = None
            nn.init.normal_(self.beside.weight, std=0.1)

    def forward(self, x):
        if not isinstance(self.base, nn.Linear):
            return self.base(x) + self.beside(x)
        # The channels of a map are its second axis.
        axis = 1 if isinstance(self.base, Linear2d) else -1
        beside = self.up(self.down(x.movedim(axis, -1))).movedim(-1, axis)
        return self.base(x) + beside

    def weight(self):
        if isinstance(self.base, nn.Linear):
            return self.base.weight + self.up.weight @ self.down.weight
        return self.base.weight + self.beside.weight


def low_rank(module, name):
    parametrize.register_parametrization(module, name, LowRank(getattr(module, name)))
    return lambda: {name: getattr(module, name)}


def pruning(module, name):
    prune.random_unstructured(module, name, amount=0.5)
    return lambda: {
        name: getattr(module, f'{name}_orig') * getattr(module, f'{name}_mask')
    }


def weight_norm(module, name):
    parametrizations.weight_norm(module, name)
    return lambda: {name: getattr(module, name)}


def old_weight_norm(module, name):
    utils.weight_norm(module, name)
    v, g = f'{name}_v', f'{name}_g'
    return lambda: {name: torch._weight_norm(getattr(module, v), getattr(module, g), 0)}


def spectral_norm(module, name):
    parametrizations.spectral_norm(module, name)
    return lambda: {name: getattr(module, name)}


def old_spectral_norm(module, name):
    utils.spectral_norm(module, name)

    def effective():
        weight = getattr(module, f'{name}_orig')
        u, v = (getattr(module, f'{name}_{vector}') for vector in 'uv')
        return {name: weight / (u @ weight.flatten(1) @ v)}

    return effective


def forward_hook(module):
    module.register_forward_hook(lambda module, args, out: 2 * out)
    return lambda: {key: 2 * value for key, value in own(module).items()}


def forward_pre_hook(module):
    module.register_forward_pre_hook(lambda module, args: (2 * args[0],))
    return lambda: {'weight': 2 * module.weight}


def own(module):
    return dict(module.named_parameters(recurse=False))


OF_PARAMETERS = dict(
    low_rank=low_rank,
    pruning=pruning,
    weight_norm=weight_norm,
    old_weight_norm=old_weight_norm,
    spectral_norm=spectral_norm,
    old_spectral_norm=old_spectral_norm,
)
OF_LAYERS = dict(forward_hook=forward_hook, forward_pre_hook=forward_pre_hook)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d)


def layers(net):
    """Linear layers and convolutions, of all blocks alike those of one."""
    found = {}
    for path, module in net.named_modules():
        if isinstance(module, (nn.Linear, *CONVOLUTIONS)):
            found[re.sub(r'\.\d+\.', '.', path)] = path
    return list(found.values())


def parameters(net, least):
    """(owner, name) of parameters with that many axes, of blocks alike those of one."""
    found = {}
    for key, parameter in net.named_parameters():
        path, _, name = key.rpartition('.')
        if parameter.ndim >= least:
            found[re.sub(r'\.\d+\.', '.', key)] = (path, name)
    return list(found.values())


def check(plain, net, path, effective):
    """Change what was attached; outputs and gradients are those of the weights."""
    x = image()
    module = net.get_submodule(path)
    leaves = [p for p in net.parameters() if id(p) in reachable(effective())]
    with torch.no_grad():
        net(x)
        for leaf in leaves:
            leaf.mul_(1 + torch.rand_like(leaf))
    by_hand = copy.deepcopy(plain)
    with torch.no_grad():
        for name, value in effective().items():
            by_hand.get_submodule(path).get_parameter(name).copy_(value)
    got, want = net(x), by_hand(x)
    assert relative_error(got, want) < 5e-6, (path, module)
    assert relative_error(got, plain(x)) > 1e-4, (path, module)
    for output in (got, want):
        output.square().sum().backward()
    tensors = effective()
    grads = [by_hand.get_submodule(path).get_parameter(name).grad for name in tensors]
    grads = torch.autograd.grad(list(tensors.values()), leaves, grads)
    # All of them together: some have nothing but noise.
    got, want = (
        torch.cat([grad.flatten() for grad in found])
        for found in ([leaf.grad for leaf in leaves], grads)
    )
    assert relative_error(got, want) < 1e-4, (path, module)


def reachable(tensors):
    """Identities of the parameters that tensors are computed from."""
    found, nodes = set(), [t.grad_fn for t in tensors.values()]
    found |= {id(t) for t in tensors.values() if t.grad_fn is None}
    while nodes:
        node = nodes.pop()
        if node is not None:
            if hasattr(node, 'variable'):
                found.add(id(node.variable))
            nodes += [previous for previous, _ in node.next_functions]
    return found


# ------------------------------------------------------------------ the tests
@every_model
@pytest.mark.parametrize('kind', OF_PARAMETERS)
def test_parameters(name, kind):
    """Of layers, and those that SS2D, mixers and backbones have themselves."""
    plain = model(name)
    least = 1 if kind in ('low_rank', 'pruning') else 2
    for path, parameter in parameters(plain, least):
        torch.manual_seed(0)
        net = copy.deepcopy(plain)
        effective = OF_PARAMETERS[kind](net.get_submodule(path), parameter)
        check(plain, net.eval(), path, effective)


@every_model
@pytest.mark.parametrize('kind', OF_LAYERS)
def test_hooks(name, kind):
    plain = model(name)
    for path in layers(plain):
        net = copy.deepcopy(plain)
        check(plain, net, path, OF_LAYERS[kind](net.get_submodule(path)))


@every_model
def test_adapters(name):
    plain = model(name)
    for path in layers(plain):
        torch.manual_seed(0)
        net = copy.deepcopy(plain)
        adapter = Adapter(net.get_submodule(path))
        net.set_submodule(path, adapter)
        check(plain, net, path, lambda adapter=adapter: {'weight': adapter.weight()})


@every_model
def test_backward_hooks(name):
    """They see the gradient of what each layer gives, and their layer's weights."""
    net = copy.deepcopy(model(name))
    seen = set()
    for path in layers(net):
        net.get_submodule(path).register_full_backward_hook(
            lambda module, into, out, path=path: seen.add(path)
        )
    net(image()).square().sum().backward()
    assert seen == set(layers(net))


def necks():
    for neck in (PlainPyramid(16), SimpleFeaturePyramid(16, 8)):
        yield neck, [torch.randn(1, 16, 8, 8)]


def test_every_module_with_weights_is_called():
    """Else what is attached to it may have no effect."""
    nets = [(build(), image()) for build in (*MODELS.values(), *FAMILIES.values())]
    for switch in (
        {'design': 'transformer'},
        {'design': 'all', 'position': ('ape', 'cpe', 'lepe')},
    ):
        nets.append((study(**switch), image()))
    nets.append((Vim(PLAIN, img_size=32, last_layer_process='norm'), image()))
    cascade = dict(depths=(1, 1), dims=16, forward_type='v052dc_noz')
    nets.append((VSSM(cascade, **STAGES), image()))
    for net, x in (*nets, *necks()):
        owners = {path for path, module in net.named_modules() if own(module)}
        called = set()
        for path in owners:
            net.get_submodule(path).register_forward_hook(
                lambda module, args, out, path=path, called=called: called.add(path)
            )
        net(x)
        assert called == owners


@pytest.mark.parametrize('kind', ['spectral_norm', 'old_spectral_norm'])
@every_model
def test_spectral_norm_in_training(name, kind):
    """Each forward pass is one more step of its power iteration."""
    plain = model(name)
    for path, parameter in parameters(plain, 2):
        net = copy.deepcopy(plain)
        module = net.get_submodule(path)
        torch.manual_seed(0)
        OF_PARAMETERS[kind](module, parameter)
        alone = copy.deepcopy(module).train()
        module.train()
        for _ in range(2):
            net(image())
        if kind == 'spectral_norm':
            for _ in range(2):
                getattr(alone, parameter)
        else:
            for hook in 2 * [*alone._forward_pre_hooks.values()]:
                hook(alone, None)
        got, want = dict(module.named_buffers()), dict(alone.named_buffers())
        assert got.keys() == want.keys()
        for key in got:
            assert relative_error(got[key], want[key]) < 1e-6, (path, key)


@every_model
def test_dynamic_quantisation(name):
    """Layers that are ``nn.Linear`` get weights of 8 bits, the package's own do not."""
    quantization = pytest.importorskip('torch.ao.quantization')
    net = model(name)
    got = quantization.quantize_dynamic(copy.deepcopy(net))
    swapped = 0
    for path, module in net.named_modules():
        kind = type(got.get_submodule(path))
        if type(module) is nn.Linear:
            assert kind is torch.ao.nn.quantized.dynamic.Linear, path
            swapped += 1
        else:
            assert kind is type(module), path
    assert swapped == {'vim': 9, 'mambar': 10}.get(name, 1)
    with torch.no_grad():
        error = relative_error(got(image()), net(image()))
    assert 1e-5 < error < 0.1


def test_own_layers_are_not_quantised():
    """They are refused where somebody asks for it."""
    quantization = pytest.importorskip('torch.ao.quantization')
    net = copy.deepcopy(model('vim'))
    assert type(net.backbone.layers[0].mixer.in_proj) is Linear
    into = {Linear: torch.ao.nn.quantized.dynamic.Linear}
    with pytest.raises(AssertionError, match='only works for'):
        quantization.quantize_dynamic(net, {Linear}, mapping=into)


@pytest.mark.parametrize('kind', ['low_rank', 'pruning', 'adapter'])
def test_recomputed_blocks(kind):
    """``with_cp`` gives the same gradients."""
    torch.manual_seed(0)
    plain = model('vim')
    net = copy.deepcopy(plain)
    path = 'backbone.layers.1.mixer.x_proj_b'
    if kind == 'adapter':
        net.set_submodule(path, Adapter(net.get_submodule(path)))
    else:
        OF_PARAMETERS[kind](net.get_submodule(path), 'weight')
    grads = []
    for with_cp in (False, True):
        net.backbone.with_cp = with_cp
        net.zero_grad()
        net(image()).square().sum().backward()
        grads.append(torch.cat([p.grad.flatten() for p in net.parameters()]))
    assert relative_error(*grads) < 1e-6


@pytest.mark.parametrize('kind', ['low_rank', 'pruning', 'adapter', 'forward_hook'])
def test_compiled(kind):
    """One graph with what was attached; see backbones/test_compile.py for without."""
    torch.manual_seed(0)
    net = copy.deepcopy(model('vim'))
    path = 'backbone.layers.1.mixer.x_proj'
    module = net.get_submodule(path)
    if kind == 'adapter':
        net.set_submodule(path, Adapter(module))
    elif kind == 'forward_hook':
        forward_hook(module)
    else:
        OF_PARAMETERS[kind](module, 'weight')
    torch._dynamo.reset()
    outputs, grads = [], []
    for function in (torch.compile(net, fullgraph=True, backend='aot_eager'), net):
        net.zero_grad()
        outputs.append(function(image()))
        outputs[-1].square().sum().backward()
        grads.append(torch.cat([p.grad.flatten() for p in net.parameters()]))
    assert relative_error(*outputs) < 1e-6
    assert relative_error(*grads) < 1e-5
    assert relative_error(outputs[0], model('vim')(image())) > 1e-4


def test_load_first():
    """A file does not fit a model with adapters, and is not loaded in part."""
    net = FAMILIES['vim']()
    state = net.state_dict()
    low_rank(net.layers[0].mixer.x_proj, 'weight')
    with pytest.raises(mmvssm.checkpoints.CheckpointError, match='x_proj'):
        mmvssm.load_checkpoint(net, state)


def test_examples_of_the_docs():
    """They run, start as the plain model, and end in plain weights."""
    text = (Path(__file__).parents[1] / 'docs' / 'adapters.md').read_text()
    first, second = re.findall(r'```python\n(.*?)```', text, re.S)
    names = {}
    before, merging = first.split('# ... training ...')
    exec(before, names)
    net, x = names['net'].eval(), image(64)
    mixer = net.backbone.layers[0].mixer
    plain = mmvssm.build_classifier('vim_t', num_classes=10).eval()
    plain.load_state_dict(
        {
            key.replace('parametrizations.weight.original', 'weight'): value
            for key, value in net.state_dict().items()
            if not key.endswith(('.up', '.down'))
        }
    )
    assert torch.equal(net(x), plain(x))
    net(x).square().sum().backward()
    trained = {key for key, p in net.named_parameters() if p.grad is not None}
    assert all(re.search(r'\.(up|down)$|classifier', key) for key in trained)
    assert len(trained) == 24 * 4 * 2 + 2
    with torch.no_grad():
        mixer.x_proj_b.parametrizations.weight[0].up.normal_()
        want = net(x)
        assert relative_error(want, plain(x)) > 1e-6
    exec(merging, names)
    assert net.state_dict().keys() == plain.state_dict().keys()
    assert relative_error(net(x), want) < 1e-6

    plain = mmvssm.build_backbone('vmamba_t_s1l8').eval()
    exec(second, names)
    vmamba = names['vmamba'].eval()
    assert sum(type(m).__name__ == 'Adapter' for m in vmamba.modules()) == 14
    state = {
        key.replace('.base.', '.'): value
        for key, value in vmamba.state_dict().items()
        if '.up.' not in key and '.down.' not in key
    }
    plain.load_state_dict(state)
    pairs = list(zip(vmamba(x), plain(x), strict=True))
    assert max(relative_error(got, want) for got, want in pairs) < 1e-6
    sum(y.square().mean() for y in vmamba(x)).backward()
    up = vmamba.layers[0].blocks[0].op.in_proj.up.weight
    assert up.grad.abs().max() > 0


class OtherWeight(torch.Tensor):
    """A weight that is no plain tensor, as libraries for quantisation have them."""

    @staticmethod
    def __new__(cls, weight):
        return torch.Tensor._make_wrapper_subclass(cls, weight.shape)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return args[0]
        raise NotImplementedError(func)


@pytest.mark.parametrize('grad', [False, True])
@pytest.mark.parametrize(
    'name, leaf',
    [('vim', 'x_proj'), ('vim', 'in_proj'), ('vmamba_v0', 'in_proj'), ('mlla', 'qk')],
)
def test_other_classes_of_weights_are_refused(name, leaf, grad):
    """By themselves, since they do not know the ops."""
    net = copy.deepcopy(model(name))
    for path, module in net.named_modules():
        if path.endswith(leaf):
            module.weight = nn.Parameter(OtherWeight(module.weight), False)
    with torch.set_grad_enabled(grad), pytest.raises(NotImplementedError, match='mmvs'):
        net(image())
