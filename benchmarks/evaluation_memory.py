"""Peak memory of testing a segmentor on large images, with and without its logits.

    python benchmarks/evaluation_memory.py

tests ``configs/upernet_vmamba_t.py``, with random weights, on images of 3000x2000
pixels, as ``tools/test.py`` does, and predicts and paints them, as ``tools/infer.py``
does. Each is done twice: as mmseg does it, with the logits of all classes kept in the
predictions at the size of the image, and by labels alone, as the tools do it. The peak
is that of a process of its own, and all the memory that process holds, the 0.7 GB of
libraries and weights included. It keeps what it frees, as the tools do.

``--slide`` does not shrink the images to what the config trains with, but goes over
them with windows of 512x512 pixels. That takes minutes for each image.

The stored result is ``benchmarks/results/evaluation_memory.json``.
"""

import argparse
import json
import logging
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import nullcontext
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

HERE = Path(__file__).resolve().parent
CONFIG = HERE.parent / 'configs/upernet_vmamba_t.py'


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--config', default=str(CONFIG), help='of a segmentor')
    parser.add_argument(
        '--size', type=int, nargs=2, default=(2000, 3000), metavar=('HEIGHT', 'WIDTH')
    )
    parser.add_argument('--classes', type=int, default=150)
    parser.add_argument('--images', type=int, default=2)
    parser.add_argument(
        '--tasks', nargs='+', choices=('test', 'infer'), default=('test', 'infer')
    )
    parser.add_argument(
        '--slide', action='store_true', help='windows over the images at their own size'
    )
    parser.add_argument(
        '--cfg-options', nargs='+', metavar='KEY=VALUE', help='override config entries'
    )
    parser.add_argument('--json', metavar='FILE', help='where the result goes')
    return parser.parse_args()


