"""A forward pass of a model's necks and heads on a made-up image, without traces."""

import copy
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_unflatten

from mmvssm.backbones import set_img_shapes
from mmvssm.backbones.base import Backbone
from mmvssm.engine.training.rng import get_rng_state, set_rng_state

Shape = tuple[int, ...]


class Seen(NamedTuple):
    """What a forward pass showed.

    Attributes:
        shapes (list[tuple]): Of the backbone's maps, and of its tokens if it returns
            some.
        used (list[int]): Places of those that the loss depends on.
        idle (list[str]): Parameters of necks and heads that it does not depend on.
        single (list[str]): Norms that got one value a channel, of which torch makes an
            error in training: batch norms, and group norms of one channel a group.
    """

    shapes: list[Shape]
    used: list[int]
    idle: list[str]
    single: list[str]

    @property
    def all_used(self) -> bool:
        """Whether the loss depends on every map."""
        return len(self.used) == len(self.shapes)


class MadeUpMaps(nn.Module):
    """A backbone that returns random maps, whatever the image.

    Args:
        shapes: Of the maps, and of tokens.
        device: Of the maps.
        spec: How torch's ``tree_unflatten`` makes an output of them; None for a tuple.
    """

    def __init__(
        self,
        shapes: Sequence[Shape],
        device: torch.device | None = None,
        spec: TreeSpec | None = None,
    ):
        super().__init__()
        self.shapes = [tuple(shape) for shape in shapes]
        self.spec = spec
        self.leaves = [
            torch.randn(shape, device=device, requires_grad=True) for shape in shapes
        ]

    def forward(self, images: Tensor) -> tuple:
        # A layer may change them in place, and must not change a leaf.
        maps = tuple(leaf.clone() for leaf in self.leaves)
        return maps if self.spec is None else tree_unflatten(maps, self.spec)


@contextmanager
def without_traces() -> Iterator[None]:
    """Keep random numbers as they are, show no warning, and talk to no process."""
    state, initialized = get_rng_state(), dist.is_initialized
    # Losses of mmdet average over the processes, and the others are not here.
    dist.is_initialized = lambda: False
    try:
        with warnings.catch_warnings(), torch.enable_grad():
            warnings.simplefilter('ignore')
            torch.manual_seed(0)
            yield
    finally:
        dist.is_initialized = initialized
        set_rng_state(state)


def look(model: nn.Module, size: tuple[int, int], sample: Any) -> Seen:
    """Compute the loss of a copy of a model on one image.

    The backbone runs on tensors without values, or not at all where its maps are known
    without it. Batch norms use their running statistics.

    Args:
        model: A segmentor, detector or classifier, not wrapped.
        size: Height and width of the image.
        sample: Its data sample.

    Raises:
        Exception: Any, for models of other kinds.
    """
    device = next(model.parameters()).device
    shapes, spec, single = _known_shapes(model.backbone, size), None, []
    if shapes is None:
        outputs, _, single = run_backbone(model.backbone, size)
        maps, spec = tree_flatten(outputs)
        shapes = [tuple(x.shape) for x in maps]
    made_up = MadeUpMaps(shapes, device, spec)
    model = copy.deepcopy(model, {id(model.backbone): made_up})
    _sample_few(model)
    if hasattr(model, 'teach'):
        # Of its losses, that of the average of its weights needs a hook.
        model.teach(model, -1)
    found = _watch_norms(model)
    images = torch.zeros(1, 3, *size, device=device)
    losses = model(images, [sample.to(device)], mode='loss')
    reached = _reached([model.parse_losses(losses)[0]])
    return Seen(
        shapes=shapes,
        used=[i for i, leaf in enumerate(made_up.leaves) if id(leaf) in reached],
        idle=_missing(model, reached),
        single=[*single, *found],
    )


def lost_parameters(
    backbone: nn.Module, size: tuple[int, int], used: Iterable[int]
) -> list[str]:
    """Names of the backbone's parameters that only maps not in use depend on."""
    outputs, copied, _ = run_backbone(backbone, size)
    maps = tree_leaves(outputs)
    without = _missing(copied, _reached(maps))
    lost = _missing(copied, _reached([maps[i] for i in used]))
    return [f'backbone.{name}' for name in lost if name not in without]


def run_backbone(
    backbone: nn.Module, size: tuple[int, int]
) -> tuple[Any, nn.Module, list[str]]:
    """Run a copy of a backbone on one image, on tensors without values.

    Returns:
        What it returns, the copy, and the batch norms that got one value a channel.

    Raises:
        TypeError: It does not return maps, features, or pairs of maps and tokens.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    tensors = [*backbone.parameters(), *backbone.buffers()]
    # The copy shares no values with the backbone, and has none.
    copied = copy.deepcopy(backbone, {id(x): mode.from_tensor(x) for x in tensors})
    found = _watch_norms(copied, 'backbone')
    channels = backbone.in_channels if isinstance(backbone, Backbone) else 3
    with mode:
        images = torch.empty(1, channels, *size, device=tensors[0].device)
        set_img_shapes(images, [size])
        outputs = copied(images)
    if not all(isinstance(x, Tensor) for x in tree_leaves(outputs)):
        raise TypeError(f'{type(backbone).__name__} does not return maps')
    return outputs, copied, found


def _known_shapes(backbone: nn.Module, size: tuple[int, int]) -> list[Shape] | None:
    """Shapes of the maps of one image, where the backbone tells them."""
    if isinstance(backbone, MadeUpMaps):
        return backbone.shapes
    # With tokens, what it returns is no map.
    others = ('return_tokens', 'out_type')
    if not isinstance(backbone, Backbone) or any(
        getattr(backbone, name, None) for name in others
    ):
        return None
    sizes = backbone.map_sizes(backbone.whole_size(size))
    return [(1, c, *sides) for c, sides in zip(backbone.out_channels, sizes)]


def _watch_norms(model: nn.Module, prefix: str = '') -> list[str]:
    """Set the training mode, and let norms take one value all the same.

    Returns:
        Names of those that had to. They are added to the list as they run.
    """
    model.train()
    names = {module: name for name, module in model.named_modules(prefix=prefix)}
    found: list[str] = []

    def note(norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        grouped = isinstance(norm, nn.GroupNorm)
        parts = norm.num_groups if grouped else inputs[0].shape[1]
        # As torch counts.
        if inputs[0].numel() != parts:
            return
        if grouped:
            norm.num_groups = 1
        if names[norm] not in found:
            found.append(names[norm])

    for module in names:
        learns = isinstance(module, _BatchNorm) and module.training
        if learns or isinstance(module, nn.GroupNorm):
            module.eval().register_forward_pre_hook(note)
    return found


def _sample_few(model: nn.Module, most: int = 4) -> None:
    """Let the heads of a detector learn from few boxes, of hundreds that take long."""
    for module in model.modules():
        for value in list(vars(module).values()):
            for sampler in value if isinstance(value, list) else [value]:
                if hasattr(sampler, 'pos_fraction'):
                    sampler.num = min(sampler.num, most)


def _reached(outputs: Iterable[Tensor]) -> set[int]:
    """Ids of the leaves that outputs depend on, found as DDP finds them."""
    nodes = [output.grad_fn for output in outputs]
    seen, leaves = set(), set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, 'variable'):
            leaves.add(id(node.variable))
        nodes += [before for before, _ in node.next_functions]
    return leaves


def _missing(model: nn.Module, reached: set[int]) -> list[str]:
    """Names of the parameters with gradients that were not reached."""
    return [
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and id(parameter) not in reached
    ]
