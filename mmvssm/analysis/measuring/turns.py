"""Models that take turns in one process, so that noise hits them all."""

import gc
import time
from dataclasses import asdict
from typing import Any

import torch
from torch import nn

from mmvssm.analysis.measuring import probe, process_memory
from mmvssm.analysis.measuring.steps import Case, Contender, make_step, weight_bytes
from mmvssm.analysis.measuring.timing import Effort, interleaved, reason


def measure(
    case: Case,
    who: list[Contender],
    effort: Effort,
    longest: float,
    memory: bool = True,
) -> dict[str, Any]:
    """Images a second and peak memory of all contenders in a case.

    Peak memory is that of a step: weights, activations, gradients and work arrays. On
    the CPU it is found out in a process for each contender, which also shows whether
    the step fits into memory and is fast enough. On a GPU it is what torch allocated.

    Args:
        case: What they do.
        who: The contenders.
        effort: How long to measure.
        longest: Seconds of a step after which a contender is left out.
        memory: Without it no memory is measured, and no process started.

    Returns:
        ``case``; ``contenders``, with ``images_per_second``, ``median``, ``fastest``,
        ``calls``, ``parameters`` and ``peak_bytes`` (where it is known) by name;
        ``left_out``, why others were left out.
    """
    if case.device == 'cpu':
        torch.set_num_threads(case.threads)
    if any(contender.compiled for contender in who):
        # Code for other sizes and threads.
        torch._dynamo.reset()
    found, left_out, steps = {}, {}, {}
    models: dict[tuple, nn.Module] = {}
    for contender in who:
        try:
            if memory and case.device == 'cpu':
                found[contender.name] = probe.probe(contender, case, longest)
            key = contender.model, contender.dtype
            if key not in models:
                models[key] = contender.build(case.size).to(case.device)
            step = make_step(models[key], case, contender)
            if contender.compiled:
                # Compiles, which may fail, and is no part of a turn.
                step()
            if not memory or case.device != 'cpu':
                found[contender.name] = _first_steps(models[key], case, step, longest)
        except Exception as error:
            unfit = isinstance(error, probe.Unfit)
            left_out[contender.name] = str(error) if unfit else reason(error)
            found.pop(contender.name, None)
            # A step that failed may have left gradients.
            for model in models.values():
                model.zero_grad(set_to_none=True)
            print(f'  left out: {contender.name}: {left_out[contender.name]}')
        else:
            steps[contender.name] = step
    for name, times in interleaved(steps, effort).items():
        found[name].update(times, images_per_second=case.batch / times['median'])
    # What this process holds, a probe cannot have.
    models.clear(), steps.clear(), gc.collect()
    if case.device == 'cpu':
        process_memory.give_back()
    elif torch.device(case.device).type == 'cuda':
        torch.cuda.empty_cache()
    return dict(case=asdict(case), contenders=found, left_out=left_out)


def _first_steps(model: nn.Module, case: Case, step: Any, longest: float) -> dict:
    """Take steps in this process, and count what torch allocates on a GPU."""
    found = dict(parameters=sum(p.numel() for p in model.parameters()))
    start = time.perf_counter()
    step()
    seconds = time.perf_counter() - start
    if seconds > longest:
        raise probe.Unfit(f'over {longest:g} s a step')
    if torch.device(case.device).type == 'cuda':
        torch.cuda.reset_peak_memory_stats(case.device)
        before = torch.cuda.memory_allocated(case.device)
        step()
        rise = torch.cuda.max_memory_allocated(case.device) - before
        found['peak_bytes'] = weight_bytes(model) + rise
    return found
