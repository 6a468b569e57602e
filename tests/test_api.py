"""What others build on changes only where ``api.txt`` and the changelog say so.

``python tests/test_api.py`` writes the file anew.
"""

import ast
import difflib
import inspect
from pathlib import Path

import mmvssm
import mmvssm.export
from mmvssm import classification

REPO = Path(__file__).parents[1]
API = Path(__file__).with_name('api.txt')
MODULES = (mmvssm, mmvssm.ops, mmvssm.layers, mmvssm.backbones, mmvssm.export)


class Shown:
    """A default as it is written down: the same at every run."""

    def __init__(self, value):
        self.value = value

    def __repr__(self):
        if isinstance(self.value, frozenset):
            return f'{{{", ".join(map(repr, sorted(self.value)))}}}'
        return '<function>' if inspect.isfunction(self.value) else repr(self.value)


def shown(parameter):
    """Name, kind and default; types are left to the docs."""
    default = parameter.default
    if default is not parameter.empty:
        default = Shown(default)
    return parameter.replace(annotation=parameter.empty, default=default)


def signature(thing):
    try:
        found = inspect.signature(thing)
    except (TypeError, ValueError):
        return ''
    parameters = map(shown, found.parameters.values())
    return str(inspect.Signature(list(parameters)))


def names_of(module):
    for name in sorted(module.__all__):
        thing = getattr(module, name)
        if not inspect.ismodule(thing):
            yield f'{module.__name__}.{name}{signature(thing)}'


def registered():
    """Registry and type of every class under ``@REGISTRY.register_module()``."""
    for path in (REPO / 'mmvssm').rglob('*.py'):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                for mark in map(ast.unparse, node.decorator_list):
                    if '.register_module(' in mark:
                        yield f'{mark.partition(".")[0]}: mmvssm.{node.name}'
    for registry, _, names in classification.PARTS:
        kind = next(k for k, r in vars(mmvssm.registry).items() if r is registry)
        yield from (f'{kind}: mmvssm.{name}' for name in names)


def flags():
    """Flags and positional arguments of the tools, and of ``python -m``."""
    for path in [*(REPO / 'tools').glob('*.py'), *(REPO / 'mmvssm').glob('*.py')]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(
                '.add_argument'
            ):
                names = [ast.literal_eval(arg) for arg in node.args]
                yield f'{path.relative_to(REPO)} {" ".join(names)}'


def listing():
    parts = {f'Names of {m.__name__}': names_of(m) for m in MODULES}
    parts |= {'Registry types': registered(), 'Command lines': flags()}
    return '\n'.join(
        f'# {title}\n' + ''.join(f'{line}\n' for line in sorted(lines))
        for title, lines in parts.items()
    )


def test_public_names_and_signatures():
    change = difflib.unified_diff(
        API.read_text().splitlines(), listing().splitlines(), lineterm='', n=0
    )
    text = '\n'.join(list(change)[2:])
    assert not text, (
        f'others may build on this:\n{text}\nIf the change is meant, run `python '
        'tests/test_api.py` and tell of it in CHANGELOG.md'
    )


def test_every_part_is_there():
    text = API.read_text()
    for line in (
        'mmvssm.list_models(pattern=None, pretrained=False)',
        'MODELS: mmvssm.VSSM',
        'HOOKS: mmvssm.SafeCheckpointHook',
        'tools/train.py --resume',
        'mmvssm/check_gpu.py --all',
    ):
        assert line in text.splitlines()


if __name__ == '__main__':
    API.write_text(listing())
