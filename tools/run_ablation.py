"""Train the rows of configs/ablation on a data set and put them in one table.

A finished row is not trained again, and an interrupted row continues: run the same
command as often as needed. You may train some rows and seeds now and others later.
--count and --speed train nothing: they print parameters and FLOPs, or images a second.
"""

import argparse
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        '--rows',
        nargs='+',
        metavar='ROW',
        help='rows to train, by config name (default: all)',
    )
    parser.add_argument(
        '--data',
        metavar='CONFIG',
        help='config with the data set and schedule for all rows, such as '
        'configs/_base_/ablation_quickstart.py; with that of a classifier, such as '
        'configs/classification/vmamba_t_s1l8_in1k.py, the rows are classifiers '
        "(default: the rows' own, ADE20K)",
    )
    parser.add_argument(
        '--seeds', nargs='+', type=int, default=[0], metavar='N', help='default: 0'
    )
    parser.add_argument(
        '--metric',
        help='the metric to compare (default: mIoU, of classifiers accuracy/top1)',
    )
    parser.add_argument(
        '--work-dir',
        default='work_dirs/ablation',
        help='gets a folder for each row and seed, and ablation.csv, .md and .png '
        'of all finished rows (default: work_dirs/ablation)',
    )
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        metavar='KEY=VALUE',
        help='override config entries in all rows, e.g. train_cfg.max_iters=100',
    )
    parser.add_argument(
        '--count', action='store_true', help='print parameters and FLOPs and stop'
    )
    parser.add_argument(
        '--speed',
        action='store_true',
        help='measure images a second of the rows as classifiers of 224x224, inference '
        'and training, on the CPU and in turns; print them and stop',
    )
    parser.add_argument(
        '--batch',
        type=int,
        default=1,
        help='images of a step with --speed (default: 1)',
    )
    parser.add_argument(
        '--threads',
        type=int,
        help="of torch with --speed (default: torch's own choice)",
    )
    parser.add_argument(
        '--configs',
        default=str(REPOSITORY / 'configs/ablation'),
        help='folder with the configs of the rows',
    )
    return parser.parse_args()


def main(args: argparse.Namespace) -> None:
    """Count or time; or train the rows that are not finished, and write the table."""
    import torch

    from mmvssm.analysis import ablation as tables
    from mmvssm.analysis.measuring.timing import Effort
    from mmvssm.collect_env import collect_env
    from mmvssm.engine import UsageError
    from mmvssm.engine.configs import ablation

    if min(args.batch, args.threads or 1) < 1:
        raise UsageError('--batch and --threads must be at least 1.')

    everything = ablation.load_rows(args.configs)
    rows = ablation.select_rows(everything, args.rows)
    configs = {
        row.name: ablation.row_config(row, args.data, args.cfg_options) for row in rows
    }
    if args.count:
        counted = ((row, tables.count_row(configs[row.name])) for row in rows)
        print(tables.complexity_table(counted))
        return
    if args.speed:
        threads = args.threads or torch.get_num_threads()
        effort = Effort(rounds=25, turn=0.02, limit=5.0)
        speeds = tables.measure_speed(configs, args.batch, threads, effort)
        machine = collect_env()['Machine']
        print(f'batch {args.batch}, {threads} threads of', machine['CPU'])
        print(tables.speed_table(rows, speeds))
        return
    # Always by the baseline: a row may have a head of its own.
    baseline = ablation.row_config(everything[0], args.data, args.cfg_options)
    ablation.claim_work_dir(args.work_dir, baseline)
    metric = args.metric or ablation.usual_metric(configs[rows[0].name])
    for row in rows:
        for seed in args.seeds:
            result = ablation.train_row(
                row, configs[row.name], seed, args.work_dir, metric
            )
            print(f'{row.name}, seed {seed}: {metric} {result["value"]:.2f}')
            summary = tables.summarise(
                everything, ablation.finished(everything, args.work_dir)
            )
            stem = Path(args.work_dir) / 'ablation'
            paths = tables.write_results(summary, metric, stem)
    print(tables.result_table(summary, metric))
    print('\n'.join(map(str, paths)))


if __name__ == '__main__':
    arguments = parse_args()
    from mmvssm.engine import run_tool

    run_tool(lambda: main(arguments))
