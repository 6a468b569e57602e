"""The models that are compared, and what is done with them."""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mmvssm
from mmvssm.analysis.measuring import peers

CLASSES = 1000
MODES = ('inference', 'training')
# float32; weights and images in bfloat16; autocast to bfloat16 of float32 weights.
DTYPES = ('float32', 'bfloat16', 'autocast')
_DEIT_T = dict(channels=192, heads=3)


def _scaled_swin(size: tuple[int, int]) -> nn.Module:
    window = max(1, max(size) // 32)
    return peers.swin('swin_t', CLASSES, drop_path_rate=0.0, window_size=window)


# ``materialised`` makes the matrix of all pairs of positions, as the published code of
# DeiT does. ``scaled`` has windows of size / 32, as VMamba's article compares Swin.
PEERS: dict[str, Callable[[tuple[int, int]], nn.Module]] = {
    'swin_t': lambda size: peers.swin('swin_t', CLASSES, drop_path_rate=0.0),
    'convnext_t': lambda size: peers.ConvNeXt(CLASSES),
    'deit_s': lambda size: peers.DeiT(CLASSES, size),
    'deit_s_materialised': lambda size: peers.DeiT(CLASSES, size, fused=False),
    'deit_t': lambda size: peers.DeiT(CLASSES, size, **_DEIT_T),
    'deit_t_materialised': lambda size: peers.DeiT(
        CLASSES, size, **_DEIT_T, fused=False
    ),
    'swin_t_scaled': _scaled_swin,
}
OURS = ('vmamba_t_s1l8', 'vmamba_s_s1l20', 'vim_t', 'vim_s', 'mambar_s', 'mlla_t')
MODELS = (*OURS, 'swin_t', 'convnext_t', 'deit_s')


@dataclass(frozen=True)
class Case:
    """What all contenders do in turn; ``mode`` is one of ``MODES``."""

    height: int
    width: int
    batch: int
    threads: int
    mode: str
    device: str = 'cpu'

    @property
    def size(self) -> tuple[int, int]:
        return self.height, self.width

    @property
    def name(self) -> str:
        threads = f'{self.threads} thread{"s" * (self.threads > 1)}'
        size = f'{self.width}x{self.height}'
        where = threads if self.device == 'cpu' else self.device
        return f'{self.mode}, {size}, batch {self.batch}, {where}'


@dataclass(frozen=True)
class Contender:
    """A model, one of ``DTYPES``, and whether ``torch.compile`` is used.

    Attributes:
        model: A name of ``PEERS`` or :func:`mmvssm.list_models`; with ``builder`` any.
        builder: Builds the model from height and width. Another process must be able to
            import it.
    """

    model: str
    dtype: str = DTYPES[0]
    compiled: bool = False
    builder: Callable[[tuple[int, int]], nn.Module] | None = None

    def build(self, size: tuple[int, int]) -> nn.Module:
        """The model in its dtype."""
        model = self.builder(size) if self.builder else build(self.model, size)
        return in_dtype(model, self.dtype)

    @property
    def way(self) -> str:
        return f'{self.dtype}, {"compiled" if self.compiled else "eager"}'

    @property
    def name(self) -> str:
        return f'{self.model}, {self.way}'


def build(name: str, size: tuple[int, int]) -> nn.Module:
    """A classifier with random weights, always the same, and without drop path."""
    torch.manual_seed(0)
    if name in PEERS:
        return PEERS[name](size)
    return mmvssm.build_classifier(name, CLASSES, drop_path_rate=0.0)


def in_dtype(model: nn.Module, dtype: str) -> nn.Module:
    """The model, or a copy with its weights in bfloat16."""
    return copy.deepcopy(model).bfloat16() if dtype == 'bfloat16' else model


def weight_bytes(model: nn.Module) -> int:
    """Bytes of parameters and buffers."""
    tensors = [*model.parameters(), *model.buffers()]
    return sum(x.numel() * x.element_size() for x in tensors)


def make_step(model: nn.Module, case: Case, contender: Contender) -> Callable[[], None]:
    """What is timed.

    Inference makes logits of a batch. Training also takes their cross-entropy and makes
    all gradients; for a model that gives maps, the mean of their squares takes its
    place. The step of the optimizer is not in it: it depends on the number of
    parameters alone.

    Args:
        model: In the contender's dtype and on the case's device; its mode is set.
    """
    training = case.mode == 'training'
    model.train(training)
    compiled, dtype = contender.compiled, contender.dtype
    module = torch.compile(model, dynamic=False) if compiled else model
    kind = torch.device(case.device).type
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(case.batch, 3, *case.size, generator=generator)
    labels = torch.randint(CLASSES, (case.batch,), generator=generator)
    images, labels = images.to(case.device), labels.to(case.device)
    if dtype == 'bfloat16':
        images = images.bfloat16()

    def outputs() -> Tensor | tuple[Tensor, ...]:
        with torch.autocast(kind, torch.bfloat16, enabled=dtype == 'autocast'):
            return module(images)

    def wait() -> None:
        if kind != 'cpu':
            torch.accelerator.synchronize(case.device)

    def infer() -> None:
        with torch.no_grad():
            outputs()
        wait()

    def train() -> None:
        _loss(outputs(), labels).backward()
        model.zero_grad(set_to_none=True)
        wait()

    return train if training else infer


def _loss(found: Tensor | tuple[Tensor, ...], labels: Tensor) -> Tensor:
    if isinstance(found, Tensor) and found.ndim == 2:
        return F.cross_entropy(found.float(), labels % found.shape[1])
    maps = (found,) if isinstance(found, Tensor) else found
    return sum(x.float().square().mean() for x in maps)


@torch.no_grad()
def difference(
    name: str, dtype: str, size: tuple[int, int], count: int = 64, batch: int = 8
) -> dict:
    """How logits of a dtype differ from those of float32 on random images.

    The images are smooth random patterns: on noise alone all logits are alike.

    Returns:
        The number of ``images``; ``largest``, the largest difference of a logit, and
        ``largest_over_std``, the same over the standard deviation of an image's logits;
        ``same_class``, the part of the images whose highest logit is that of the same
        class, and of how many ``classes``.
    """
    model = build(name, size).eval()
    other = in_dtype(model, dtype)
    generator = torch.Generator().manual_seed(0)
    pairs = []
    for start in range(0, count, batch):
        coarse = torch.randn(min(batch, count - start), 3, 7, 7, generator=generator)
        images = F.interpolate(coarse, size, mode='bicubic')
        want = model(images)
        if dtype == 'bfloat16':
            images = images.bfloat16()
        with torch.autocast('cpu', torch.bfloat16, enabled=dtype == 'autocast'):
            pairs.append((want, other(images).float()))
    want, got = (torch.cat(logits) for logits in zip(*pairs))
    largest = (got - want).abs().max()
    classes = want.argmax(1)
    return dict(
        images=count,
        largest=largest.item(),
        largest_over_std=(largest / want.std(1).mean()).item(),
        same_class=(classes == got.argmax(1)).double().mean().item(),
        classes=classes.unique().numel(),
    )
