"""Export to ONNX: ``python tools/export.py CONFIG|MODEL_NAME --out model.onnx``.

The file that was written is run in onnxruntime, and in OpenVINO where that is
installed, on random images and on those of --images. What it gives is compared with
PyTorch. If it differs, the exit code is 1 and no file is left.
"""

import argparse


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        'model',
        metavar='CONFIG|MODEL_NAME',
        help='a config of a segmentor or classifier, a name of mmvssm.list_models() '
        'for the classifier, or a folder of mmvssm.save_pretrained',
    )
    parser.add_argument(
        '--out', required=True, metavar='FILE', help='the file to write'
    )
    parser.add_argument(
        '--checkpoint',
        help='a file, an address, mmvssm://NAME or hf://OWNER/REPOSITORY/FILE '
        '(default: what was published for the config or the name)',
    )
    parser.add_argument(
        '--from-scratch', action='store_true', help='export random weights'
    )
    parser.add_argument(
        '--weights',
        choices=('raw', 'ema'),
        help='of a file with both, take the raw or the averaged weights',
    )
    parser.add_argument(
        '--size',
        nargs='+',
        type=int,
        metavar='PIXELS',
        help='height and width of the image, or one number for both (default: 224 for '
        'a classifier, the crop of the training for a segmentor)',
    )
    parser.add_argument(
        '--dynamic',
        nargs='+',
        default=[],
        choices=('batch', 'size'),
        help='what is free in the file (default: nothing)',
    )
    parser.add_argument(
        '--form',
        default='plain',
        choices=('plain', 'function', 'unrolled'),
        help='plain: standard operators, with loops. function: our ops are local '
        'functions, for onnxruntime with mmvssm.onnx_library(). unrolled: no loops, '
        'one size (default: plain)',
    )
    parser.add_argument(
        '--task',
        choices=('logits', 'maps', 'seg'),
        help='logits, the maps of the backbone, or the labels of a segmentor (default: '
        'seg for a segmentor, else logits)',
    )
    parser.add_argument(
        '--normalise',
        action='store_true',
        help='let the file take RGB of 0 to 255, and normalise it',
    )
    parser.add_argument(
        '--opset', type=int, default=18, metavar='N', help='18 or later (default: 18)'
    )
    parser.add_argument(
        '--images',
        nargs='+',
        default=[],
        metavar='IMAGE',
        help='check with these, too: files, folders or quoted patterns',
    )
    parser.add_argument(
        '--bound',
        type=float,
        metavar='X',
        help='allowed difference, relative to the largest value; 20 times as much in '
        'OpenVINO (default: 1e-5)',
    )
    parser.add_argument(
        '--runtimes',
        nargs='+',
        choices=('onnxruntime', 'kernels', 'openvino'),
        help='check in these; kernels is onnxruntime with mmvssm.onnx_library() '
        '(default: what is installed and reads the form)',
    )
    parser.add_argument(
        '--fp16',
        action='store_true',
        help='weights, linear layers and convolutions in float16',
    )
    parser.add_argument(
        '--int8',
        nargs='+',
        default=[],
        metavar='IMAGE',
        help='linear layers and convolutions in int8, calibrated on these images',
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
        help='override config entries; for a name, arguments such as num_classes=10',
    )
    return parser.parse_args()


def main(args: argparse.Namespace) -> int:
    """Export, check and print. Returns 1 if the file differs from PyTorch."""
    from mmvssm.checkpoints import trust
    from mmvssm.engine import UsageError
    from mmvssm.engine.inference.infer import find_images
    from mmvssm.export import DifferenceError, ExportError, to_onnx
    from mmvssm.export.source import load_source
    from mmvssm.export.verify import BOUND

    if args.size and (len(args.size) > 2 or min(args.size) < 1):
        raise UsageError(f'--size takes HEIGHT WIDTH, got {args.size}.')
    if args.trust_checkpoint and args.checkpoint:
        trust(args.checkpoint)
    images, calibration = (
        find_images(given) if given else [] for given in (args.images, args.int8)
    )
    source = load_source(
        args.model,
        args.checkpoint,
        task=args.task,
        from_scratch=args.from_scratch,
        weights=args.weights,
        options=args.cfg_options,
    )
    size = (args.size[0], args.size[-1]) if args.size else source.size
    print(f'{args.model} with {source.weights}, images of {size[0]}x{size[1]}')
    try:
        report = to_onnx(
            source.model,
            args.out,
            size,
            args.dynamic,
            args.form,
            task=args.task,
            normalise=args.normalise,
            opset=args.opset,
            fp16=args.fp16,
            int8=calibration,
            images=images,
            bound=BOUND if args.bound is None else args.bound,
            runtimes=args.runtimes,
            metadata=dict(source.metadata, weights=source.weights),
        )
    except ExportError as error:
        raise UsageError(f'{str(error).rstrip(".")}.') from error
    except DifferenceError as error:
        print(f'{error.report or ""}\nnot written: {error}')
        return 1
    print(report)
    return 0


if __name__ == '__main__':
    arguments = parse_args()
    from mmvssm.engine import run_tool

    run_tool(lambda: main(arguments))
