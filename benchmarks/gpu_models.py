"""Whole models on the GPU: inference and a training step, beside their rivals.

A classifier runs as it is, on each of our backends and on mamba_ssm's scan, and
beside it a transformer of about the same size: DeiT, with fused and with
unfused softmax attention, or Swin. A training step is forward, cross-entropy,
backward and AdamW. bf16 is autocast over float32 weights.
"""

import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

import gpu_peers
import torch
import torch.nn.functional as F
from gpu_device import Device, turns
from torch import Tensor, nn

import mmvssm
from mmvssm.analysis.measuring.peers import MMSEG, swin
from mmvssm.analysis.measuring.timing import Effort, reason
from mmvssm.ops import backend_status, use_backend

CLASSES = 1000
# timm's names.
TIMM = {
    'deit_t': 'deit_tiny_patch16_224',
    'deit_s': 'deit_small_patch16_224',
    'deit_b': 'deit_base_patch16_224',
    'swin_t': 'swin_tiny_patch4_window7_224',
    'swin_s': 'swin_small_patch4_window7_224',
}


@dataclass(frozen=True)
class Case:
    """A model of ours, its rival, and the images."""

    model: str
    rival: str
    batch: int
    height: int
    width: int
    dtype: str = 'bf16'
    compiled: bool = False

    @property
    def name(self) -> str:
        how = 'compiled' if self.compiled else 'eager'
        size = f'{self.width}x{self.height}, b{self.batch}'
        return f'{self.model}, {size}, {self.dtype}, {how}'


# The most telling ones first.
RIVALS = {
    'vmamba_t_s1l8': 'swin_t',
    'vim_s': 'deit_s',
    'mlla_t': 'swin_t',
    'vim_t': 'deit_t',
    'vmamba_s_s1l20': 'swin_s',
    'mambar_b': 'deit_b',
    'mambar_s': 'deit_s',
}
_FIRST = 3
# Batch, height, width.
IMAGES = ((128, 224, 224), (4, 512, 512), (2, 800, 1280))
# Sides of the single images of the claim that Vim is faster and smaller than DeiT.
LARGE = (1248, 1024, 736, 640, 512)


def cases(quick: bool) -> list[Case]:
    """What is measured, the most telling first: the time may run out."""
    if quick:
        return [
            Case('vim_t', 'deit_t', 1, 32, 32),
            Case('vim_t', 'deit_t', 1, 32, 32, 'fp32'),
        ]
    ways = [('bf16', False), ('bf16', True), ('fp32', False), ('fp32', True)]
    first = list(RIVALS.items())[:_FIRST]
    found = [Case(*pair, *IMAGES[0], *way) for way in ways[:2] for pair in first]
    found += [Case('vim_t', 'deit_t', 1, side, side) for side in LARGE]
    found += [
        Case(*pair, *images, *way)
        for way, images in itertools.product(ways, IMAGES)
        for pair in RIVALS.items()
    ]
    # Those that come again have been measured.
    return list(dict.fromkeys(found))


def rows(
    device: Device, effort: Effort, quick: bool
) -> Iterator[tuple[str, Callable[[], dict]]]:
    """Names of the rows, and what measures each."""
    for case in cases(quick):
        yield case.name, functools.partial(measure, device, effort, case)


def measure(device: Device, effort: Effort, case: Case) -> dict:
    """One row: images a second and peak memory of all contenders."""
    models, left_out = contenders(device, case)
    images = [
        torch.randn(case.batch, 3, case.height, case.width, device=device.name)
        for _ in range(device.sets(12 * case.batch * case.height * case.width))
    ]
    labels = torch.randint(CLASSES, (case.batch,), device=device.name)
    found = {name: {} for name in models}
    for which, step in (('inference', infer), ('training', train)):
        functions = {}
        for name, (model, backend) in models.items():
            model.train(which == 'training')
            module = torch.compile(model, dynamic=False) if case.compiled else model
            run = step(device, case, module, turns(images), labels)
            functions[name] = run if backend is None else on_backend(backend, run)
        times = device.measure(functions, effort, hide_host=False)
        for name, taken in times.items():
            found[name][which] = taken
    parameters = {
        name: sum(p.numel() for p in model.parameters())
        for name, (model, _) in models.items()
    }
    return dict(
        case=asdict(case), parameters=parameters, contenders=found, left_out=left_out
    )


