"""Training with weights, gradients and optimizer in shards, one a process (FSDP)."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from mmengine._strategy import FSDPStrategy as MMEngineFSDPStrategy
from mmengine.device import get_device
from mmengine.hooks import Hook
from mmengine.optim import BaseOptimWrapper, build_optim_wrapper
from mmengine.runner import Runner
from torch import nn
from torch.distributed.fsdp import (
    FullOptimStateDictConfig,
    FullStateDictConfig,
    StateDictType,
)
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.nn.utils import clip_grad_norm_

from mmvssm.engine.errors import UsageError
from mmvssm.registry import STRATEGIES

# What FSDP puts into the names of modules and parameters.
_WRAPPED = '._fsdp_wrapped_module'


@STRATEGIES.register_module()
class FSDPStrategy(MMEngineFSDPStrategy):
    """mmengine's ``FSDPStrategy`` for the models of this package.

    Every process holds its part of the weights, gradients and optimizer, and the
    whole weights of one block at a time, which is the unit that is gathered.
    Machines without an accelerator do it through gloo.

    - The optimizer's groups are made before the parameters are sharded: shards
      have no shape by which a constructor could tell a norm from a matrix.
    - Checkpoints are those of an unsharded training. They load in every tool, and
      a training may go on with or without shards and with another number of
      processes.
    - Clipping of gradients goes by the norm of the whole gradient.

    Attributes:
        whole_state: State dict of the model before it was sharded, without its data.

    Args:
        model_wrapper: Arguments of mmengine's ``MMFullyShardedDataParallel``. By
            default ``auto_wrap_policy`` makes a unit of each block of the backbone.
        kwargs: Of mmengine's ``FSDPStrategy``, which sets most of them itself.
    """

    def __init__(self, *, model_wrapper: dict | None = None, **kwargs: Any):
        model_wrapper = dict(model_wrapper or {})
        model_wrapper.setdefault('type', 'MMFullyShardedDataParallel')
        # Optimizers keep the parameters they were made with.
        model_wrapper['use_orig_params'] = True
        if get_device() == 'cpu':
            model_wrapper['device_id'] = torch.device('cpu')
        super().__init__(model_wrapper=model_wrapper, **kwargs)

    def _init_state_dict_cfg(self, state_dict_cfg: str | dict) -> None:
        """Checkpoints are whole, whatever is asked for, and made on rank 0."""
        # What is on the CPU already is not copied, and freed under one's hands.
        where = dict(rank0_only=True, offload_to_cpu=get_device() != 'cpu')
        self.state_dict_type = StateDictType.FULL_STATE_DICT
        self.state_dict_config = FullStateDictConfig(**where)
        self.optim_state_dict_config = FullOptimStateDictConfig(**where)

    def prepare(
        self,
        model: nn.Module | dict,
        *,
        optim_wrapper: BaseOptimWrapper | dict | None = None,
        **kwargs: Any,
    ) -> Any:
        """Build all parts and shard the model; see ``BaseStrategy.prepare``."""
        model = self.build_model(model)
        if isinstance(optim_wrapper, dict):
            if optim_wrapper.get('type') == 'AmpOptimWrapper':
                optim_wrapper = {'use_fsdp': True, **optim_wrapper}
            optim_wrapper = build_optim_wrapper(model, optim_wrapper)
        return super().prepare(model, optim_wrapper=optim_wrapper, **kwargs)

    def _wrap_model(self, model: nn.Module) -> nn.Module:
        self.whole_state = {k: v.to('meta') for k, v in model.state_dict().items()}
        if 'auto_wrap_policy' not in self.model_wrapper:
            self.model_wrapper['auto_wrap_policy'] = _units(find_blocks(model))
        return super()._wrap_model(self.convert_model(model))

    def build_optim_wrapper(
        self, optim_wrapper: BaseOptimWrapper, model: nn.Module | None = None
    ) -> BaseOptimWrapper:
        """Let the optimizer of the model as it was update the shards.

        Raises:
            RuntimeError: The wrapper has replaced the parameters.
        """
        groups = optim_wrapper.optimizer.param_groups
        updated = {id(p) for group in groups for p in group['params']}
        if not updated <= {id(p) for p in model.parameters()}:
            raise RuntimeError('FSDP has replaced parameters of the optimizer')
        if getattr(optim_wrapper, 'clip_func', None) is clip_grad_norm_:
            optim_wrapper.clip_func = lambda params, **kw: model.clip_grad_norm_(**kw)
        return optim_wrapper

    def model_state_dict(self) -> dict:
        """State dict of the whole model on rank 0, empty on the others."""
        state = super().model_state_dict()
        for name, value in state.items():
            # Without the attribute FSDP leaves on it, which would be saved, too.
            state[name] = value.detach()
        return state

    def optim_state_dict(self) -> dict:
        """State of the whole optimizer on rank 0, as without shards."""
        wrapper = self.optim_wrapper
        named = FSDP.optim_state_dict(self.model, wrapper.optimizer)
        if not named:
            return {}
        numbers = {name: i for i, name in enumerate(self._optimized())}
        state = {numbers[name]: value for name, value in named['state'].items()}
        # Its groups have the numbers already; and there may be a loss scale.
        return {**wrapper.state_dict(), 'state': state}

    def load_optim_state_dict(self, state_dict: dict) -> None:
        """Take over this process's shards of the state of a whole optimizer."""
        names = self._optimized()
        named = dict(
            state={names[i]: value for i, value in state_dict['state'].items()},
            param_groups=[
                {**group, 'params': [names[i] for i in group['params']]}
                for group in state_dict['param_groups']
            ],
        )
        optimizer = self.optim_wrapper.optimizer
        shards = FSDP.optim_state_dict_to_load(self.model, optimizer, named)
        self.optim_wrapper.load_state_dict({**state_dict, **shards})

    def resume(self, filename: str, **kwargs: Any) -> dict:
        """Read the whole checkpoint into the CPU's memory, not the GPU's."""
        return super().resume(filename, **{**kwargs, 'map_location': 'cpu'})

    def _optimized(self) -> list[str]:
        """Names of the parameters in the order of the optimizer."""
        groups = self.optim_wrapper.optimizer.param_groups
        return [self.id_to_name[id(p)] for group in groups for p in group['params']]


