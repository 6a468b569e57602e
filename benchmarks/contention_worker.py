"""A process of ``contention.py``: a training, or with the argument ``hog`` a busy loop.

A training reads tasks and answers with times. Each line that comes in and goes out is
JSON. The first one says what to train. Each later one asks for a number of steps,
unless the training is to go on for ever.
"""

import ctypes
import json
import os
import signal
import sys
import time
import warnings
from typing import TextIO

_PR_SET_PDEATHSIG = 1


def hog() -> None:
    """Keep a processor busy."""
    parent = os.getppid()
    sys.stdin.readline()
    _say(sys.stdout, {})
    while os.getppid() == parent:
        for _ in range(1_000_000):
            pass


def end_with_parent() -> None:
    """Let the system end this process, also while it is stopped (Linux)."""
    if sys.platform == 'linux':
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def train() -> None:
    """Build the model and take steps until nobody asks any more."""
    answers = os.fdopen(os.dup(1), 'w')
    # What libraries print must not be taken for an answer.
    os.dup2(2, 1)
    warnings.simplefilter('ignore')
    parent = os.getppid()
    task = json.loads(sys.stdin.readline())

    import machines
    import torch
    from mmengine.optim import build_optim_wrapper
    from training_memory import build_model, random_batch

    if task['threads']:
        torch.set_num_threads(task['threads'])
    cfg, model = build_model(task['config'], task['options'])
    wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
    batch = random_batch(cfg)

    def step() -> float:
        start = time.perf_counter()
        model.train_step(batch, wrapper)
        return time.perf_counter() - start

    step()
    facts = dict(threads=torch.get_num_threads(), variables=machines.variables())
    _say(answers, facts)
    while task['forever'] and os.getppid() == parent:
        step()
    for line in sys.stdin:
        # The first one finds caches and processors as others left them.
        step()
        seconds = [step() for _ in range(json.loads(line)['steps'])]
        _say(answers, dict(seconds=seconds))


def _say(answers: TextIO, found: dict) -> None:
    answers.write(json.dumps(found) + '\n')
    answers.flush()


if __name__ == '__main__':
    end_with_parent()
    if sys.argv[1:] == ['hog']:
        hog()
    else:
        # Before torch, as in the tools: what it sets there counts here, too.
        from mmvssm.engine import run_tool

        run_tool(train)
