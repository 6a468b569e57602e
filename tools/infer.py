"""Predict images: ``python tools/infer.py IMAGE... --config C [--checkpoint W]``.

``--onnx FILE`` takes a segmentor of tools/export.py in the place of both.

For every image this writes NAME_overlay.png, the image with the prediction painted over
it. A segmentor also writes NAME_labels.png, whose pixel values are class numbers
counted from 0. A detector also writes NAME_objects.json with categories, scores, boxes
and masks. A classifier paints its five best classes beside the image, writes them to
NAME_classes.json with their scores, and prints the best one. Images are read as the
config's test reads them. Those that cannot be read, or that the model refuses, are
skipped and listed at the end with the reason. The exit code is then 1.
"""

import argparse
from pathlib import Path


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        'images', nargs='+', metavar='IMAGE', help='files, folders or quoted patterns'
    )
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument('--config', help='a file, mmvssm::NAME.py, or a name of the zoo')
    model.add_argument(
        '--onnx',
        metavar='FILE',
        help='a segmentor of tools/export.py, run by onnxruntime on the CPU',
    )
    parser.add_argument(
        '--checkpoint',
        help='what that config was trained to: a file, an address, mmvssm://NAME or '
        'hf://OWNER/REPOSITORY/FILE (default: what was published for it)',
    )
    parser.add_argument(
        '--weights',
        choices=('raw', 'ema'),
        help='of a file with both, take the raw or the averaged weights',
    )
    parser.add_argument('--out-dir', default='outputs', help='default: outputs')
    parser.add_argument(
        '--device', help='such as cpu or cuda:1 (default: a GPU if there is one)'
    )
    parser.add_argument(
        '--trust-checkpoint',
        action='store_true',
        help='run code that the checkpoint contains; only for files of your own',
    )
    parser.add_argument(
        '--cfg-options', nargs='+', metavar='KEY=VALUE', help='override config entries'
    )
    return parser.parse_args()


def load(args: argparse.Namespace) -> tuple:
    """Build and fill the model of a config; also return what is done with an image."""
    from mmvssm import engine
    from mmvssm.checkpoints import trust
    from mmvssm.engine.inference import infer

    cfg = engine.load_config(
        args.config, args.cfg_options, required=('model', 'test_dataloader')
    )
    task = infer.choose_task(cfg)
    checkpoint = args.checkpoint or engine.published_weights(args.config)
    if args.trust_checkpoint:
        trust(checkpoint)
    return infer.load_model(cfg, checkpoint, args.device, args.weights), task


def load_onnx(args: argparse.Namespace) -> tuple:
    """Load the segmentor of an ONNX file."""
    from mmvssm.engine import UsageError
    from mmvssm.engine.inference import segment
    from mmvssm.export.predict import OnnxSegmentor

    given = (args.checkpoint, args.weights, args.device, args.cfg_options)
    if any(given) or args.trust_checkpoint:
        raise UsageError(
            '--onnx takes no --checkpoint, --weights, --device, --cfg-options or '
            '--trust-checkpoint: the file has weights and settings of its own.'
        )
    return OnnxSegmentor(args.onnx), segment


def main(args: argparse.Namespace) -> int:
    """Predict every image. Returns 1 if some were skipped."""
    from mmengine.utils import track_iter_progress

    from mmvssm.engine.inference import infer

    images = infer.find_images(args.images)
    model, task = load_onnx(args) if args.onnx else load(args)
    out_dir = Path(args.out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    taken, skipped, said = set(), [], []
    for path in track_iter_progress(images):
        try:
            prediction = infer.predict(model, path)
        except infer.ImageError as error:
            skipped.append(f'{path}: {error}')
            continue
        text = task.save(model, *prediction, out_dir / infer.free_name(path, taken))
        if text:
            said.append(f'{path}: {text}')
    print('', *said, sep='\n')
    print(
        f'{len(images) - len(skipped)} of {len(images)} images {task.VERB}, '
        f'results in {out_dir}'
    )
    for line in skipped:
        print(f'skipped {line}')
    return 1 if skipped else 0


if __name__ == '__main__':
    arguments = parse_args()
    from mmvssm.engine import run_tool

    run_tool(lambda: main(arguments))
