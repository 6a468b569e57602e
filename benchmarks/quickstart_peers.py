"""VMamba against mmseg's Swin on the quickstart's data.

Both backbones have the same number of parameters and train with the
quickstart's heads, data, schedule and seeds. Each may choose its learning
rate: the one that does best, by the median over the seeds, counts.

    python benchmarks/quickstart_peers.py

writes ``benchmarks/results/quickstart_peers.json``.
"""

import argparse
import itertools
import json
import statistics
import time
from pathlib import Path

from mmengine.config import Config

HERE = Path(__file__).resolve().parent
CONFIG = HERE.parent / 'configs/upernet_vmamba_quickstart.py'
# Patches, pyramid and heads are those of the quickstart's VSSM. Windows of 8
# divide its maps of 32, 16 and 8 positions a side; the last stage has 4.
SWIN = dict(
    type='SwinTransformer',
    pretrain_img_size=128,
    patch_norm=True,
    window_size=8,
    mlp_ratio=4,
    qkv_bias=True,
    drop_path_rate=0.0,
    out_indices=(0, 1, 2, 3),
)
PEERS = {
    'vmamba': None,
    'swin': dict(SWIN, embed_dims=32, depths=(2, 2, 3, 1), num_heads=(1, 2, 4, 8)),
}


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--seeds', type=int, nargs='+', default=[0])
    parser.add_argument('--lrs', type=float, nargs='+', default=[1e-3, 3e-3])
    parser.add_argument('--peers', nargs='+', choices=PEERS, default=list(PEERS))
    parser.add_argument('--work-dir', default='work_dirs/quickstart_peers')
    parser.add_argument('--out', default=str(HERE / 'results/quickstart_peers.json'))
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        metavar='KEY=VALUE',
        help='override config entries of all peers',
    )
    return parser.parse_args()


def peer_config(args: argparse.Namespace, name: str, lr: float, seed: int) -> Config:
    """The quickstart's config with another backbone, learning rate and seed."""
    from mmvssm import engine

    work_dir = str(Path(args.work_dir, f'{name}_lr{lr:g}_seed{seed}'))
    cfg = engine.load_config(str(CONFIG), args.cfg_options, work_dir)
    engine.check_datasets(cfg)
    if PEERS[name]:
        cfg.model.backbone = dict(PEERS[name])
    cfg.optim_wrapper.optimizer.lr = lr
    cfg.randomness = dict(seed=seed)
    return cfg


def train(cfg: Config) -> dict:
    """Train and evaluate one peer."""
    from mmengine.runner import Runner

    runner = Runner.from_cfg(cfg)
    start = time.perf_counter()
    runner.train()
    seconds = time.perf_counter() - start
    count = sum(p.numel() for p in runner.model.backbone.parameters())
    return dict(
        mIoU=float(runner.test()['mIoU']),
        seconds=round(seconds, 1),
        backbone_parameters=count,
        iterations=cfg.train_cfg.max_iters,
    )


def best_learning_rate(runs: list[dict], name: str) -> dict:
    """The learning rate with the highest median mIoU over the seeds."""
    mine = [run for run in runs if run['peer'] == name]
    medians = {
        lr: statistics.median(run['mIoU'] for run in mine if run['lr'] == lr)
        for lr in {run['lr'] for run in mine}
    }
    lr = max(medians, key=medians.get)
    return dict(
        lr=lr, mIoU=medians[lr], backbone_parameters=mine[0]['backbone_parameters']
    )


def main(args: argparse.Namespace) -> None:
    """Train all peers in turn, seed by seed, and compare them."""
    from mmvssm.collect_env import collect_env

    runs = []
    for seed, lr, name in itertools.product(args.seeds, args.lrs, args.peers):
        found = train(peer_config(args, name, lr, seed))
        runs.append(dict(peer=name, lr=lr, seed=seed, **found))
    best = {name: best_learning_rate(runs, name) for name in args.peers}
    result = dict(environment=collect_env(), best=best, runs=runs)
    out = Path(args.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=2) + '\n')
    for name, found in best.items():
        print(
            f'{name:8} {found["backbone_parameters"] / 1e6:.2f} M parameters, mIoU '
            f'{found["mIoU"]:.2f} (median of {len(args.seeds)}) at lr {found["lr"]:g}'
        )
    print(f'written to {out}')


if __name__ == '__main__':
    arguments = parse_args()
    from mmvssm.engine import run_tool

    run_tool(lambda: main(arguments))