def write_images(folder: Path, settings: dict) -> None:
    """Write images of noise, and labels in squares."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    height, width = settings['size']
    for kind in ('images', 'labels'):
        (folder / kind).mkdir()
    for number in range(settings['images']):
        pixels = rng.integers(0, 256, (height, width, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f'images/{number}.jpg')
        few = rng.integers(0, settings['classes'], (-(-height // 50), -(-width // 50)))
        labels = few.astype(np.uint8).repeat(50, 0).repeat(50, 1)
        Image.fromarray(labels[:height, :width]).save(folder / f'labels/{number}.png')


def read_config(settings: dict, folder: Path) -> Any:
    """The config, for these images and classes."""
    from mmvssm import engine

    required = ('model', 'test_dataloader', 'test_evaluator')
    options = settings['options']
    cfg = engine.load_config(settings['config'], options, str(folder), required)
    cfg.model.backbone.init_cfg = None
    heads = [cfg.model.decode_head, cfg.model.get('auxiliary_head')]
    for head in filter(None, heads):
        head.num_classes = settings['classes']
    resize = [step for step in cfg.test_pipeline if step.type != 'Resize']
    if settings['slide']:
        cfg.model.test_cfg = dict(mode='slide', crop_size=(512, 512), stride=(341, 341))
    numbers = range(settings['classes'])
    cfg.test_dataloader.update(num_workers=0, persistent_workers=False)
    cfg.test_dataloader.dataset = dict(
        type='BaseSegDataset',
        data_root=str(folder),
        data_prefix=dict(img_path='images', seg_map_path='labels'),
        img_suffix='.jpg',
        seg_map_suffix='.png',
        metainfo=dict(
            classes=[f'class {number}' for number in numbers],
            palette=[[number % 256, 100, 200] for number in numbers],
        ),
        pipeline=resize if settings['slide'] else cfg.test_pipeline,
    )
    return cfg


def test(cfg: Any, logits: bool, folder: Path) -> None:
    """Test as ``tools/test.py`` does."""
    from mmengine.runner import Runner

    if logits:
        kept = [h for h in cfg.custom_hooks if h.type != 'mmvssm.LabelsOnlyHook']
        cfg.custom_hooks = kept
    cfg.load_from, cfg.resume = None, False
    Runner.from_cfg(cfg).test()


def infer(cfg: Any, logits: bool, folder: Path) -> None:
    """Predict and paint as ``tools/infer.py`` does."""
    from mmvssm.engine.inference import infer

    task = infer.choose_task(cfg)
    nothing = mock.patch.object(infer, 'load_weights')
    kept = mock.patch.object(infer, 'leave_out_logits') if logits else nullcontext()
    with nothing, kept:
        model = infer.load_model(cfg, '', 'cpu')
    for path in infer.find_images([str(folder / 'images')]):
        image = infer.read_image(path)
        prediction = task.predict(model, image)
        task.save(model, image, prediction, folder / path.stem)


def run(settings: dict, task: str, logits: bool) -> dict:
    """Do one of the tasks in this process, which must be a fresh one.

    Returns:
        ``peak``, bytes, and ``seconds`` for all images.
    """
    import torch

    from mmvssm.analysis.measuring import process_memory
    from mmvssm.engine.launching.memory import keep_freed_memory

    keep_freed_memory()
    logging.disable(logging.WARNING)
    torch.manual_seed(0)
    with TemporaryDirectory() as name:
        folder = Path(name)
        write_images(folder, settings)
        cfg = read_config(settings, folder)
        start = time.monotonic()
        dict(test=test, infer=infer)[task](cfg, logits, folder)
        seconds = time.monotonic() - start
    return dict(
        task=task, logits=logits, peak=process_memory.peak(), seconds=round(seconds, 1)
    )


def measure(settings: dict, task: str, logits: bool) -> dict:
    """:func:`run` in a new process."""
    from mmvssm.engine import UsageError

    # Forked from a process that has imported all, and done nothing.
    context = get_context('forkserver')
    context.set_forkserver_preload(['mmvssm.engine.inference.segment', 'mmseg.models'])
    with ProcessPoolExecutor(1, context) as pool:
        try:
            return pool.submit(run, settings, task, logits).result()
        except BrokenProcessPool as error:
            raise UsageError(
                f'{task} of {settings["images"]} images was killed, most likely for '
                'want of memory; take a smaller --size.'
            ) from error


def main(args: argparse.Namespace) -> None:
    """Measure all, print a table, write the result."""
    from mmvssm.analysis.measuring import process_memory
    from mmvssm.collect_env import collect_env
    from mmvssm.engine import UsageError, require_file

    if not process_memory.possible():
        raise UsageError("this needs the counters of Linux's /proc")
    require_file(args.config, 'config')
    if min(*args.size, args.classes, args.images) < 1 or args.classes > 255:
        raise UsageError('--size and --images are at least 1, --classes 1 to 255.')
    settings = dict(
        config=args.config,
        size=list(args.size),
        classes=args.classes,
        images=args.images,
        slide=args.slide,
        options=args.cfg_options,
    )
    one = 4 * args.classes * args.size[0] * args.size[1]
    print(f'one map of all logits at full size: {one / 1e9:.2f} GB')
    columns = '{:8}{:>12}{:>14}{:>8}'.format
    print(columns('', 'with logits', 'labels alone', 'ratio'))
    runs = []
    for task in args.tasks:
        whole, small = (measure(settings, task, logits) for logits in (True, False))
        runs += [whole, small]
        peaks = [run['peak'] for run in (whole, small)]
        figures = [f'{peak / 1e9:.2f} GB' for peak in peaks]
        print(columns(task, *figures, f'{peaks[0] / peaks[1]:.2f}'), flush=True)
    if args.json:
        settings['config'] = Path(args.config).name
        result = dict(
            environment=collect_env(), settings=settings, map_bytes=one, runs=runs
        )
        out = Path(args.json)
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(result, indent=2) + '\n')
        print(f'written to {out}')


if __name__ == '__main__':
    arguments = parse_args()
    from mmvssm.engine import run_tool

    run_tool(lambda: main(arguments))
