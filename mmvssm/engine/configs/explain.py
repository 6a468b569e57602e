"""One sentence for a config's mistake that mmengine finds when it builds a part.

Only what has failed is explained, so nothing is refused that would have worked.
"""

import difflib
import inspect
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from importlib import import_module
from traceback import walk_tb
from typing import Any

import mmengine.registry
from mmengine.config import Config
from mmengine.registry import FUNCTIONS, OPTIMIZERS, Registry

# Where near names are looked for besides the scopes in use.
TOOLBOXES = ('mmseg', 'mmdet', 'mmpretrain', 'mmvssm')
# What the functions of mmengine and mmcv that look up a type call it.
_TYPES = ('obj_type', 'scheduler_type', 'layer_type')
# Where mmengine looks up a name and does not look at what it found: the variable for
# that, what has the name, and the registry.
_UNSEEN = (
    ('optimizer_cls', 'self.optimizer_cfg', OPTIMIZERS),
    ('collate_fn', 'collate_fn_type', FUNCTIONS),
    ('worker_init_fn', 'worker_init_fn_type', FUNCTIONS),
)
# Where mmengine hands entries of a config to something that is in no registry.
_CALLERS = ('mmengine.runner.runner', 'mmengine.runner._flexible_runner')
_UNEXPECTED = re.compile(r"([\w.]+)\(\) got an unexpected keyword argument '(\w+)'")
_MISSING = re.compile(r'([\w.]+)\(\) missing \d+ required .*argument')


def explain(error: BaseException, cfg: Config | None = None) -> str | None:
    """What of a config is wrong, if that is why building it failed.

    Args:
        error: As it was caught. Its frames tell what was built.
        cfg: The config. By default the first one in the frames.

    Returns:
        The sentence: an unknown ``type``, or an argument that it does not take or
        lacks. None if the error is of another kind.
    """
    frames = [frame.f_locals for frame, _ in walk_tb(error.__traceback__)]
    if not frames:
        return None
    if cfg is None:
        values = (value for frame in frames for value in frame.values())
        cfg = next((value for value in values if isinstance(value, Config)), None)
    nodes = list(_nodes(cfg)) if cfg is not None else []
    if isinstance(error, KeyError):
        return _explain_key_error(frames[-1], nodes, cfg)
    if isinstance(error, (AssertionError, TypeError)):
        for frame in frames:
            for found, source, registry in _UNSEEN:
                name = _name_in(frame, source)
                if name is not None and frame.get(found, name) is None:
                    return _unknown(name, registry, None, nodes, cfg)
    if isinstance(error, TypeError):
        inner = list(walk_tb(error.__traceback__))[-1][0].f_globals
        return _explain_arguments(str(error), frames, inner, nodes)
    return None


def near(name: str, known: Iterable[str], number: int = 3) -> list[str]:
    """Names that somebody may have meant, the most likely first."""
    known = list(dict.fromkeys(known))
    low = {other: other.lower() for other in known}
    same = [other for other in known if low[other] == name.lower()]
    close = difflib.get_close_matches(name.lower(), low.values(), number, 0.75)
    return list(
        dict.fromkeys([*same, *(o for c in close for o in known if low[o] == c)])
    )[:number]


def did_you_mean(names: list[str], otherwise: str = '') -> str:
    """The end of a sentence."""
    meant = ' or '.join(map(repr, names))
    return f'; did you mean {meant}?' if names else otherwise


def is_scope(name: str) -> bool:
    """Whether some registry belongs to a scope, after an import of its package."""
    # A package of the user's can fail in any way; mmengine ignores that, too.
    with suppress(Exception):
        import_module(f'{name}.registry')
    roots = [r for r in vars(mmengine.registry).values() if isinstance(r, Registry)]
    return any(r.scope == name for root in roots for r in _descendants(root))


# A type that no registry has


def _explain_key_error(built: dict, nodes: list, cfg: Config | None) -> str | None:
    registry, node = built.get('registry'), built.get('cfg')
    name = next((built[key] for key in _TYPES if isinstance(built.get(key), str)), None)
    if name is None and isinstance(node, dict) and 'type' not in node:
        path = _path_of(node, None, nodes) or 'a part of the config'
        return f'{path} must have a type, and is {dict(node)!r:.80}.'
    if name is None or not isinstance(registry, Registry) or registry.get(name):
        return None
    return _unknown(name, registry, node, nodes, cfg)


def _name_in(frame: dict, source: str) -> str | None:
    if source.startswith('self.'):
        owner = getattr(frame.get('self'), source.removeprefix('self.'), None) or {}
        name = owner.get('type')
    else:
        name = frame.get(source)
    return name if isinstance(name, str) else None


def _unknown(
    name: str, registry: Registry, node: Any, nodes: list, cfg: Config | None
) -> str:
    with registry.switch_scope_and_registry(None) as found_in:
        registry = found_in
    scope, _, bare = name.rpartition('.')
    known = _known_names(registry)
    exact = [full for full, other in known if other == bare and full != name]
    place = f'{path}: ' if (path := _path_of(node, name, nodes, 'type')) else ''
    own = scope if scope and is_scope(scope) else registry.scope
    default = cfg.get('default_scope') if cfg is not None else None
    tail = ''
    if exact and not scope and exact[0].split('.')[0] in TOOLBOXES[:-1]:
        tail = f' The default_scope of the config is {default!r}.'
    return (
        f"{place}{name!r} is not in {own}'s {registry.name} registry"
        + did_you_mean(
            exact or _near_names(bare, known),
            '. If it is your own, name its module in custom_imports.',
        )
        + tail
    )


