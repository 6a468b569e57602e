"""What was found in a data set."""

from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from mmengine.registry import Registry

Level = Literal['error', 'warning', 'note']


@dataclass(frozen=True)
class Finding:
    """One thing to know of a data set.

    Attributes:
        level (str): ``'error'``: it contradicts the config, no training starts.
            ``'warning'``: likely a mistake. ``'note'``: good to know.
        text (str): One sentence that names the file and the remedy.
    """

    level: Level
    text: str


@dataclass
class DatasetReport:
    """Counts of a data set, and what is wrong with it.

    Attributes:
        split (str): ``'train'``, ``'val'`` or ``'test'``, several where they are the
            same data.
        labels (str): Folder of the masks, or file of the annotations.
        images (int): Number of images.
        read (int): Number of those that were opened.
        sizes (collections.Counter): Images by height and width, such as ``'64x80'``.
        channels (collections.Counter): Images by channels, after loading.
        classes (dict): By name of a class: what was counted.
        ignored (dict): By reason: share of the pixels, or number of the objects.
        findings (list[Finding]): What to know.
        problems (list[int]): Numbers of the images that findings name.
    """

    split: str
    labels: str
    images: int = 0
    read: int = 0
    sizes: Counter = field(default_factory=Counter)
    channels: Counter = field(default_factory=Counter)
    classes: dict[str, dict[str, float]] = field(default_factory=dict)
    ignored: dict[str, float] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    problems: list[int] = field(default_factory=list)

    def add(self, level: Level, text: str, index: int | None = None) -> None:
        """Add a finding, and the image that shows it."""
        self.findings.append(Finding(level, text))
        if index is not None:
            self.problems.append(index)

    def of(self, *levels: Level) -> list[str]:
        """Texts of the findings of these levels."""
        return [found.text for found in self.findings if found.level in levels]

    def as_dict(self) -> dict[str, Any]:
        """What JSON can hold."""
        return {
            **vars(self),
            'sizes': dict(self.sizes),
            'channels': dict(self.channels),
            'findings': [asdict(found) for found in self.findings],
        }

    def text(self) -> str:
        """Some lines to read."""
        counted = f'{self.images} images, {self.read} read'
        if not self.images:
            counted = 'not read'
        lines = [f'{self.split}: {counted}, {self.labels}']
        for name, counts in (('sizes', self.sizes), ('channels', self.channels)):
            if not counts:
                continue
            shown = [f'{key} ({count})' for key, count in counts.most_common(6)]
            more = ['...'] if len(counts) > 6 else []
            lines.append(f'  {name:10}{", ".join([*shown, *more])}')
        width = max((len(name) for name in self.classes), default=0)
        for number, (name, counts) in enumerate(self.classes.items()):
            values = ', '.join(_shown(key, value) for key, value in counts.items())
            lines.append(f'  {number:4}  {name:{width}}  {values}')
        for reason, value in self.ignored.items():
            lines.append(f'  ignored: {reason}: {_shown("", value)}')
        lines += [f'  {found.level}: {found.text}' for found in self.findings]
        return '\n'.join(lines)


def _shown(key: str, value: float) -> str:
    if isinstance(value, float):
        return f'{value:.2%} {key}'.strip()
    return f'{value} {key}'.strip()


def shorten(names: Any, most: int = 8) -> str:
    """The first of some names, and how many more there are."""
    names = list(map(str, names))
    more = f' and {len(names) - most} more' if len(names) > most else ''
    return (', '.join(names[:most]) or 'none') + more


def registered(registry: Registry, kind: Any) -> Any:
    """What a ``type`` of a config stands for, in the scope of the config."""
    if not isinstance(kind, str):
        return kind
    with registry.switch_scope_and_registry(None) as found:
        return found.get(kind)
