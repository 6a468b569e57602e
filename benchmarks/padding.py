"""What the padding of a batch changes in the results of an image.

    make quickstart-det            # makes the data set; the training is not needed
    python benchmarks/padding.py

trains a small Faster R-CNN with a backbone of each family on the quickstart's data,
without ``mask_padding``: there are no published weights here, and random ones find no
objects. Then each validation image is predicted alone, and in a batch with an image
of 1.5 times its height and width, both with and without ``mask_padding``, by the same
weights. Differences are between the two, alone and padded:

- maps: the root of the mean squared difference over the image's positions, relative
  to the standard deviation of the map alone; the mean of all maps.
- largest: the largest difference of a value, relative to the same.
- found again: of the five objects of the image alone with the best scores, those that
  the padded image has, too, of the same class and with an overlap (IoU) of 0.5 or more.
- box, score: mean difference of their corners in pixels, and of their scores.
- AP: COCO's average precision of boxes, of either.

The result is ``benchmarks/results/padding.json``.
"""

import argparse
import json
from copy import deepcopy
from pathlib import Path

HERE = Path(__file__).resolve().parent
CONFIG = HERE.parent / 'configs/mask_rcnn_vmamba_quickstart.py'
ISOTROPIC = dict(
    arch=dict(embed_dims=96, depth=4),
    img_size=128,
    out_indices=(3,),
    drop_path_rate=0.0,
    last_layer_process='add',
)
BACKBONES = {
    'VMamba': None,
    'Vim': dict(type='mmvssm.Vim', rope=True, **ISOTROPIC),
    'Mamba®': dict(type='mmvssm.MambaR', **ISOTROPIC),
    'MLLA': dict(
        type='mmvssm.MLLA',
        arch=dict(dims=32, depths=(1, 1, 3, 1), num_heads=(1, 2, 4, 8)),
        drop_path_rate=0.0,
    ),
}
OBJECTS = 5
OVERLAP = 0.5
LARGER = 1.5


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        '--families', nargs='+', choices=BACKBONES, default=list(BACKBONES)
    )
    parser.add_argument('--iters', type=int, default=300, help='of each training')
    parser.add_argument('--images', type=int, default=64, help='to compare')
    parser.add_argument('--work-dir', default='work_dirs/padding')
    parser.add_argument('--out', default=str(HERE / 'results/padding.json'))
    parser.add_argument(
        '--cfg-options', nargs='+', metavar='KEY=VALUE', help='override config entries'
    )
    return parser.parse_args()


