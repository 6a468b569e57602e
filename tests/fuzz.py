"""Spoil checkpoints and configs at random: ``python tests/fuzz.py 10000``.

Each must either be used as what it holds, or end in one of this package's errors,
with the model as it was. A case that does not is printed with its number, which
``--only`` runs alone. The exit code is 1 if there was one. Linux only.
"""

import argparse
import collections
import faulthandler
import logging
import random
import resource
import signal
import sys
import tempfile
import traceback
import warnings
from pathlib import Path

import torch
from mmengine.runner.checkpoint import CheckpointLoader

import mmvssm
from fuzz_configs import check_config
from fuzz_files import FORMATS, MODELS, make_case
from mmvssm.checkpoints import CheckpointError, convert, save_checkpoint
from mmvssm.engine import UsageError, check_load_from, load_weights
from mmvssm.engine.checkpoints.files import check_training_state
from mmvssm.engine.checkpoints.loaders import safely

# Not a measurement: what takes so long hangs.
SECONDS = 60
# A file of some 100 kB has no use for more.
MEMORY = 12 * 2**30


class WrongError(AssertionError):
    """The case was taken, and the model is not what the file says."""


class Fuzzer:
    """Models and files, made once."""

    def __init__(self, folder):
        self.folder, self.now = Path(folder), ''
        self.models, self.states, self.before = {}, {}, {}
        for name, (build, published) in MODELS.items():
            torch.manual_seed(0)
            self.models[name] = build()
            self.states[name] = published(build())
            self.before[name] = copy_state(self.models[name])

    def run(self, number):
        """Run a case; its kind and how it ended."""
        rng = random.Random(number)
        if rng.random() < 0.2:
            return check_config(rng, self.folder, self.say)
        name = rng.choice(sorted(MODELS))
        form = rng.choice(FORMATS)
        torch.manual_seed(number)
        case = make_case(rng, self.states[name], form)
        suffix = '.safetensors' if form == 'safetensors' else '.pth'
        path = self.folder / f'case{suffix}'
        path.write_bytes(case.content)
        use = rng.choice((self.load, self.load, self.load, self.weights, self.others))
        self.say(f'{name}, {form}, {use.__name__}: {case.how}')
        try:
            use(name, path, case, rng)
        except (CheckpointError, UsageError):
            if not same(copy_state(self.models[name]), self.before[name]):
                raise WrongError('refused, and loaded in part') from None
            return form, 'refused'
        finally:
            self.models[name].load_state_dict(self.before[name])
        return form, 'taken'

    def say(self, what):
        self.now = what

    def load(self, name, path, case, rng):
        model = self.models[name]
        report = mmvssm.load_checkpoint(model, path)
        self.check(name, case, set(report.missing), set(report.matched), report.notes)

    def weights(self, name, path, case, rng):
        check_load_from(self.models[name], str(path))
        load_weights(self.models[name], str(path))
        names = set(self.before[name])
        self.check(name, case, set(), names, ['classifiers keep their names'])

    def others(self, name, path, case, rng):
        use = rng.choice(('convert', 'training state', 'mmengine'))
        if use == 'convert':
            target = self.folder / rng.choice(('out.pth', 'out.safetensors'))
            save_checkpoint(convert(path), target)
            convert(target)
        elif use == 'training state':
            check_training_state(path)
        else:
            CheckpointLoader.load_checkpoint(safely(str(path)), 'cpu', logger='silent')

    def check(self, name, case, missing, matched, notes):
        now, before = self.models[name].state_dict(), self.before[name]
        if missing | matched != set(now):
            raise WrongError('a name is neither missing nor matched')
        for key, value in now.items():
            if key in missing:
                if not same_bits(value, before[key]):
                    raise WrongError(f'{key} is missing, and changed')
            # Position embeddings are resized, and class tokens cut out of them.
            elif not (notes and 'pos_embed' in key) and not explained(value, case):
                raise WrongError(f'{key} is nothing that the file holds')


def copy_state(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


def same(a, b):
    return all(same_bits(a[key], b[key]) for key in b)


def same_bits(a, b):
    a, b = a.contiguous().view(-1), b.contiguous().view(-1)
    return torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def explained(value, case):
    """Whether the file has this tensor, but for bytes that were changed in it."""
    flat = value.contiguous().view(-1)
    least = flat.numel() * flat.element_size()
    for tensor in case.tensors:
        if tensor.numel() != flat.numel() or tensor.device.type == 'meta':
            continue
        if tensor.layout != torch.strided or tensor.is_quantized:
            continue
        taken = tensor.detach().to(flat.dtype).reshape(-1)
        differ = flat.view(torch.uint8) != taken.contiguous().view(torch.uint8)
        least = min(least, int(differ.sum()))
    return least <= case.changed


def too_slow(*_):
    raise TimeoutError(f'takes more than {SECONDS} s')


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('cases', type=int, nargs='?', default=10000)
    parser.add_argument('--seed', type=int, default=0, help='number of the first')
    parser.add_argument('--only', type=int, metavar='NUMBER')
    args = parser.parse_args()
    warnings.simplefilter('ignore')
    logging.disable(logging.INFO)  # What was loaded.
    faulthandler.enable()
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, hard))
    signal.signal(signal.SIGALRM, too_slow)
    numbers = range(args.seed, args.seed + args.cases)
    if args.only is not None:
        numbers = [args.only]
    ended, failed = collections.Counter(), 0
    with tempfile.TemporaryDirectory() as folder:
        fuzzer = Fuzzer(folder)
        # A crash leaves no other trace.
        progress = Path(folder).with_suffix('.case')
        for number in numbers:
            progress.write_text(str(number))
            signal.alarm(SECONDS)
            try:
                ended[fuzzer.run(number)] += 1
            except Exception:
                failed += 1
                print(f'case {number}: {fuzzer.now}')
                print(traceback.format_exc(limit=-6))
            finally:
                signal.alarm(0)
        progress.unlink()
    for (form, how), count in sorted(ended.items()):
        print(f'{form:12} {how:8} {count}')
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    print(f'{sum(ended.values()) + failed} cases, {failed} failed; peak {peak} MB')
    return 1 if failed else 0


if __name__ == '__main__':
    sys.exit(main())
