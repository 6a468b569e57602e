"""What every study gets, and what becomes of its result."""

import argparse
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from mmvssm.analysis.studies.images import ImageSource, StudyImage, open_images
from mmvssm.analysis.studies.subjects import StudyModel, Subject, parse_subjects
from mmvssm.engine import UsageError
from mmvssm.engine.inference.device import checked_device
from mmvssm.ops.checks import NaNInputError

T = TypeVar('T')


def _no_arguments(parser: argparse.ArgumentParser) -> None:
    pass


@dataclass(frozen=True, kw_only=True)
class Study:
    """The record of a study.

    Attributes:
        name: First word of the command line, and of the names of the files.
        shows: One line for ``--help``.
        run: Carries it out, writes pictures to :meth:`Job.picture`, and returns what
            goes to ``results`` of the JSON file: numbers, strings, None, lists, and
            dicts with strings as keys.
        add_arguments: Adds the study's own arguments to its parser.
        sizes: Height and width of the images by default; more than one for a study
            that compares sizes.
        several_sizes: Whether each number of ``--size`` is a (square) size.
        count: Number of images by default.
        labelled: Whether images need labels. By default all of ``--data`` are taken.
        masked: Whether ``--masks`` is taken.
    """

    name: str
    shows: str
    run: Callable[['Job'], dict[str, Any]]
    add_arguments: Callable[[argparse.ArgumentParser], None] = _no_arguments
    sizes: Sequence[tuple[int, int]] = ((224, 224),)
    several_sizes: bool = False
    count: int = 4
    labelled: bool = False
    masked: bool = False


@dataclass
class Job:
    """A study with its models, images and settings.

    Attributes:
        study: The record.
        subjects: The models, not built.
        source: The images, not read.
        sizes: Heights and widths.
        out_dir: Where files go.
        device, seed: As given.
        options: All arguments, those of the study among them.
    """

    study: Study
    subjects: list[Subject]
    source: ImageSource
    sizes: list[tuple[int, int]]
    out_dir: Path
    device: str
    seed: int
    options: argparse.Namespace
    _models: dict[str, dict] = field(default_factory=dict)
    _images: dict[tuple[int, int], list[StudyImage]] = field(default_factory=dict)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the images, for a study of one size."""
        return self.sizes[0]

    def build(self, subject: Subject, trained: bool = True) -> StudyModel:
        """Build a model on the job's device, and note it for the JSON file."""
        model = subject.build(self.device, self.seed, trained)
        self._models[subject.label] = model.describe()
        return model

    def models(self, trained: bool = True) -> Iterator[StudyModel]:
        """The models, each built when the one before is done with."""
        for subject in self.subjects:
            yield self.build(subject, trained)

    def images(self, size: tuple[int, int] | None = None) -> list[StudyImage]:
        """All images in a size; a study of many images takes ``source`` instead."""
        size = size or self.size
        if size not in self._images:
            source = self.source
            self._images[size] = [source.load(i, size) for i in range(len(source))]
        return self._images[size]

    def picture(self, name: str = '') -> Path:
        """A PNG file of the study to write; ``name`` tells several apart."""
        part = f'_{file_name(name)}' if name else ''
        return self.out_dir / f'{self.study.name}{part}.png'

    def progress(self, items: Iterable[T], what: str, total: int | None = None):
        """Go through items with a progress bar."""
        from tqdm import tqdm

        return tqdm(items, desc=what, total=total, leave=False)


def run_study(study: Study, args: argparse.Namespace) -> Path:
    """Carry out a study as the command line says.

    Args:
        study: The record.
        args: Of the parser of ``tools/analyze.py``.

    Returns:
        The JSON file. Its keys are in docs/studies.md.

    Raises:
        UsageError, CheckpointError: A model, an image or an argument is of no use.
    """
    if args.seed < 0 or (args.num_images or 0) < 0:
        raise UsageError('--seed and --num-images must not be negative.')
    job = Job(
        study,
        parse_subjects(args.models, args.cfg_options),
        open_images(
            args.images,
            args.data,
            _count(study, args),
            args.seed,
            getattr(args, 'masks', None),
            getattr(args, 'mask_background', (0,)),
            study.labelled,
        ),
        parse_sizes(args.size, study),
        Path(args.out_dir),
        checked_device(args.device),
        args.seed,
        args,
    )
    if not len(job.source):
        raise UsageError('there is no image: --num-images must be at least 1.')
    try:
        job.out_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f'cannot make the folder {job.out_dir}: {error}') from error
    try:
        results = study.run(job)
    except NaNInputError as error:
        raise UsageError(
            f'{study.name}: a model computes NaN for these images ({error}). Its '
            'weights are of no use, or too large for their dtype.'
        ) from error
    return write_json(job, results)


