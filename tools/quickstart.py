"""Make a small data set, train a small model on it, and show its predictions.

The model is a VMamba-UperNet, or that of another ``configs/*_quickstart.py`` or
``configs/classification/*_quickstart.py``.
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
from typing import NamedTuple

REPOSITORY = Path(__file__).resolve().parent.parent
CONFIG = REPOSITORY / 'configs/upernet_vmamba_quickstart.py'


class Task(NamedTuple):
    """What the tool says of a kind of models.

    Attributes:
        does: What a model does with pictures.
        images: Where the held-out images are, in the data's folder.
        data: Name of the data set that the published models of this kind train on.
        config: The config of such a model.
        page: The page of the docs on these.
    """

    does: str
    images: str
    data: str
    config: str
    page: str


SEGMENTATION = Task(
    *('segment', 'images/validation/*', 'ADE20K'),
    *('configs/upernet_vmamba_t.py', 'docs/segmentation.md'),
)
DETECTION = Task(
    *('find objects in', 'val2017/*', 'COCO'),
    *('configs/mask_rcnn_vmamba_t_1x.py', 'docs/detection.md'),
)
CLASSIFICATION = Task(
    *('classify', 'val/*/*', 'ImageNet'),
    *('configs/classification/vmamba_t_s1l8_in1k.py', 'docs/classification.md'),
)


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--config', default=str(CONFIG))
    parser.add_argument(
        '--work-dir',
        help='default: work_dirs/quickstart, or with --config work_dirs/NAME; with '
        '--pretrained, _pretrained is added',
    )
    parser.add_argument(
        '--iterations',
        type=int,
        metavar='N',
        help='train for N iterations, however fast the machine is',
    )
    parser.add_argument(
        '--pretrained',
        metavar='CHECKPOINT',
        help='start the backbone from these weights, such as those of '
        'configs/classification/vmamba_quickstart.py (default: random ones)',
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
    if work_dir is None and (args.pretrained or args.config == str(CONFIG)):
        own = args.config == str(CONFIG)
        name = 'quickstart' if own else Path(args.config.split('::')[-1]).stem
        work_dir = f'work_dirs/{name}{"_pretrained" if args.pretrained else ""}'
    cfg = engine.load_config(args.config, args.cfg_options, work_dir)
    if 'generator' not in cfg:
        raise engine.UsageError(
            f'{args.config} does not train on the data set that is made here; only '
            'configs/*_quickstart.py and configs/classification/*_quickstart.py do. '
            'Use tools/train.py.'
        )
    weights = engine.choose_start(cfg, args.pretrained, resume='auto')
    if args.pretrained and not weights:
        print(
            f'{cfg.work_dir} has checkpoints: the training goes on from the latest, '
            f'and {args.pretrained} is not read again.'
        )
    for source in weights:
        engine.require_file(source, 'checkpoint')
    make_data(cfg.train_dataloader.dataset.data_root, cfg.generator)
    engine.lock_work_dir(cfg)
    set_schedule(cfg, args.iterations)
    # So that it can be interrupted and started again.
    engine.enable_resume(cfg)
    engine.check_inputs(cfg, weights)
    runner = engine.build_runner(cfg)
    engine.announce_start(cfg, weights)
    runner.train()
    metrics = plain(runner.test())

    task = task_of(cfg)
    work_dir = Path(cfg.work_dir)
    dump(metrics, work_dir / 'metrics.json', indent=2)
    pictures = '\n              '.join(map(str, draw(task, runner, metrics, work_dir)))
    checkpoint = os.path.relpath((work_dir / 'last_checkpoint').read_text().strip())
    print(f"""
{summarise(metrics)} on {len(runner.test_dataloader.dataset)} held-out images

  pictures    {pictures}
  metrics     {work_dir / 'metrics.json'}
  checkpoint  {checkpoint}

Next:
{next_steps(task, cfg, args.config, checkpoint)}""")


def task_of(cfg) -> Task:
    """What kind of model a config has."""
    from mmvssm import engine

    if engine.is_classifier(cfg):
        return CLASSIFICATION
    return DETECTION if engine.is_detector(cfg) else SEGMENTATION


def draw(task: Task, runner, metrics: dict, folder: Path) -> list[Path]:
    """Draw predictions, and what a classifier mistakes for what."""
    from mmvssm import engine

    model, dataset = runner.model, runner.test_dataloader.dataset
    path = folder / 'contact_sheet.png'
    if task is CLASSIFICATION:
        from mmvssm.analysis import classification_sheet as sheets

        classes = dataset.metainfo['classes']
        counts = metrics['confusion_matrix/result']
        return [
            sheets.write_classifier_sheet(path, model, dataset),
            sheets.write_confusion(folder / 'confusion.png', counts, classes),
        ]
    if task is DETECTION:
        from mmvssm.analysis.detection_sheet import write_detector_sheet as write
    else:
        from mmvssm.analysis.contact_sheet import write_model_contact_sheet as write
    with engine.labels_only(model):
        return [write(path, model, dataset)]


def next_steps(task: Task, cfg, config: str, checkpoint: str) -> str:
    """Commands to go on with."""
    python, work_dir = os.path.relpath(sys.executable), Path(cfg.work_dir)
    image = min(Path(cfg.train_dataloader.dataset.data_root).glob(task.images))
    steps = [
        f"""\
  {task.does} pictures of your own
    {python} tools/infer.py {image} \\
        --config {os.path.relpath(config)} --checkpoint {checkpoint} \\
        --out-dir {work_dir / 'infer'}
""",
        f"""\
  train on {task.data} ({task.page} says how to lay it out)
    {python} tools/train.py {task.config}
""",
    ]
    if task is CLASSIFICATION:
        start = f"""\
  start a segmentor from these weights
    {python} tools/quickstart.py --pretrained {checkpoint}
"""
        steps.insert(1, start)
    return ''.join(steps)


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


def plain(metrics: dict) -> dict:
    """Metrics that JSON has a form for."""
    return {
        name: value.tolist() if hasattr(value, 'tolist') else value
        for name, value in metrics.items()
    }


def summarise(metrics: dict) -> str:
    """The most important figures."""
    if 'mIoU' in metrics:
        return f'mIoU {metrics["mIoU"]:.2f}'
    if 'accuracy/top1' in metrics:
        return f'top-1 accuracy {metrics["accuracy/top1"]:.1f} %'
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
