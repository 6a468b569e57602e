"""Exported models in their runtimes, beside PyTorch, in one run.

    python benchmarks/export.py [--models NAME ...] [--threads 1 2] [--json FILE]

writes VMamba-T, Vim-T, MLLA-T, mmseg's Swin-T (224x224) and UperNet with VMamba-T
(512x512) as ONNX files in the forms ``plain`` and ``function``, with random weights and
the check of ``tools/export.py``, and prints for batch 1

- nodes, size, and the difference to PyTorch, relative to the largest output. For the
  segmentor it is the part of the pixels that get another class;
- the time in onnxruntime, in onnxruntime with our kernels
  (``mmvssm.onnx_library()``, of the form ``function``) and in OpenVINO, relative to
  PyTorch with our kernels. All of them take turns in one process, and medians count.

The last table holds this against the targets, and marks a missed one with ``!``.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import machines
import torch

from mmvssm import build_classifier
from mmvssm.analysis.measuring.timing import Effort, interleaved
from mmvssm.engine import UsageError, load_config, run_tool
from mmvssm.export import DifferenceError, ExportError, to_onnx
from mmvssm.export import verify as checks

CLASSES = 1000
SEGMENTOR = 'upernet_vmamba_t'
FORMS = ('plain', 'function')
# Must and aim, by model and what was measured. Times are relative to PyTorch.
TARGETS = {
    'vmamba_t_s1l8': {
        'nodes, plain': (1900, 1300),
        'nodes, function': (460, 400),
        'onnxruntime, plain': (1.2, 1.0),
        'onnxruntime, our kernels': (0.75, 0.6),
    },
    'vim_t': {'nodes, plain': (2710, 1800), 'onnxruntime, plain': (1.3, 1.0)},
    'mlla_t': {'nodes, plain': (2100, 1500), 'onnxruntime, plain': (0.8, 0.6)},
    SEGMENTOR: {
        'onnxruntime, plain': (1.1, 1.0),
        'changed, onnxruntime': (1e-4, 1e-5),
    },
}
# Of logits of about 10 the difference is ten times as much.
ERRORS = {'error, onnxruntime': (1e-5, 5e-6), 'error, openvino': (2e-4, 1e-4)}


def classifier(name: str) -> torch.nn.Module:
    """A classifier of ours with random weights."""
    return build_classifier(name, CLASSES)


def swin(name: str) -> torch.nn.Module:
    """mmseg's Swin as a classifier."""
    from mmvssm.analysis.measuring import peers

    return peers.swin(name, CLASSES)


def segmentor(name: str) -> torch.nn.Module:
    """The segmentor of a config with random weights, predicting whole images."""
    from mmseg.registry import MODELS
    from mmseg.utils import register_all_modules

    register_all_modules()
    cfg = load_config(f'mmvssm::{name}.py', None)
    cfg.model.test_cfg = dict(mode='whole')
    cfg.model.backbone.pop('init_cfg', None)
    return MODELS.build(cfg.model)


MODELS: dict[str, tuple[Callable[[], torch.nn.Module], tuple[int, int]]] = {
    **{
        name: (partial(classifier, name), (224, 224))
        for name in ('vmamba_t_s1l8', 'vim_t', 'mlla_t')
    },
    'swin_t': (partial(swin, 'swin_t'), (224, 224)),
    SEGMENTOR: (partial(segmentor, SEGMENTOR), (512, 512)),
}


def measure(
    name: str, size: tuple[int, int], threads: list[int], effort: Effort, folder: Path
) -> dict:
    """Export a model in both forms, and time what runs them.

    Returns:
        ``forms``: nodes, bytes, errors and changed classes of each; ``seconds``: by
        threads and way.
    """
    torch.manual_seed(0)
    model = MODELS[name][0]().eval()
    forms, files = {}, {}
    for form in FORMS:
        files[form] = folder / f'{name}-{form}.onnx'
        print(f'{name}: writing and checking the form {form}', file=sys.stderr)
        report = to_onnx(model, files[form], size, form=form, rounds=0)
        forms[form] = dict(
            nodes=report.nodes,
            functions=report.functions,
            bytes=report.size,
            error={r: report.error(r) for r in report.runtimes()},
            changed={r: report.changed(r) for r in report.runtimes()},
        )
    image = torch.randn(1, 3, *size)
    seconds = {}
    for number in threads:
        print(f'{name}: timing, threads: {number}', file=sys.stderr)
        torch.set_num_threads(number)
        runtime = partial(checks.Runtime, threads=number)
        ways = {
            'onnxruntime, plain': runtime('onnxruntime', files['plain']),
            'onnxruntime, function': runtime('onnxruntime', files['function']),
            'onnxruntime, our kernels': runtime('kernels', files['function']),
        }
        if 'openvino' in checks.installed_runtimes():
            ways['openvino, plain'] = runtime('openvino', files['plain'])
        array = image.numpy()
        functions = {way: partial(run, array) for way, run in ways.items()}
        functions['pytorch'] = partial(_eager, model, image)
        times = interleaved(functions, effort)
        seconds[str(number)] = {way: found['median'] for way, found in times.items()}
    return dict(size=list(size), forms=forms, seconds=seconds)


