"""Training with weights, gradients and optimizer in shards, one a process (FSDP2).

Each block of the backbone, and then all the rest of the model, is a unit: the smallest
part whose weights are gathered and let go together.
"""

import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from typing import Any

import mmengine
import torch
import torch.distributed as dist
from mmengine._strategy import DDPStrategy
from mmengine.device import get_device
from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.model import BaseDataPreprocessor
from mmengine.optim import BaseOptimWrapper
from mmengine.runner import save_checkpoint
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.utils import clip_grad_norm_, clip_grads_with_norm_, get_total_norm

from mmvssm.engine.errors import UsageError
from mmvssm.registry import STRATEGIES

# On rank 0, in the CPU's memory.
_WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


@STRATEGIES.register_module()
class FSDPStrategy(DDPStrategy):
    """Fully sharded data parallel training, by torch's ``fully_shard`` (FSDP2).

    Every process holds its part of the weights, gradients and optimizer, and the
    whole weights of one unit at a time. Machines without an accelerator do it through
    gloo.

    - All processes start from the weights of rank 0.
    - Checkpoints are those of an unsharded training, gathered on rank 0 by
      ``torch.distributed.checkpoint``. They load in every tool, and a training may go
      on with or without shards and with another number of processes.
    - Clipping of gradients goes by the norm of the whole gradient.

    Args:
        units: Names of the modules that are units, as patterns such as
            ``'backbone.stages.*'``. By default the blocks of a backbone of this
            package.
        kwargs: Of mmengine's ``DDPStrategy``, but for ``model_wrapper``.

    Raises:
        UsageError: ``model_wrapper`` is given.
    """

    def __init__(self, *, units: Sequence[str] | None = None, **kwargs: Any):
        if kwargs.get('model_wrapper') is not None:
            raise UsageError(
                'mmvssm.FSDPStrategy puts no wrapper around the model and takes no '
                "model_wrapper: give it units=['PATTERN', ...], the names of the "
                'modules to gather one by one, or nothing.'
            )
        super().__init__(**kwargs)
        self.units = units

    def _wrap_model(self, model: nn.Module) -> nn.Module:
        if isinstance(model, FSDPModule):
            return model
        model = self.convert_model(model)
        if self.units:
            blocks = find_units(model, self.units)
        else:
            blocks = find_blocks(model)
            # torch warns of views that blocks return, which might be changed in
            # place. In this package they are not.
            warnings.filterwarnings('ignore', 'FSDP2-wrapped .* returned a view')
        for module in model.modules():
            if isinstance(module, BaseDataPreprocessor):
                # It notes the device by itself.
                module.to(get_device())
        return shard(model, blocks)

    def build_optim_wrapper(
        self, optim_wrapper: BaseOptimWrapper | dict, model: nn.Module | None = None
    ) -> BaseOptimWrapper:
        """Build the optimizer of a model in shards.

        Its parameters have the shapes of the whole ones, by which constructors make
        their groups.

        Raises:
            UsageError: It was built before the model was sharded.
        """
        wrapper = super().build_optim_wrapper(optim_wrapper, model)
        groups = wrapper.optimizer.param_groups
        updated = {id(p) for group in groups for p in group['params']}
        if not updated <= {id(p) for p in model.parameters()}:
            raise UsageError(
                'mmvssm.FSDPStrategy builds the optimizer itself, of the shards: give '
                'it a config (a dict) in the place of a built optimizer.'
            )
        if getattr(wrapper, 'clip_func', None) is clip_grad_norm_:
            wrapper.clip_func = clip_whole_norm
        return wrapper

    def model_state_dict(self) -> dict:
        """State dict of the whole model on rank 0, empty on the others."""
        return get_model_state_dict(self.model, options=_WHOLE)

    def load_model_state_dict(self, state_dict: dict, **kwargs: Any) -> None:
        """Take over this process's shards of the state of a whole model."""
        own = self.model.state_dict()
        state_dict = state_dict.get('state_dict', state_dict)
        state = {
            name: _fit(value, own.get(name.removeprefix('module.')))
            for name, value in state_dict.items()
        }
        super().load_model_state_dict(state, **kwargs)

    def optim_state_dict(self) -> dict:
        """State of the whole optimizer on rank 0, as without shards."""
        wrapper = self.optim_wrapper
        # Its groups have the numbers already; and there may be a loss scale.
        state = wrapper.state_dict()
        if not state['state']:
            return state
        gathered = get_optimizer_state_dict(
            self.model, wrapper.optimizer, options=_WHOLE
        ).get('state', {})
        numbers = {name: number for number, name in enumerate(self._optimized())}
        return {
            **state,
            'state': {numbers[name]: value for name, value in gathered.items()},
        }

    def load_optim_state_dict(self, state_dict: dict) -> None:
        """Take over this process's shards of the state of a whole optimizer."""
        groups = self.optim_wrapper.optimizer.param_groups
        like = dict(enumerate(p for group in groups for p in group['params']))
        state = {
            # The count of steps is no shard.
            number: {key: _fit(value, like[number]) for key, value in values.items()}
            for number, values in state_dict['state'].items()
        }
        self.optim_wrapper.load_state_dict({**state_dict, 'state': state})

    def whole_state(self, optimizer: bool = True, schedulers: bool = True) -> dict:
        """What a checkpoint has of model, optimizer and schedulers; whole on rank 0.

        All ranks must call it.
        """
        state = dict(state_dict=self.model_state_dict())
        if optimizer and hasattr(self, 'optim_wrapper'):
            state['optimizer'] = self.optim_state_dict()
        if schedulers and hasattr(self, 'param_schedulers'):
            state['param_schedulers'] = self.scheduler_state_dict()
        return state

    def save_checkpoint(
        self,
        filename: str,
        *,
        save_optimizer: bool = True,
        save_param_scheduler: bool = True,
        extra_ckpt: dict | None = None,
        callback: Callable[[dict], None] | None = None,
    ) -> None:
        """Gather all shards on rank 0 and save, as ``DDPStrategy`` does.

        All ranks must call it.
        """
        state = self.whole_state(save_optimizer, save_param_scheduler)
        state.update(extra_ckpt or {})
        state['meta'] = {
            **state.get('meta', {}),
            'seed': self.seed,
            'time': time.strftime('%Y%m%d_%H%M%S'),
            'mmengine': mmengine.__version__,
        }
        if callback is not None:
            callback(state)
        if is_main_process():
            save_checkpoint(state, filename)

    def resume(self, filename: str, **kwargs: Any) -> dict:
        """Read the whole checkpoint into the CPU's memory, not the GPU's."""
        return super().resume(filename, **{**kwargs, 'map_location': 'cpu'})

    def _optimized(self) -> list[str]:
        """Names of the parameters in the order of the optimizer."""
        names = {id(p): name for name, p in self.model.named_parameters()}
        groups = self.optim_wrapper.optimizer.param_groups
        return [names[id(p)] for group in groups for p in group['params']]


