"""Parameters and FLOPs: ``python tools/get_flops.py CONFIG|MODEL_NAME``."""

import argparse


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        'model',
        metavar='CONFIG|MODEL_NAME',
        help='a config, or a name of mmvssm.list_models() for the classifier',
    )
    parser.add_argument(
        '--shape',
        nargs='+',
        type=int,
        metavar='SIZE',
        help='height and width, or one number for both (default: 512 2048 '
        'for a segmentor, 800 1280 for a detector, 224 for a classifier)',
    )
    parser.add_argument(
        '--cfg-options', nargs='+', metavar='KEY=VALUE', help='override config entries'
    )
    return parser.parse_args()


def build(args: argparse.Namespace):
    """Build the model. Returns it with the channels and default size of its image."""
    import mmvssm
    from mmvssm import engine
    from mmvssm.analysis.detectors import CountableDetector
    from mmvssm.engine.configs.images import image_channels

    if args.model in mmvssm.list_models():
        return mmvssm.build_classifier(args.model), 3, [224]
    if not args.model.endswith('.py'):
        raise engine.UsageError(
            f'{args.model} is neither a config (NAME.py) nor one of '
            f'{", ".join(mmvssm.list_models())}.'
        )
    cfg = engine.load_config(args.model, args.cfg_options)
    from mmengine.model import revert_sync_batchnorm
    from mmengine.registry import MODELS, init_default_scope

    init_default_scope(engine.scope_of(cfg))
    model = revert_sync_batchnorm(MODELS.build(cfg.model))
    channels = image_channels(cfg)
    if engine.is_classifier(cfg):
        return model, channels, [224]
    if not engine.is_detector(cfg):
        return model, channels, [512, 2048]
    try:
        return CountableDetector(model), channels, [800, 1280]
    except ValueError as error:
        raise engine.UsageError(f'{args.model}: {error}.') from error


def main(args: argparse.Namespace) -> None:
    """Count and print."""
    from mmvssm.analysis.flops import count_flops
    from mmvssm.engine import UsageError

    model, channels, size = build(args)
    size = args.shape or size
    if len(size) > 2 or min(size) < 1:
        raise UsageError(f'--shape takes HEIGHT WIDTH, got {size}.')
    height, width = size[0], size[-1]
    try:
        result = count_flops(model, (1, channels, height, width))
    except ValueError as error:
        raise UsageError(f'{args.model} at {height}x{width}: {error}') from error
    print(f'{args.model} at {height}x{width}')
    print(f'parameters  {result.params / 1e6:10.2f} M')
    for name, module in model.named_children():
        number = sum(p.numel() for p in module.parameters())
        if number:
            print(f'  {name:24}{number / 1e6:10.2f} M')
    print(f'FLOPs       {result.flops / 1e9:10.2f} G')
    by_size = sorted(result.by_operator.items(), key=lambda item: -item[1])
    for name, number in by_size:
        print(f'  {name:24}{number / 1e9:10.3f} G')
    print(
        'One multiply-add is one FLOP; a scan is 9*B*L*D*N + B*D*L. '
        'Auxiliary heads have parameters but do not run; the heads of a '
        'detector run on 1000 boxes and 100 masks.'
    )


if __name__ == '__main__':
    arguments = parse_args()
    from mmvssm.engine import run_tool

    run_tool(lambda: main(arguments))
