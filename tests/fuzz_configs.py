"""Configs and options of the command line, and ways to spoil them."""

import re
from functools import cache

from mmengine.config import Config

from mmvssm.engine import (
    UsageError,
    check_datasets,
    enable_amp,
    enable_painting,
    enable_tta,
    keep_predictions,
    load_config,
)
from tiny import REPO

CONFIGS = ('upernet_vmamba_t', 'upernet_vim_s', 'upernet_mlla_t', 'upernet_mambar_b')
_VALUES = (
    *('0', '-1', '10**40', '1e999', 'None', 'True', "'text'", '[]', '{}', '()', 'x'),
    *('[[[[', 'dict(', "'", '"""', '\\', '\0', 'é', '9' * 5000, '', "dict(type='X')"),
    *(
        "'{{fileBasename}}'",
        "'{{_base_.x}}'",
        "'mmvssm::no.py'",
        'lambda: 0',
        '(' * 300,
    ),
)
_OPTIONS = (
    *('', '=', 'model', 'model=', '=3', 'model.=3', '.=1', 'a.b.c=1', 'model=3'),
    *('model.backbone=3', 'model.backbone.arch=None', 'model.backbone.0=1'),
    *('train_dataloader.0.x=1', 'train_dataloader.dataset.pipeline.0.type=X'),
    *('train_dataloader.dataset.pipeline.99.type=X', 'model.backbone=[1,(2,{'),
    *('optim_wrapper=None', 'optim_wrapper=3', 'optim_wrapper.type=None'),
    *('default_scope=mmdet', 'default_scope=3', 'work_dir=3', 'work_dir=[1]'),
    *('tta_model=3', 'tta_pipeline=None', 'test_dataloader=3', 'test_evaluator=[]'),
    *('visualizer=3', 'default_hooks=3', 'default_hooks.visualization=1'),
    *('train_dataloader=[]', 'train_dataloader.dataset=3', 'val_evaluator=3'),
    *('train_dataloader.dataset.data_root=3', 'train_dataloader.dataset.data_prefix=3'),
    *('custom_hooks=3', 'model.type=3', 'model.backbone.type=None', '_delete_=True'),
    *('train_dataloder.batch_size=4', 'model.backbone.arch=dict(depths=3)', 'x.type=X'),
    *('model.neck.type=X', 'model.neck=[dict(', 'model.x={{{', 'randomness.seed=x'),
    *('model._delete_=True', 'model.backbone._delete_=True', '_base_=3', 'x=\0'),
)


@cache
def text(name, flat):
    path = REPO / 'configs' / f'{name}.py'
    if flat:
        return Config.fromfile(path).pretty_text
    # Read from elsewhere.
    return path.read_text().replace("'./", f"'{path.parent}/")


def spoil(rng, source):
    how = rng.choice(('none', 'cut', 'flip', 'value', 'value', 'value', 'name', 'line'))
    if how == 'cut':
        source = source[: rng.randrange(len(source))]
    elif how == 'flip':
        content = bytearray(source.encode())
        for _ in range(rng.choice((1, 5))):
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        return how, bytes(content)
    elif how in ('value', 'name'):
        pattern = r'(?<==)[^=,()\n]+' if how == 'value' else r'\w+(?=\s?=)'
        found = rng.choice(list(re.finditer(pattern, source)))
        new = rng.choice(_VALUES) if how == 'value' else rng.choice(('x', 'type', '_'))
        source = source[: found.start()] + new + source[found.end() :]
    elif how == 'line':
        lines = source.splitlines()
        lines.insert(rng.randrange(len(lines)), lines.pop(rng.randrange(len(lines))))
        source = '\n'.join(lines)
    return how, source.encode(errors='replace')


def check_config(rng, folder, say):
    """Read a spoilt config as the tools do; its kind and how it ended."""
    how, content = spoil(rng, text(rng.choice(CONFIGS), rng.random() < 0.8))
    path = folder / 'case_config.py'
    path.write_bytes(content)
    options = rng.sample(_OPTIONS, rng.choice((0, 0, 1, 3)))
    if rng.random() < 0.2:
        keys = re.findall(r'\b[a-z_]+(?==)', content.decode(errors='ignore'))
        key = rng.choice(keys or ['x'])
        options.append(f'{key}={rng.choice(_VALUES)}')
    say(f'config, {how}, {options}')
    try:
        use, needed = rng.choice(_USES)
        use(load_config(str(path), options, required=('model', *needed)))
    except UsageError:
        return 'config', 'refused'
    return 'config', 'taken'


def keep(cfg):
    keep_predictions(cfg, 'predictions')


def check(cfg):
    check_datasets(cfg, ('train', 'val', 'test'))


# What the tools that do this require of a config.
_USES = (
    (enable_amp, ('train_dataloader', 'train_cfg', 'optim_wrapper')),
    (enable_tta, ('test_dataloader', 'test_evaluator')),
    (enable_painting, ('test_dataloader', 'test_evaluator')),
    (keep, ('test_dataloader', 'test_evaluator')),
    (check, ()),
)