def on_backend(backend: str, function: Callable[[], object]) -> Callable[[], object]:
    """The function with all scans inside on one backend."""

    def call() -> object:
        with use_backend(backend):
            return function()

    return call


def infer(
    device: Device,
    case: Case,
    model: nn.Module,
    images: Callable[[], Tensor],
    labels: Tensor,
) -> Callable[[], Tensor]:
    """A function that makes logits of a batch."""
    kind = torch.device(device.name).type
    mixed = case.dtype == 'bf16'

    def step() -> Tensor:
        with torch.no_grad(), torch.autocast(kind, torch.bfloat16, enabled=mixed):
            return model(images())

    return step


def train(
    device: Device,
    case: Case,
    model: nn.Module,
    images: Callable[[], Tensor],
    labels: Tensor,
) -> Callable[[], None]:
    """A function that does one training step."""
    kind = torch.device(device.name).type
    mixed = case.dtype == 'bf16'
    # A step so small that the weights stay what they are to a reader.
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-8)

    def step() -> None:
        with torch.autocast(kind, torch.bfloat16, enabled=mixed):
            logits = model(images())
        F.cross_entropy(logits.float(), labels).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def contenders(
    device: Device, case: Case
) -> tuple[dict[str, tuple[nn.Module, str | None]], dict[str, str]]:
    """Models with the backend they run on, and why others are left out."""
    names, left_out = gpu_peers.our_backends(device)
    if not device.is_cuda:
        names = names[:1]
    # MLLA has no scan.
    if not case.model.startswith('mlla'):
        missing = backend_status()['mamba_ssm']
        if missing:
            left_out['mamba_ssm'] = missing
        else:
            names = [*names, 'mamba_ssm']
    torch.manual_seed(0)
    model = mmvssm.build_classifier(case.model, num_classes=CLASSES).to(device.name)
    # They take turns, so the weights may be the same.
    found = {backend: (model, backend) for backend in names}
    for name, build in rivals(case.rival, (case.height, case.width)).items():
        try:
            found[name] = build().to(device.name), None
        except Exception as error:
            left_out[name] = reason(error)
    return found, left_out


def rivals(name: str, size: tuple[int, int]) -> dict[str, Callable[[], nn.Module]]:
    """Builders of a transformer, with fused and with unfused attention.

    Each raises an ImportError where what it is made of is not installed.
    """
    found = {
        f'{name}, {how}': functools.partial(_timm, name, size, how == 'fused')
        for how in ('fused', 'unfused')
    }
    try:
        import timm  # noqa: F401
    except ImportError:
        if name in MMSEG:
            return {f'{name}, mmseg': functools.partial(_mmseg, name)}
    return found


def _timm(name: str, size: tuple[int, int], fused: bool) -> nn.Module:
    try:
        import timm
        from timm.layers import set_fused_attn, use_fused_attn
    except ImportError as error:
        raise ImportError(f'timm is not installed ({error})') from error
    before = use_fused_attn(), use_fused_attn(experimental=True)
    # Experimental is what timm calls it in Swin's windows.
    set_fused_attn(fused, experimental=fused)
    try:
        return timm.create_model(TIMM[name], img_size=size, num_classes=CLASSES)
    finally:
        set_fused_attn(*map(bool, before))


def _mmseg(name: str) -> nn.Module:
    try:
        return swin(name, CLASSES)
    except ImportError as error:
        raise ImportError(f'neither timm nor mmseg is installed ({error})') from error
