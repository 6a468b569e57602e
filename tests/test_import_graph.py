"""Modules of the package import in one direction, inside functions too."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import mmvssm

PACKAGE = Path(mmvssm.__file__).parent
# A folder or file of the package imports only what stands before it here.
LAYERS = (
    *(
        'openmp',
        'registry',
        'errors',
        'compat',
        'ops',
        'layers',
        'heads',
        'necks',
        'families',
    ),
    *('backbones', 'data_preprocessor', 'zoo', 'checkpoints', 'builders'),
    *('pretrained', 'timm', 'datasets', 'analysis', 'engine', 'classification'),
    *('analysis.studies', 'export'),
    *('collect_env', 'check_gpu'),
)


def modules(package):
    """Name -> file of every module."""
    found = {}
    for path in package.rglob('*.py'):
        parts = (package.name, *path.relative_to(package).with_suffix('').parts)
        found['.'.join(parts).removesuffix('.__init__')] = path
    return found


def imports(name, path, known):
    """Modules of the package that a module names in an import, wherever it stands."""
    package = name if path.name == '__init__.py' else name.rpartition('.')[0]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ''
            if node.level:
                above = package.split('.')[: len(package.split('.')) + 1 - node.level]
                base = '.'.join([*above, *filter(None, [node.module])])
            for alias in node.names:
                inner = f'{base}.{alias.name}'
                found.add(inner if inner in known else base)
    return (found & set(known)) - {name}


def graph(package):
    known = modules(package)
    return {name: imports(name, path, known) for name, path in known.items()}


def test_no_cycle():
    try:
        TopologicalSorter(graph(PACKAGE)).prepare()
    except CycleError as error:
        pytest.fail('modules import each other: ' + ' <- '.join(error.args[1]))


def test_folders_import_one_way():
    found = graph(PACKAGE)
    rank = {f'mmvssm.{part}': place for place, part in enumerate(LAYERS)}

    def place(name):
        parts = name.split('.')
        return rank.get('.'.join(parts[:3]), rank.get('.'.join(parts[:2])))

    wrong = []
    for name, others in found.items():
        if name == 'mmvssm':
            continue  # It imports all, and nothing imports it.
        assert place(name) is not None, f'{name} has no place in LAYERS'
        for other in others:
            # The version stands in the package itself.
            if other != 'mmvssm' and place(other) > place(name):
                wrong.append(f'{name} imports {other}')
    assert not wrong


@pytest.mark.parametrize(
    'text',
    ['import toy.b', 'from toy.b import x', 'from . import b', 'from .b import x'],
)
def test_a_cycle_inside_a_function_is_seen(tmp_path, text):
    package = tmp_path / 'toy'
    package.mkdir()
    (package / '__init__.py').touch()
    (package / 'a.py').write_text(f'def f():\n    {text}\n')
    (package / 'b.py').write_text('from toy.a import f\n')
    with pytest.raises(CycleError):
        TopologicalSorter(graph(package)).prepare()