def shard(model: nn.Module, units: Sequence[nn.Module]) -> nn.Module:
    """Shard a model over all processes, in place.

    Args:
        model: Its ``forward`` must be called through the model itself.
        units: Modules within it that are gathered one by one. The rest of the model is
            one unit more.

    Returns:
        The model, of a class with torch's ``FSDPModule`` among its bases.
    """
    device = torch.device(get_device())
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for unit in units:
        _share(unit, device)
        fully_shard(unit, mesh=mesh, reshard_after_forward=True)
    _share(model, device)
    fully_shard(model, mesh=mesh, reshard_after_forward=False)
    return model


def _share(module: nn.Module, device: torch.device) -> None:
    """Move what is not in shards yet to the device, with the values of rank 0."""
    for value in (*module.parameters(), *module.buffers()):
        if not isinstance(value, DTensor):
            value.data = value.data.to(device).contiguous()
            dist.broadcast(value.data, 0)


def _fit(value: Any, like: torch.Tensor | None) -> Any:
    """A shard of what all processes have whole, if it is as large as ``like`` is.

    What is not is left as it is, for others to report.
    """
    tensors = isinstance(value, torch.Tensor) and isinstance(like, DTensor)
    if not tensors or value.shape != like.shape:
        return value
    value = value.to(like.device, like.dtype)
    # Without talking: all have it.
    return distribute_tensor(
        value, like.device_mesh, like.placements, src_data_rank=None
    )