class WholeWeightsHook(Hook):
    """Validate with the whole weights on every process.

    The number of windows an image is predicted in goes by its size. Processes
    that gathered each block's weights for each window would wait for windows that
    the others do not have.
    """

    # The first to come, and the first to go: others save checkpoints.
    priority = 'HIGHEST'

    def _before_epoch(self, runner: Runner, mode: str = 'train') -> None:
        if mode != 'train':
            self.weights = whole_weights(runner.model)
            self.weights.__enter__()

    def _after_epoch(self, runner: Runner, mode: str = 'train') -> None:
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
    if not isinstance(model, FSDP):
        yield
        return
    units = FSDP.fsdp_modules(model)
    with FSDP.summon_full_params(model, writeback=False):
        for unit in units:
            unit.forward = unit.module.__call__
        try:
            yield
        finally:
            for unit in units:
                del unit.forward


def plain_name(name: str) -> str:
    """Name of a module or parameter as it is without FSDP."""
    return f'.{name}'.replace(_WRAPPED, '').removeprefix('.')


def find_blocks(model: nn.Module) -> list[nn.Module]:
    """The blocks of the model's backbone.

    Raises:
        UsageError: The backbone is not of this package.
    """
    layers = getattr(getattr(model, 'backbone', None), 'layers', None)
    if not isinstance(layers, nn.ModuleList):
        raise UsageError(
            f'{type(model).__name__} has no backbone of this package: say in '
            'strategy.model_wrapper.auto_wrap_policy what to shard.'
        )
    return [block for layer in layers for block in getattr(layer, 'blocks', [layer])]


def _units(modules: list[nn.Module]) -> Callable[..., bool]:
    """FSDP's policy that wraps these modules."""
    wrapped = {id(module) for module in modules}

    def policy(module: nn.Module, recurse: bool, nonwrapped_numel: int) -> bool:
        return recurse or id(module) in wrapped

    return policy