def family_config(args: argparse.Namespace, name: str):
    """The quickstart's detector with the backbone of a family."""
    from mmvssm import engine
    from mmvssm.engine.configs.options import merge_options

    work_dir = str(Path(args.work_dir, name.strip('®').lower()))
    cfg = engine.load_config(str(CONFIG), None, work_dir)
    if BACKBONES[name]:
        cfg.model.backbone = dict(BACKBONES[name])
    if 'Vim' in cfg.model.backbone.type or 'MambaR' in cfg.model.backbone.type:
        cfg.model.neck = dict(
            type='mmvssm.SimpleFeaturePyramid',
            in_channels=cfg.model.backbone.arch.embed_dims,
            out_channels=cfg.model.neck.out_channels,
            num_outs=4,
        )
    cfg.model.data_preprocessor.type = 'mmvssm.DetDataPreprocessor'
    # Boxes alone: masks would double the time, and are cut out of the same maps.
    cfg.model.type = 'FasterRCNN'
    cfg.model.data_preprocessor.pad_mask = False
    cfg.model.roi_head.update(mask_roi_extractor=None, mask_head=None)
    cfg.val_evaluator.metric = ['bbox']
    for loader in (cfg.train_dataloader, cfg.val_dataloader):
        for step in loader.dataset.pipeline:
            if step.type == 'LoadAnnotations':
                step.with_mask = False
    cfg.randomness = dict(seed=0)
    cfg.train_cfg.update(max_iters=args.iters, val_interval=10**9)
    warm_up, fall = cfg.param_scheduler
    warm_up.end = fall.begin = max(1, args.iters // 10)
    fall.end = args.iters
    if args.cfg_options:
        merge_options(cfg, args.cfg_options, str(CONFIG))
    engine.check_datasets(cfg)
    return cfg


def train(cfg):
    """The trained detector, in eval mode, and the runner it comes from.

    A training whose last checkpoint is there is not done again.
    """
    from mmengine.runner import Runner

    runner = Runner.from_cfg(cfg)
    done = Path(cfg.work_dir, f'iter_{cfg.train_cfg.max_iters}.pth')
    if done.is_file():
        runner.load_checkpoint(str(done))
    else:
        runner.train()
    return runner.model.eval(), runner


def predict(model, data: dict, padded: bool):
    """Predict one image; also give the maps of its own positions.

    Args:
        model: A detector.
        data: What the data set has of it.
        padded: Whether it shares its batch with a larger image.
    """
    import torch

    images, samples = [data['inputs']], [deepcopy(data['data_samples'])]
    if padded:
        size = tuple(int(LARGER * side) for side in images[0].shape[1:])
        images.append(torch.zeros(3, *size, dtype=torch.uint8))
        samples.append(deepcopy(samples[0]))
        samples[1].set_metainfo(dict(img_shape=size, ori_shape=size))
    maps = []
    handle = model.backbone.register_forward_hook(
        lambda module, inputs, outs: maps.extend(outs)
    )
    with torch.no_grad():
        found = model.test_step(dict(inputs=images, data_samples=samples))[0]
    handle.remove()
    backbone = model.backbone
    sizes = backbone.map_sizes(backbone.whole_size(tuple(images[0].shape[1:])))
    return found, [x[0, :, :h, :w] for x, (h, w) in zip(maps, sizes, strict=True)]


def compare_boxes(alone, padded) -> dict[str, list]:
    """Objects of an image alone, and what became of each when it was padded."""
    import torch
    from mmdet.structures.bbox import bbox_overlaps

    alone = alone[alone.scores.argsort(descending=True)[:OBJECTS]]
    overlaps = bbox_overlaps(alone.bboxes, padded.bboxes)
    overlaps[alone.labels[:, None] != padded.labels] = 0
    found = dict(again=[], box=[], score=[])
    for i in range(len(alone)):
        j = int(overlaps[i].argmax()) if len(padded) else 0
        again = len(padded) > 0 and bool(overlaps[i, j] >= OVERLAP)
        found['again'].append(float(again))
        if again:
            shift = (alone.bboxes[i] - padded.bboxes[j]).abs().mean()
            found['box'].append(float(shift))
            found['score'].append(float((alone.scores[i] - padded.scores[j]).abs()))
            overlaps[:, j] = 0
    assert torch.isfinite(torch.tensor(found['box'])).all()
    return found


def measure(model, runner, masked: bool, number: int) -> dict:
    """Compare alone and padded over so many validation images."""
    from statistics import fmean

    dataset = runner.build_dataloader(runner.cfg.val_dataloader).dataset
    metrics = [runner.build_evaluator(runner.cfg.val_evaluator) for _ in range(2)]
    model.backbone.mask_padding = masked
    rms, largest, boxes = [], [], dict(again=[], box=[], score=[])
    number = min(number, len(dataset))
    for i in range(number):
        results = [predict(model, dataset[i], padded) for padded in (False, True)]
        for a, b in zip(*(maps for _, maps in results)):
            rms.append(float((a - b).square().mean().sqrt() / a.std()))
            largest.append(float((a - b).abs().max() / a.std()))
        found = [sample for sample, _ in results]
        compared = compare_boxes(*(sample.pred_instances for sample in found))
        for key, values in compared.items():
            boxes[key] += values
        for metric, sample in zip(metrics, found):
            metric.dataset_meta = dataset.metainfo
            metric.process([sample], None)
    precision = [m.evaluate(number)['coco/bbox_mAP'] for m in metrics]
    return dict(
        mask_padding=masked,
        maps=fmean(rms),
        largest=max(largest),
        objects=len(boxes['again']),
        **{key: fmean(values or [float('nan')]) for key, values in boxes.items()},
        ap_alone=precision[0],
        ap_padded=precision[1],
    )


def main(args: argparse.Namespace) -> None:
    """Train and measure all, print a table, write the result."""
    import torch

    from mmvssm.collect_env import collect_env

    torch.set_num_threads(1)
    rows = []
    for name in args.families:
        model, runner = train(family_config(args, name))
        rows += [
            dict(family=name, **measure(model, runner, masked, args.images))
            for masked in (False, True)
        ]
    keys = ('maps', 'largest', 'again', 'box', 'score', 'ap_alone', 'ap_padded')
    print(f'{"family":10}{"mask":>6}' + ''.join(f'{key:>11}' for key in keys))
    for row in rows:
        mask = 'on' if row['mask_padding'] else 'off'
        values = ''.join(f'{row[key]:>11.3g}' for key in keys)
        print(f'{row["family"]:10}{mask:>6}{values}')
    env = collect_env()
    environment = {key: env[key] for key in ('Machine', 'Packages')}
    result = dict(environment=environment, iterations=args.iters, rows=rows)
    Path(args.out).write_text(json.dumps(result, indent=1) + '\n')
    print(f'written to {args.out}')


if __name__ == '__main__':
    arguments = parse_args()
    from mmvssm.engine import run_tool

    run_tool(lambda: main(arguments))
