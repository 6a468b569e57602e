"""Test without the logits of all classes at full size, where nothing reads them."""

from collections.abc import Callable, Iterable
from typing import Any

from mmengine.hooks import Hook
from mmengine.runner import Runner

from mmvssm.engine.inference.labels_only import leave_out_logits
from mmvssm.registry import HOOKS

# Their metrics, hooks and visualizers read no logits.
_KNOWN = ('mmengine', 'mmseg', 'mmdet', 'mmvssm')
# What a hook has instead of one method for each kind of loop.
_EVERY = '_after_iter'


@HOOKS.register_module()
class LabelsOnlyHook(Hook):
    """Validate and test a segmentor by its labels alone.

    The labels are the same; ``seg_logits`` are not in the predictions, see
    :func:`mmvssm.engine.labels_only`. Where a metric, a hook or the visualizer is of
    another package than mmseg, mmengine or this one, it may read them: then all stays
    as mmseg does it.
    """

    def __init__(self) -> None:
        self._undo: Callable[[], None] | None = None

    def before_val(self, runner: Runner) -> None:
        """Leave the logits out, if nothing reads them."""
        self._start(runner, runner.val_loop, 'after_val_iter')

    def after_val(self, runner: Runner) -> None:
        """Give them back."""
        self._end()

    def before_test(self, runner: Runner) -> None:
        """Leave the logits out, if nothing reads them."""
        self._start(runner, runner.test_loop, 'after_test_iter')

    def after_test(self, runner: Runner) -> None:
        """Give them back."""
        self._end()

    def _start(self, runner: Runner, loop: Any, method: str) -> None:
        self._end()
        evaluator = getattr(loop, 'evaluator', None)
        parts = [loop, runner.visualizer, evaluator, *getattr(evaluator, 'metrics', ())]
        hooks = map(type, runner.hooks)
        methods = [getattr(hook, name) for hook in hooks for name in (method, _EVERY)]
        if _all_known([*map(type, parts), *methods]):
            self._undo = leave_out_logits(runner.model)

    def _end(self) -> None:
        if self._undo is not None:
            self._undo()
        self._undo = None


def _all_known(readers: Iterable[Any]) -> bool:
    return all(reader.__module__.split('.')[0] in _KNOWN for reader in readers)
