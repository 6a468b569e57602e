"""What ``randomness=dict(deterministic=True)`` costs on the CPU.

    python benchmarks/deterministic.py

takes training steps of a segmentor of each family, on two random images and one
thread: loss, gradients, new weights. Steps with and without torch's deterministic
algorithms take turns, timed by the processor's clock. The result is
``benchmarks/results/deterministic.json``. What it costs on a GPU is not measured.
"""

import argparse
import json
from pathlib import Path

HERE = Path(__file__).resolve().parent
CONFIGS = ('upernet_vmamba_t', 'upernet_vim_t', 'upernet_mambar_s', 'upernet_mlla_t')


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--size', type=int, default=64, help='of the images')
    parser.add_argument('--rounds', type=int, default=9, help='turns of each')
    parser.add_argument('--out', default=str(HERE / 'results/deterministic.json'))
    return parser.parse_args()


def compare(name: str, size: int, rounds: int) -> dict:
    """Seconds of processor time of a step either way."""
    from time import process_time

    import torch
    from mmengine.model import revert_sync_batchnorm
    from mmengine.optim import OptimWrapper
    from mmengine.registry import MODELS, init_default_scope
    from training_memory import random_batch

    from mmvssm import engine
    from mmvssm.analysis.measuring.timing import Effort, interleaved

    cfg = engine.load_config(str(HERE.parent / f'configs/{name}.py'))
    cfg.model.data_preprocessor.size = (size, size)
    cfg.train_dataloader.batch_size = 2
    init_default_scope('mmseg')
    torch.manual_seed(0)
    model = revert_sync_batchnorm(MODELS.build(cfg.model))
    wrapper = OptimWrapper(torch.optim.AdamW(model.parameters(), lr=1e-5))
    batch = random_batch(cfg)

    def step(deterministic: bool) -> float:
        torch.use_deterministic_algorithms(deterministic)
        start = process_time()
        model.train_step(batch, wrapper)
        return process_time() - start

    times = interleaved(
        {mode: lambda mode=mode: step(mode) for mode in (False, True)},
        Effort(rounds=rounds, limit=600),
    )
    seconds = {mode: times[mode]['median'] for mode in times}
    return dict(
        usual_s=seconds[False],
        deterministic_s=seconds[True],
        ratio=seconds[True] / seconds[False],
        calls=times[True]['calls'],
    )


def main() -> None:
    """Measure, print and write."""
    import torch

    args = parse_args()
    torch.set_num_threads(1)
    results = dict(size=args.size, torch=torch.__version__, steps={})
    for name in CONFIGS:
        found = compare(name, args.size, args.rounds)
        results['steps'][name] = found
        print(f'{name:20} {found["usual_s"]:.3f} s, x {found["ratio"]:.3f}', flush=True)
    Path(args.out).write_text(json.dumps(results, indent=1) + '\n')


if __name__ == '__main__':
    main()
