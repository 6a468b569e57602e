"""``--cfg-options``: entries of a config, overridden on the command line."""

import argparse
import ast
import inspect
from collections.abc import Iterator, Sequence
from typing import Any

from mmengine.config import Config, DictAction
from mmengine.logging import print_log
from mmengine.runner import FlexibleRunner, Runner

from mmvssm.engine.errors import UsageError
from mmvssm.engine.launching.ranks import rank_by_launcher

from .explain import did_you_mean, near

# What mmengine's runners look up in a config besides their arguments, and what the
# tools do.
_READ_BY_NAME = (
    *('activation_checkpointing', 'compile', 'custom_imports', 'data_preprocessor'),
    *('efficient_conv_bn_eval', 'find_unused_parameters', 'model_wrapper_cfg'),
    *('sync_bn', 'tta_model', 'tta_pipeline'),
    *('generator', 'schedules', 'training_seconds'),
)


def merge_options(cfg: Config, options: Sequence[str], path: str) -> None:
    """Override entries of a config.

    A value is what mmengine's ``DictAction`` makes of it, or a dict as Python writes
    it. An entry that was not there before is logged.

    Args:
        cfg: Changed in place.
        options: ``'key.subkey=value'`` strings of ``--cfg-options``.
        path: What the message of an error calls the config.

    Raises:
        UsageError: An option does not fit: it is no such string, its value cannot be
            read, or the config has nothing that the key could belong to.
    """
    given: dict[str, Any] = {}
    notes = []
    # What gets a type is a part of its own, and may be new.
    parts = {o.partition('.type=')[0] for o in options if '.type=' in o}
    for option in options:
        key, equals, text = option.partition('=')
        if not (equals and all(key.split('.'))):
            raise UsageError(f'--cfg-options {option}: write KEY.SUBKEY=VALUE.')
        if not any(key.startswith(f'{other}.') for other in given):
            notes += _check_key(cfg, key, path, parts)
        given[key] = _parse(option, text)
    try:
        cfg.merge_from_dict(given)
    except Exception as error:
        # mmengine's own check fails in whichever way the wrong entry makes it.
        raise UsageError(
            f'--cfg-options {" ".join(options)} does not fit {path}: '
            f'{str(error).rstrip(".")}. Write KEY.SUBKEY=VALUE.'
        ) from error
    for note in notes if not rank_by_launcher() else ():
        print_log(note, 'current')


def parse_options(options: Sequence[str]) -> dict[str, Any]:
    """``'key=value'`` strings of ``--cfg-options`` where there is no config.

    Raises:
        UsageError: An option is no such string, or its value cannot be read.
    """
    found = {}
    for option in options:
        key, equals, text = option.partition('=')
        if not (equals and key.isidentifier()):
            raise UsageError(f'--cfg-options {option}: write KEY=VALUE.')
        found[key] = _parse(option, text)
    return found


def _parse(option: str, text: str) -> Any:
    value = text.strip().strip('\'"')
    bracketed = value.startswith(('(', '[')) and ('dict(' in value or '{' in value)
    try:
        if bracketed or value.startswith(('dict(', '{')):
            return ast.literal_eval(
                _WithoutCalls().visit(ast.parse(value, mode='eval'))
            )
        found = argparse.Namespace()
        DictAction(['--options'], 'options')(argparse.ArgumentParser(), found, [option])
        return found.options[option.partition('=')[0]]
    except Exception as error:
        raise UsageError(
            f'--cfg-options {option}: the value cannot be read. Write it as in Python, '
            'in quotes for the shell: KEY="dict(type=\'X\', sizes=(1, 2))".'
        ) from error


class _WithoutCalls(ast.NodeTransformer):
    """Makes ``{'a': 1}`` of ``dict(a=1)``; no other call is run."""

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        names = [keyword.arg for keyword in node.keywords]
        is_dict = isinstance(node.func, ast.Name) and node.func.id == 'dict'
        if not is_dict or node.args or None in names:
            return node
        keys: list = [ast.Constant(name) for name in names]
        return ast.Dict(keys, [keyword.value for keyword in node.keywords])


def _check_key(cfg: Config, key: str, path: str, parts: set[str]) -> Iterator[str]:
    """Refuse a key whose parent is not there; yields what to log about another."""
    *parents, last = key.split('.')
    top = key.partition('.')[0]
    read = _read_by_name()
    if 'data_preprocessor' in (cfg.get('model') or {}):
        read.remove('data_preprocessor')  # It is for models without one.
    if top not in cfg and top not in read:
        raise UsageError(
            f'--cfg-options {key}: {path} has no {top!r}, and nothing reads it'
            f'{did_you_mean(near(top, {*cfg, *read}), ".")}'
        )
    if parents and top not in cfg:
        return  # All of it is new.
    here: Any = cfg
    for number, parent in enumerate(parents):
        children = _children(here)
        if parent not in children:
            meant = near(parent, children)
            whole = '.'.join(parents[: number + 1])
            if isinstance(here, dict) and not meant and whole in parts:
                yield f'--cfg-options adds {key} to the config'
                return
            inner = key.removeprefix(f'{whole}.')
            simple = isinstance(here, dict) and '.' not in inner
            add = f'. To add it: {whole}="dict({inner}=...)".' if simple else '.'
            raise UsageError(
                f'--cfg-options {key}: {".".join(parents[:number])} of {path} has no '
                f'{parent!r}{did_you_mean(meant, add)}'
            )
        here = children[parent]
    is_new = isinstance(here, (Config, dict)) and last not in here
    if parents and is_new and last != '_delete_':
        close = near(last, here, 1)
        yield f'--cfg-options adds {key} to the config' + (
            f', which has {".".join([*parents, close[0]])}, too' if close else ''
        )
    if top not in read:
        yield f'--cfg-options {key}: what {path} made of {top} keeps its value'


def _children(node: Any) -> dict[str, Any]:
    if isinstance(node, (list, tuple)):
        return {str(index): child for index, child in enumerate(node)}
    return dict(node.items()) if isinstance(node, (Config, dict)) else {}


def _read_by_name() -> set[str]:
    """Entries of a config that count even if its file does not have them."""
    names = set(_READ_BY_NAME)
    for runner in (Runner, FlexibleRunner):
        names |= set(inspect.signature(runner.__init__).parameters)
    return names - {'self', 'cfg'}
