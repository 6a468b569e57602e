"""Make a small data set, train a small model on it, and show its predictions.

The model is a VMamba-UperNet, or that of another ``configs/*_quickstart.py``.
Everything runs on the CPU, in minutes. The tool first measures how fast the machine is,
and trains for as many iterations as fit into these minutes: one of the numbers in the
config (``schedules``). ``--iterations`` fixes the number. The same number of iterations
gives the same model on every machine of a kind.

If you run it again, it continues from the latest checkpoint in the work dir; if the
training is finished, it only shows the results. Delete the work dir to start from the
beginning.
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
        '--iterations',
        type=int,
        metavar='N',
        help='train for N iterations, however fast the machine is',
    )
    parser.add_argument(
        '--cfg-options', nargs='+', metavar='KEY=VALUE', help='override config entries'
    )
    return parser.parse_args()


def main(args: argparse.Namespace) -> None:
    """Make the data, train, evaluate, draw."""
    from mmengine.fileio import dump

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
    engine.lock_work_dir(cfg)
    set_schedule(cfg, args.iterations)
    # So that it can be interrupted and started again.
    engine.enable_resume(cfg)
    engine.check_inputs(cfg, weights)
    runner = engine.build_runner(cfg)
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
    with engine.labels_only(runner.model):
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


def set_schedule(cfg, iterations: int | None) -> None:
    """Choose for how many iterations to train, unless that is known, and say it."""
    from mmvssm import engine

    work_dir = Path(cfg.work_dir)
    begun = work_dir / Path(cfg.filename).name
    if iterations is not None:
        engine.set_iterations(cfg, iterations)
    elif (work_dir / 'last_checkpoint').is_file() and begun.is_file():
        # Its learning rates are those of a training of this length.
        length = engine.load_config(str(begun)).train_cfg.max_iters
        engine.set_iterations(cfg, length)
    elif cfg.train_cfg.max_iters in cfg.schedules:
        seconds = engine.measure_iteration(cfg)
        fitting = [n for n in cfg.schedules if n * seconds <= cfg.training_seconds]
        engine.set_iterations(cfg, max(fitting, default=min(cfg.schedules)))
        number = cfg.train_cfg.max_iters
        print(
            f'\nAn iteration takes {seconds:.2f} s on this machine. The training has '
            f'{number} iterations and takes about {number * seconds / 60:.1f} min. '
            f'(Of {", ".join(map(str, cfg.schedules))} iterations, the most that take '
            f'{cfg.training_seconds / 60:.0f} min. --iterations chooses another '
            'number.)\n'
        )


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