def clip_whole_norm(
    parameters: Iterable[torch.Tensor],
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> torch.Tensor:
    """``torch.nn.utils.clip_grad_norm_`` of gradients in shards.

    Returns:
        The norm of all gradients, a plain tensor and the same in all processes.
    """
    parameters = list(parameters)
    grads = [p.grad for p in parameters if p.grad is not None]
    norm = get_total_norm(grads, norm_type, error_if_nonfinite, foreach)
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    clip_grads_with_norm_(parameters, max_norm, norm, foreach)
    return norm


class WholeWeightsHook(Hook):
    """Validate with the whole weights on every process.

    The number of windows an image is predicted in goes by its size. Processes
    that gathered each unit's weights for each window would wait for windows that
    the others do not have.
    """

    # The first to come, and the first to go: others save checkpoints.
    priority = 'HIGHEST'

    def _before_epoch(self, runner: Any, mode: str = 'train') -> None:
        if mode != 'train':
            self.weights = whole_weights(runner.model)
            self.weights.__enter__()

    def _after_epoch(self, runner: Any, mode: str = 'train') -> None:
        if mode != 'train':
            self.weights.__exit__(None, None, None)


@contextmanager
def whole_weights(model: nn.Module) -> Iterator[None]:
    """Have the whole weights in a sharded model, and run it without talking.

    All processes must enter and leave together; what each does in between is its
    own business. Other models are left alone.

    Args:
        model: The outermost module.
    """
    if not isinstance(model, FSDPModule):
        yield
        return
    units = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for unit in units:
        unit.set_reshard_after_forward(False, recurse=False)
        unit.unshard()
    try:
        yield
    finally:
        for unit in units:
            unit.set_reshard_after_forward(unit is not model, recurse=False)
            unit.reshard()


def class_name(module: nn.Module) -> str:
    """Name of a module's class as it was before it was sharded."""
    kind = type(module)
    if isinstance(module, FSDPModule):
        kind = next(base for base in kind.__mro__[1:] if base is not FSDPModule)
    return kind.__name__


def find_blocks(model: nn.Module) -> list[nn.Module]:
    """The blocks of the model's backbone.

    Raises:
        UsageError: The backbone is not of this package.
    """
    layers = getattr(getattr(model, 'backbone', None), 'layers', None)
    if not isinstance(layers, nn.ModuleList):
        raise UsageError(
            f'{type(model).__name__} has no backbone of this package: say in '
            "strategy.units which modules to gather one by one, such as ['backbone."
            "stages.*']."
        )
    return [block for layer in layers for block in getattr(layer, 'blocks', [layer])]


def find_units(model: nn.Module, patterns: Sequence[str]) -> list[nn.Module]:
    """The modules whose names match, each part of a name by itself.

    Raises:
        UsageError: A pattern matches none, or a module lies within another.
    """
    found: dict[str, nn.Module] = {}
    for pattern in patterns:
        parts = pattern.split('.')
        matching = {
            name: module
            for name, module in model.named_modules()
            if name.count('.') == len(parts) - 1
            and all(map(fnmatch, name.split('.'), parts))
        }
        if not matching:
            raise UsageError(f'strategy.units: no module of the model is {pattern!r}.')
        found |= matching
    for outer in found:
        for inner in found:
            if inner.startswith(f'{outer}.'):
                raise UsageError(f'strategy.units: {inner} lies within {outer}.')
    return list(found.values())