def _count(study: Study, args: argparse.Namespace) -> int:
    if args.num_images is not None:
        return args.num_images
    return 0 if study.labelled and args.data else study.count


def write_json(job: Job, results: dict[str, Any]) -> Path:
    """Write ``STUDY.json``.

    Raises:
        UsageError: A number of the results is not finite.
    """
    import mmvssm

    if where := not_finite(results):
        raise UsageError(
            f'{job.study.name}: {where} is not finite. The weights of that model, or '
            'its output for these images, hold NaN or infinity.'
        )
    source = job.source
    content = dict(
        study=job.study.name,
        mmvssm=mmvssm.__version__,
        torch=torch.__version__,
        device=job.device,
        seed=job.seed,
        sizes=[list(size) for size in job.sizes],
        images=len(source),
        models=[job._models[s.label] for s in job.subjects if s.label in job._models],
        results=results,
    )
    path = job.out_dir / f'{job.study.name}.json'
    path.write_text(json.dumps(content, indent=2, allow_nan=False) + '\n')
    return path


def not_finite(part: Any, name: str = 'results') -> str | None:
    """Name of the first number in dicts and lists that is NaN or infinite, or None."""
    if isinstance(part, float):
        return None if math.isfinite(part) else name
    if isinstance(part, dict):
        inner = ((f'{name}.{key}', value) for key, value in part.items())
    elif isinstance(part, (list, tuple)):
        inner = ((f'{name}[{i}]', value) for i, value in enumerate(part))
    else:
        return None
    return next(filter(None, (not_finite(value, key) for key, value in inner)), None)


def rounded(values: Any, digits: int = 6) -> Any:
    """Tensors, arrays and numbers as lists and floats of so many significant digits."""
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu().double().numpy()
    if isinstance(values, np.ndarray):
        values = values.tolist()
    if isinstance(values, (list, tuple)):
        return [rounded(value, digits) for value in values]
    return float(f'{float(values):.{digits}g}')


def parse_sizes(given: Sequence[str] | None, study: Study) -> list[tuple[int, int]]:
    """Read ``--size``.

    Args:
        given: Numbers, or HEIGHTxWIDTH each. Two numbers are height and width, unless
            the study compares sizes.
        study: Its default is taken where nothing is given.

    Raises:
        UsageError: It is no size, or more than the study takes.
    """
    if not given:
        return [tuple(size) for size in study.sizes]
    sizes = []
    for entry in given:
        sides = entry.lower().split('x')
        if len(sides) > 2 or not all(map(_is_positive, sides)):
            raise UsageError(f'--size takes positive numbers or HxW, got {entry}.')
        sizes.append((int(sides[0]), int(sides[-1])))
    if study.several_sizes:
        return sizes
    if len(given) == 2 and not any('x' in entry.lower() for entry in given):
        return [(sizes[0][0], sizes[1][0])]
    if len(sizes) > 1:
        raise UsageError(f'--size of {study.name} is HEIGHT WIDTH, got {given}.')
    return sizes


def _is_positive(text: str) -> bool:
    return text.isascii() and text.isdigit() and int(text) > 0


def spread(count: int, most: int) -> list[int]:
    """At most so many of ``count`` layers, evenly spaced; the last one is among them.

    Four of 24 are 5, 11, 17 and 23.
    """
    most = min(count, most)
    return [count * (i + 1) // most - 1 for i in range(most)]


def file_name(text: str) -> str:
    """The text with nothing that a file name should not have."""
    kept = ''.join(c if c.isalnum() or c in '-._' else '_' for c in text)
    return kept.strip('_.') or 'model'


def print_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a table; numbers with three digits behind the point."""
    cells = [
        [f'{cell:.3f}' if isinstance(cell, float) else str(cell) for cell in row]
        for row in (header, *rows)
    ]
    widths = [max(map(len, column)) for column in zip(*cells)]
    for row in cells:
        first, *others = row
        line = [first.ljust(widths[0])]
        line += [cell.rjust(width) for cell, width in zip(others, widths[1:])]
        print('  '.join(line).rstrip())