def _eager(model: torch.nn.Module, image: torch.Tensor) -> None:
    with torch.no_grad():
        model(image)


def found_values(row: dict, threads: str) -> dict[str, float]:
    """What the targets are about, of one model."""
    plain = row['forms']['plain']
    values = {f'nodes, {form}': row['forms'][form]['nodes'] for form in FORMS}
    for kind in ('error', 'changed'):
        for runtime, value in plain[kind].items():
            if value is not None:
                values[f'{kind}, {runtime}'] = value
    times = row['seconds'][threads]
    for way, seconds in times.items():
        values[way] = seconds / times['pytorch']
    return values


def targets(rows: dict[str, dict]) -> list[list[str]]:
    """Rows of the last table: what must be, the aim, and what was found."""
    found = []
    for name, row in rows.items():
        by_threads = {t: found_values(row, t) for t in row['seconds']}
        errors = {} if name == SEGMENTOR else ERRORS
        for what, (must, aim) in {**TARGETS.get(name, {}), **errors}.items():
            values = [by_threads[t][what] for t in by_threads if what in by_threads[t]]
            if not values:
                continue
            # A NaN is no success either.
            marks = [f'{v:.4g}{"" if v <= must else " !"}' for v in values]
            timed = what in row['seconds'][next(iter(by_threads))]
            shown = ', '.join(marks if timed else marks[:1])
            found.append([name, what, f'{must:g}', f'{aim:g}', shown])
    return found


def tables(rows: dict[str, dict]) -> str:
    """All that is printed."""
    forms = [['model', 'form', 'nodes', 'MiB', 'error', 'changed']]
    for name, row in rows.items():
        for form, facts in row['forms'].items():
            forms.append(
                [
                    name,
                    form,
                    str(facts['nodes']),
                    f'{facts["bytes"] / 2**20:.1f}',
                    _each(facts['error']),
                    _each(facts['changed']),
                ]
            )
    times = [['model', 'threads', 'runtime', 'ms', 'time to PyTorch']]
    for name, row in rows.items():
        for number, by_way in row['seconds'].items():
            for way, seconds in by_way.items():
                ratio = f'{seconds / by_way["pytorch"]:.2f}'
                times.append([name, number, way, f'{seconds * 1e3:.1f}', ratio])
    threads = ', '.join(next(iter(rows.values()))['seconds'])
    head = [['model', 'what', 'must', 'aim', f'found (times: threads {threads})']]
    return '\n\n'.join(_table(t) for t in (forms, times, head + targets(rows)))


def _each(values: dict[str, float | None]) -> str:
    known = {name: value for name, value in values.items() if value is not None}
    return ', '.join(f'{name} {value:.1e}' for name, value in known.items()) or '-'


def _table(rows: list[list[str]]) -> str:
    widths = [max(len(cell) for cell in column) for column in zip(*rows)]
    lines = [
        '  '.join(c.ljust(w) for c, w in zip(row, widths)).rstrip() for row in rows
    ]
    return '\n'.join([lines[0], '-' * len(lines[0]), *lines[1:]])


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        '--models', nargs='+', choices=MODELS, default=[*MODELS], metavar='NAME'
    )
    parser.add_argument('--threads', nargs='+', type=int, default=[1, 2])
    parser.add_argument(
        '--quick',
        action='store_true',
        help='small images, to see that it runs; the figures say nothing',
    )
    parser.add_argument(
        '--json', help='where to write (default: results/export/MACHINE.json)'
    )
    return parser.parse_args()


def main(args: argparse.Namespace) -> None:
    """Export, measure, print, and write the result."""
    effort = Effort(rounds=1, limit=0.1) if args.quick else Effort(limit=4)
    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in args.models:
            size = (64, 96) if args.quick else MODELS[name][1]
            try:
                rows[name] = measure(name, size, args.threads, effort, Path(folder))
            except (DifferenceError, ExportError) as error:
                raise UsageError(f'{name}: {str(error).rstrip(".")}.') from error
    print(tables(rows))
    if args.quick and not args.json:
        return
    file = Path(args.json) if args.json else machines.results_file('export')
    file.parent.mkdir(parents=True, exist_ok=True)
    result = dict(machines.facts(), models=rows)
    file.write_text(json.dumps(result, indent=2) + '\n')
    print(f'written to {file}')


if __name__ == '__main__':
    arguments = parse_args()
    run_tool(lambda: main(arguments))
