"""The models that ``models_cpu.py`` compares, and what is done with them."""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import model_peers
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mmvssm

CLASSES = 1000
MODES = ('inference', 'training')
# float32; weights and images in bfloat16; autocast to bfloat16 of float32 weights.
DTYPES = ('float32', 'bfloat16', 'autocast')
PEERS: dict[str, Callable[[tuple[int, int]], nn.Module]] = {
    'swin_t': lambda size: model_peers.swin('swin_t', CLASSES, drop_path_rate=0.0),
    'convnext_t': lambda size: model_peers.ConvNeXt(CLASSES),
    'deit_s': lambda size: model_peers.DeiT(CLASSES, size),
}
OURS = ('vmamba_t_s1l8', 'vmamba_s_s1l20', 'vim_t', 'vim_s', 'mambar_s', 'mlla_t')
MODELS = (*OURS, *PEERS)


@dataclass(frozen=True)
class Case:
    """What all contenders do in turn; ``mode`` is one of ``MODES``."""

    height: int
    width: int
    batch: int
    threads: int
    mode: str

    @property
    def size(self) -> tuple[int, int]:
        return self.height, self.width

    @property
    def name(self) -> str:
        threads = f'{self.threads} thread{"s" * (self.threads > 1)}'
        size = f'{self.width}x{self.height}'
        return f'{self.mode}, {size}, batch {self.batch}, {threads}'


@dataclass(frozen=True)
class Contender:
    """A model by name, one of ``DTYPES``, and whether ``torch.compile`` is used."""

    model: str
    dtype: str = DTYPES[0]
    compiled: bool = False

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
    all gradients. The step of the optimizer is not in it: it depends on the number of
    parameters alone.

    Args:
        model: In the contender's dtype, see :func:`in_dtype`; its mode is set.
    """
    training = case.mode == 'training'
    model.train(training)
    compiled, dtype = contender.compiled, contender.dtype
    module = torch.compile(model, dynamic=False) if compiled else model
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(case.batch, 3, *case.size, generator=generator)
    labels = torch.randint(CLASSES, (case.batch,), generator=generator)
    if dtype == 'bfloat16':
        images = images.bfloat16()

    def logits() -> Tensor:
        with torch.autocast('cpu', torch.bfloat16, enabled=dtype == 'autocast'):
            return module(images)

    def infer() -> None:
        with torch.no_grad():
            logits()

    def train() -> None:
        F.cross_entropy(logits().float(), labels).backward()
        model.zero_grad(set_to_none=True)

    return train if training else infer


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
