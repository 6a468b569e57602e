"""Make a small data set, train a small model on it, and show its predictions.

The model is a VMamba-UperNet, or that of another ``configs/*_quickstart.py``.
Everything runs on the CPU, in minutes. If you run it again, it continues from the
latest checkpoint in the work dir; if the training is finished, it only shows the
results. Delete the work dir to start from the beginning.
"""

import argparse
import os
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
CONFIG = REPOSITORY / 'configs/upernet_vmamba_quickstart.py'


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--config', default=str(CONFIG))
    parser.add_argument(
        '--work-dir',
        help='default: work_dirs/quickstart, or with --config work_dirs/NAME',
    )
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        metavar='KEY=VALUE',
        help='override config entries, e.g. train_cfg.max_iters=100',
    )
    return parser.parse_args()


def main(args: argparse.Namespace) -> None:
    """Make the data, train, evaluate, draw."""
    from mmengine.fileio import dump
    from mmengine.runner import Runner

    from mmvssm import engine

    work_dir = args.work_dir
    if work_dir is None and args.config == str(CONFIG):
        work_dir = 'work_dirs/quickstart'
    cfg = engine.load_config(args.config, args.cfg_options, work_dir)
    if 'generator' not in cfg:
        raise engine.UsageError(
            f'{args.config} does not train on the data set that is made here; only '
            'configs/*_quickstart.py do. Use tools/train.py.'
        )
    data_root = cfg.train_dataloader.dataset.data_root
    make_data(data_root, cfg.generator)
    weights = engine.choose_start(cfg, resume='auto')
    # So that it can be interrupted and started again.
    engine.enable_resume(cfg)
    engine.check_inputs(cfg, weights)
    runner = Runner.from_cfg(cfg)
    engine.announce_start(cfg, weights)
    runner.train()
    metrics = runner.test()

    work_dir = Path(cfg.work_dir)
    dump(metrics, work_dir / 'metrics.json', indent=2)
    detects = engine.is_detector(cfg)
    if detects:
        from mmvssm.analysis.detection_sheet import write_detector_sheet as write_sheet
    else:
        from mmvssm.analysis.contact_sheet import (
            write_model_contact_sheet as write_sheet,
        )
    dataset = runner.test_dataloader.dataset
    sheet = write_sheet(work_dir / 'contact_sheet.png', runner.model, dataset)
    checkpoint = os.path.relpath((work_dir / 'last_checkpoint').read_text().strip())
    config, python = os.path.relpath(args.config), os.path.relpath(sys.executable)
    images = 'val2017' if detects else 'images/validation'
    full = 'mask_rcnn_vmamba_t_1x' if detects else 'upernet_vmamba_t'
    print(f"""
{summarise(metrics)} on {len(dataset)} held-out images

  pictures    {sheet}
  metrics     {work_dir / 'metrics.json'}
  checkpoint  {checkpoint}

Next:
  {'find objects in' if detects else 'segment'} pictures of your own
    {python} tools/infer.py {min(Path(data_root, images).iterdir())} \\
        --config {config} --checkpoint {checkpoint} --out-dir {work_dir / 'infer'}
  train on {'COCO' if detects else 'ADE20K'} (the README says how to lay it out)
    {python} tools/train.py configs/{full}.py
""")


def summarise(metrics: dict) -> str:
    """The most important figures."""
    if 'mIoU' in metrics:
        return f'mIoU {metrics["mIoU"]:.2f}'
    boxes, masks = (metrics[f'coco/{kind}_mAP_50'] for kind in ('bbox', 'segm'))
    return f'box AP50 {boxes:.3f}, mask AP50 {masks:.3f}'


def make_data(root: str, settings: dict) -> None:
    """Make the data set with a progress bar, if it does not exist yet."""
    from functools import partial

    from mmvssm.datasets import make_quickstart_dataset
    from mmvssm.engine import UsageError

    try:
        from tqdm import tqdm

        make_quickstart_dataset(
            root, **settings, progress=partial(tqdm, desc='making images', unit='image')
        )
    except (FileExistsError, ImportError, ValueError) as error:
        raise UsageError(str(error)) from error


if __name__ == '__main__':
    arguments = parse_args()
    from mmvssm.engine import run_tool

    run_tool(lambda: main(arguments))
