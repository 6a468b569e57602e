"""Train a segmentor or detector: ``python tools/train.py configs/NAME.py``."""

import argparse
import os
import signal
import sys
import threading


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', help='a file, or mmvssm::NAME.py')
    parser.add_argument(
        '--work-dir',
        help='folder for logs and checkpoints (default: work_dirs/NAME of the config)',
    )
    parser.add_argument(
        '--resume',
        nargs='?',
        const='auto',
        metavar='CHECKPOINT',
        help='continue from this checkpoint; without a file, or with "auto", '
        'from the newest one in the work dir',
    )
    parser.add_argument(
        '--pretrained',
        metavar='CHECKPOINT',
        help="start from these weights of the backbone instead of the config's: a "
        'file, an address, mmvssm://NAME or hf://OWNER/REPOSITORY/FILE',
    )
    parser.add_argument(
        '--from-scratch',
        action='store_true',
        help='start from random weights, whatever the config names',
    )
    parser.add_argument(
        '--weights',
        choices=('raw', 'ema'),
        help='of a file with both, start from the raw or the averaged weights '
        '(default: those that the published figures belong to)',
    )
    parser.add_argument(
        '--amp',
        nargs='?',
        const='bfloat16',
        metavar='DTYPE',
        choices=('bfloat16', 'float16'),
        help='mixed precision: bfloat16 (default, recommended, any device) '
        'or float16 (GPU, dynamic loss scale)',
    )
    parser.add_argument(
        '--trust-checkpoint',
        action='store_true',
        help='run code that the checkpoint contains; only for files of your own',
    )
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        metavar='KEY=VALUE',
        help='override config entries, e.g. train_dataloader.batch_size=4',
    )
    parser.add_argument(
        '--launcher',
        default='none',
        choices=('none', 'pytorch', 'slurm', 'mpi'),
        help='job launcher',
    )
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0)
    args = parser.parse_args()
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    return args


def exit_when_told_to_stop() -> None:
    """Exit on the signals of PreemptionHook, with its exit code, until it takes over.

    A training may need minutes to start. Until then there is nothing to save, and the
    training should be started again.
    """

    def leave(*_: object) -> None:
        work_dir = sys.modules.get('mmvssm.engine.launching.work_dir')
        if hasattr(work_dir, 'release_work_dirs'):
            work_dir.release_work_dirs()
        # No other clean-up, which could wait for processes that have ended.
        os._exit(75)

    for name in {'SIGTERM', 'SIGUSR1'} & set(dir(signal)):
        signal.signal(getattr(signal, name), leave)

    def watch() -> None:
        while number := os.read(told, 1):
            if signal.getsignal(number[0]) is leave:
                leave()

    # Python calls a handler between two steps of its own. Where it waits in compiled
    # code, such as for another process, only a thread can end it.
    told, tell = os.pipe()
    os.set_blocking(tell, False)
    signal.set_wakeup_fd(tell, warn_on_full_buffer=False)
    os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))
    threading.Thread(target=watch, daemon=True).start()


def main(args: argparse.Namespace) -> None:
    """Train."""
    from mmvssm import engine

    cfg = engine.load_config(
        args.config,
        args.cfg_options,
        args.work_dir,
        required=('model', 'train_dataloader', 'train_cfg', 'optim_wrapper'),
    )
    if args.amp:
        engine.enable_amp(cfg, args.amp)
    weights = engine.choose_start(
        cfg, args.pretrained, args.from_scratch, args.weights, args.resume
    )
    if args.resume:
        engine.enable_resume(cfg, None if args.resume == 'auto' else args.resume)
    if args.trust_checkpoint:
        engine.trust_checkpoints(cfg)
    if cfg.get('load_from'):
        engine.require_file(cfg.load_from, 'checkpoint')
    engine.check_inputs(cfg, weights)
    engine.prepare_launch(cfg, args.launcher)
    engine.lock_work_dir(cfg)
    runner = engine.build_runner(cfg)
    engine.announce_start(cfg, weights)
    engine.probe_model(runner)
    engine.check_labels(cfg)
    if cfg.get('load_from') and not cfg.get('resume'):
        engine.check_load_from(runner.model, cfg.load_from)
    engine.check_gpu(runner)
    runner.train()


if __name__ == '__main__':
    arguments = parse_args()
    exit_when_told_to_stop()
    from mmvssm.engine import run_tool

    run_tool(lambda: main(arguments))