def _near_names(bare: str, found: list[tuple[str, str]]) -> list[str]:
    order = near(bare, [other for _, other in found])
    full_names = [full for name in order for full, other in found if other == name]
    return list(dict.fromkeys(full_names))[:3]


def _known_names(registry: Registry) -> list[tuple[str, str]]:
    """All names of a kind of part: as one writes them here, and without scope."""
    for scope in TOOLBOXES:
        is_scope(scope)
    line, above = [], registry
    while above is not None:
        line.append(above)
        above = above.parent
    others = [r for r in _descendants(line[-1]) if r not in line]
    for other in others:
        if other.scope in TOOLBOXES:
            # What cannot be imported has no names.
            with suppress(Exception):
                other.import_from_location()
    return [
        (f'{r.scope}.{name}' if r in others else name, name)
        for r in (*line, *others)
        for name in r.module_dict
    ]


def _descendants(registry: Registry) -> Iterator[Registry]:
    yield registry
    for child in registry.children.values():
        yield from _descendants(child)


# Arguments


def _explain_arguments(
    message: str, frames: list[dict], names: dict, nodes: list
) -> str | None:
    built = next((f for f in reversed(frames) if {'registry', 'cfg'} <= set(f)), {})
    built = dict(built, obj_cls=_loaded(built.get('obj_cls')))
    kind = built.get('obj_type')
    inner = {'registry', 'cfg'} <= set(frames[-1])
    if inner and 'cfg should be a dict' in message:
        return f'a part of the config must be a dict with a type: {built["cfg"]!r:.80}.'
    if found := _UNEXPECTED.search(message):
        return _explain_unexpected(*found.groups(), built, names, nodes)
    classes = getattr(built.get('obj_cls'), '__mro__', ())
    names_of_it = {kind.__name__ for kind in classes}
    found = _MISSING.search(message)
    if found and (inner or found[1].partition('.')[0] in names_of_it):
        path = _path_of(built['cfg'], kind, nodes)
        what = message[found.start() :].partition('() ')[2]
        return f'{path or "a part of the config"}: {_shown(kind)} is {what}.'
    return None


def _explain_unexpected(
    function: str, key: str, built: dict, names: dict, nodes: list
) -> str | None:
    node, called = built.get('cfg'), built.get('obj_cls')
    who = _shown(built.get('obj_type'))
    path = None
    if isinstance(node, dict) and key in node:
        path = _path_of(node, built.get('obj_type'), nodes)
    elif names.get('__name__') not in _CALLERS:
        return None
    else:
        # Such as DataLoader.
        places = [
            path for path, value in nodes if isinstance(value, dict) and key in value
        ]
        if not places:
            return None
        path = places[0] if len(places) == 1 else None
        called = names.get(function.split('.')[0])
        if not function.endswith('.__init__'):
            called = getattr(called, function.rpartition('.')[2], called)
        who = function.removesuffix('.__init__').rpartition('.')[2]
    known = _parameters(called) if callable(called) else []
    if key in known:
        return None  # It does not hand it on as it should.
    listed = f'. It takes {", ".join(known)}.' if known else '.'
    place = f'{path}: ' if path else ''
    return f'{place}{who} takes no {key!r}{did_you_mean(near(key, known), listed)}'


def _loaded(called: Any) -> Any:
    """The class behind a function that imports it (:mod:`mmvssm.classification`)."""
    return called.load_class() if hasattr(called, 'load_class') else called


def _shown(kind: Any) -> str:
    return kind if isinstance(kind, str) else getattr(kind, '__name__', str(kind))


def _parameters(called: Callable) -> list[str]:
    """Names of arguments, those that ``**kwargs`` hands to a base class among them."""
    functions = [called]
    if inspect.isclass(called):
        functions = [
            vars(c)['__init__'] for c in called.__mro__ if '__init__' in vars(c)
        ]
    found = []
    for function in functions:
        try:
            given = list(inspect.signature(function).parameters.values())
        except (TypeError, ValueError):
            break
        found += [
            p.name
            for p in given
            if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and p.name != 'self'
        ]
        if all(p.kind is not p.VAR_KEYWORD for p in given):
            break
    return list(dict.fromkeys(found))


# Where a part is


def _nodes(value: Any, path: str = '') -> Iterator[tuple[str, Any]]:
    """All values of a config with their keys, the outer ones first."""
    if path:
        yield path, value
    if isinstance(value, (Config, dict)):
        # Not items() of mmengine, which builds what is lazy.
        value = value._cfg_dict if isinstance(value, Config) else value
        children: Iterable = dict.items(value)
    elif isinstance(value, (list, tuple)):
        children = enumerate(value)
    else:
        return
    for key, child in children:
        yield from _nodes(child, f'{path}.{key}' if path else str(key))


def _path_of(node: Any, kind: Any, nodes: list, key: str | None = None) -> str | None:
    """Where in the config a part is that is built, or the name of its type."""
    end = f'.{key}' if key else ''
    for path, value in nodes:
        if isinstance(node, dict) and isinstance(value, dict) and _equal(value, node):
            return path + end
    if kind is None:
        return None
    for path, value in nodes:
        if isinstance(value, dict) and dict.get(value, 'type') == kind:
            return path + end
    # Not every name is a type, such as the constructor of an optimizer wrapper.
    named = [path for path, value in nodes if isinstance(value, str) and value == kind]
    return named[0] if key and named else None


def _equal(one: Any, other: Any) -> bool:
    try:
        return bool(one == other)
    except Exception:  # Such as arrays.
        return False
