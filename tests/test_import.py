"""Importing the package, and using it from a config, changes nothing for others."""

import json
import os
import subprocess
import sys

import pytest
from mmengine.utils import is_installed

from tiny import REPO

# In a process of its own: other tests have imported all there is.
_SCRIPT = """
import importlib, json, logging, os, pkgutil, random, signal, sys, warnings
import numpy, torch, torch._dynamo, torch._inductor.compile_fx
from mmengine.registry import HOOKS, Registry

PLAIN = (str, int, float, bool, bytes, tuple, frozenset, type(None))

def import_all(name):
    package = importlib.import_module(name)
    for module in pkgutil.walk_packages(package.__path__, name + '.'):
        # A library of C functions is no module of Python.
        if not module.name.endswith(('__main__', '._kernels')):
            yield module.name

for name in ('mmengine', 'mmseg', 'mmdet', 'mmcv'):
    try:
        for module in import_all(name):
            if name == 'mmengine' or module.count('.') == 1:
                try:
                    importlib.import_module(module)
                except Exception:
                    pass  # It needs what is not installed here.
    except ImportError:
        pass

def look():
    '''What others see: {name: value}, and tables as {name: {key: value}.'''
    values, tables = {}, {}
    for path, module in list(sys.modules.items()):
        if path.split('.')[0] not in ('mmengine', 'mmseg', 'mmdet', 'mmcv', 'torch'):
            continue
        if path.startswith(('torch._dynamo', 'torch._inductor')):
            continue  # They import their own parts when they are needed.
        for name, value in list(vars(module).items()):
            if name.startswith('__'):
                continue
            add(f'{path}.{name}', value, values, tables)
            if isinstance(value, type) and value.__module__ == path:
                for part, inner in list(vars(value).items()):
                    if not part.startswith('__'):
                        add(f'{path}.{name}.{part}', inner, values, tables)
    values['filters of warnings'] = tuple(warnings.filters)
    values['environment'] = json.dumps(dict(os.environ), sort_keys=True)
    values['signals'] = tuple(signal.getsignal(s) for s in signal.valid_signals())
    values['handlers of logs'] = tuple(logging.getLogger().handlers)
    values['hooks of Python'] = (sys.excepthook, sys.displayhook)
    values['numbers of torch'] = torch.get_rng_state().numpy().tobytes()
    values['numbers of numpy'] = numpy.random.get_state()[1].tobytes()
    values['numbers of Python'] = random.getstate()
    values['settings of torch'] = (
        torch.get_default_dtype(), torch.get_num_threads(),
        torch.are_deterministic_algorithms_enabled(), torch.is_grad_enabled(),
        torch.get_float32_matmul_precision(), torch.backends.cudnn.benchmark,
        torch.backends.cudnn.deterministic, torch.backends.mkldnn.enabled)
    return values, tables

def add(name, value, values, tables):
    if isinstance(value, Registry):
        tables[name + ' modules'] = dict(value.module_dict)
        tables[name + ' children'] = dict(value.children)
    elif isinstance(value, dict) and not name.startswith('torch.'):
        tables[name] = dict(value)
    elif isinstance(value, (list, set)) and not name.startswith('torch.'):
        values[name + ' (a list)'] = list(value)
    elif callable(value) or isinstance(value, (staticmethod, classmethod, property)):
        values[name] = value
    elif isinstance(value, PLAIN) and not name.startswith('torch.'):
        values[name] = value

def same(a, b):
    try:
        return a is b or (type(a) is type(b) and isinstance(a, PLAIN + (list,))
                          and a == b)
    except Exception:
        return False

before, tables_before = look()

import mmvssm
for name in import_all('mmvssm'):
    try:
        importlib.import_module(name)
    except ImportError as error:
        if error.name not in ('mmpretrain', 'timm', 'torchvision'):
            raise  # These are optional, and modules of their own need them.
for type_ in ('SafeCheckpointHook', 'PreemptionHook', 'NonFiniteLossHook'):
    HOOKS.build(dict(type='mmvssm.' + type_))
MORE
after, tables_after = look()
replaced = [k for k in before if k in after and not same(before[k], after[k])]
replaced += [k for k in before if k not in after]
added = []
for name, table in tables_before.items():
    now = tables_after.get(name, {})
    replaced += [f'{name} {k}' for k in table if k not in now
                 or not same(table[k], now[k]) and table[k] != now[k]]
    added += [f'{name} {key}' for key in now if key not in table]
print('LOOK ' + json.dumps(dict(replaced=replaced, added=added)))
"""


def changes(more=''):
    done = subprocess.run(
        [sys.executable, '-c', _SCRIPT.replace('MORE', more)],
        capture_output=True,
        text=True,
        cwd=REPO,
        env={**os.environ, 'CUDA_VISIBLE_DEVICES': ''},
    )
    assert done.returncode == 0, done.stderr
    (line,) = (x for x in done.stdout.splitlines() if x.startswith('LOOK '))
    found = json.loads(line.removeprefix('LOOK '))
    return set(found['replaced']), set(found['added'])


# Each passes on to what it replaced unless it is asked for a name of this package.
# docs/safety.md says so.
ALLOWED = {
    'mmengine.config.config.Config._get_cfg_path',
    'mmengine.infer.infer.BaseInferencer._load_model_from_metafile',
}


def test_importing_everything_replaces_nothing():
    pytest.importorskip('mmseg')
    replaced, added = changes()
    more = set()
    if not is_installed('mmsegmentation'):
        # This entry named a distribution that is not installed.
        names = ('MODULE2PACKAGE mmseg', 'PKG2PROJECT mmseg')
        more = {name for name in replaced if name.endswith(names)}
        assert more
    assert replaced - more == ALLOWED
    assert added
    # mmengine makes this one itself, to say something.
    log = 'mmengine.logging.logger.MMLogger._instance_dict mmengine'
    assert {name for name in added if 'mmvssm' not in name} <= {log}


def test_what_replaces_is_seen():
    replaced, _ = changes(
        'import mmvssm.engine; mmvssm.engine.install_safe_loaders();'
        'torch.load = lambda: 0; HOOKS.register_module(name="EMAHook", force=True,'
        'module=mmvssm.engine.PreemptionHook)'
    )
    text = '\n'.join(replaced)
    assert 'CheckpointLoader._schemes ' in text
    assert 'CheckpointLoader._schemes http' in text
    assert 'torch.load' in text
    assert 'HOOKS modules EMAHook' in text
