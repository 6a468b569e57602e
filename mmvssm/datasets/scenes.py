"""Scenes of textured shapes over photographs, with exact masks.

A scene is a background and a list of objects. Each object has the share of every pixel
that it covers. Images, label maps and instance masks are made from the same scene, so
they always agree.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageFilter

from mmvssm.datasets.photos import PhotoRegion, random_patch

BACKGROUND = 1
UNLABELLED = 0
# A pixel has no true label if no class covers this share of it.
PURE_SHARE = 0.75
# Side of an object in pixels, for which the texture periods below are given.
NOMINAL_SIDE = 128


class ObjectClass(NamedTuple):
    """What defines a class: shape and texture, but never colour."""

    name: str
    shape: str
    texture: str


OBJECT_CLASSES = (
    ObjectClass('striped disc', 'disc', 'stripes'),
    ObjectClass('zigzag square', 'square', 'zigzags'),
    ObjectClass('checked triangle', 'triangle', 'checks'),
    ObjectClass('rayed star', 'star', 'rays'),
    ObjectClass('dotted cross', 'cross', 'dots'),
    ObjectClass('rippled hexagon', 'hexagon', 'ripples'),
    ObjectClass('photo ring', 'ring', 'photo'),
)


@dataclass(frozen=True)
class SceneObject:
    """An object, as it looks with nothing in front of it.

    Attributes:
        category (int): Label of its class, from 2; 1 is the background.
        coverage (numpy.ndarray): float32 (H, W), the share of each pixel
            that lies inside the outline, in [0, 1].
        appearance (numpy.ndarray): float32 (H, W, 3), its colours in [0, 1]. shadow
        (numpy.ndarray): float32 (H, W), how much it darkens the things behind it,
            in [0, 1].
    """

    category: int
    coverage: np.ndarray
    appearance: np.ndarray
    shadow: np.ndarray


@dataclass(frozen=True)
class Scene:
    """A background, and the objects in front of it.

    Attributes:
        background (numpy.ndarray): float32 (H, W, 3), in [0, 1].
        objects (tuple[SceneObject, ...]): From the back to the front.
    """

    background: np.ndarray
    objects: tuple[SceneObject, ...]

    def image(self) -> np.ndarray:
        """Compose the colours: float32 (H, W, 3), in [0, 1]."""
        canvas = self.background
        for item in self.objects:
            share = item.coverage[..., None]
            canvas = canvas * (1 - item.shadow[..., None])
            canvas = canvas * (1 - share) + item.appearance * share
        return canvas

    def visible_coverage(self) -> np.ndarray:
        """Share of each pixel in which each object is visible.

        Returns:
            numpy.ndarray: float32 (1 + number of objects, H, W): the
            background, then the objects in order; sums to 1 in each pixel.
        """
        free = np.ones(self.background.shape[:2], dtype=np.float32)
        shares = []
        for item in reversed(self.objects):
            shares.append(free * item.coverage)
            free = free * (1 - item.coverage)
        return np.stack([free, *reversed(shares)])

    def label_map(self) -> np.ndarray:
        """Label of each pixel, as ADE20K writes them.

        Returns:
            numpy.ndarray: uint8 (H, W): the class (from 1) that covers at least
            ``PURE_SHARE`` of the pixel, or 0 if there is none (at anti-aliased
            outlines).
        """
        categories = [BACKGROUND] + [item.category for item in self.objects]
        shares = np.zeros(
            (len(OBJECT_CLASSES) + 2, *self.background.shape[:2]), dtype=np.float32
        )
        for category, visible in zip(categories, self.visible_coverage()):
            shares[category] += visible
        labels = shares.argmax(0).astype(np.uint8)
        labels[shares.max(0) < PURE_SHARE] = UNLABELLED
        return labels


def _spokes(count: int, inner: float) -> np.ndarray:
    """A star of ``count`` tips at radius 1, its notches at ``inner``."""
    angle = np.arange(2 * count) * np.pi / count
    radius = np.where(np.arange(2 * count) % 2, inner, 1.0)
    return np.stack([np.cos(angle), np.sin(angle)], 1) * radius[:, None]


def _regular(count: int, radius: float = 1.0) -> np.ndarray:
    angle = np.arange(count) * 2 * np.pi / count
    return radius * np.stack([np.cos(angle), np.sin(angle)], 1)


def _cross(arm: float = 0.36) -> np.ndarray:
    corner = np.array([[1, -arm], [1, arm], [arm, arm]])
    turn = np.array([[0, 1], [-1, 0]])
    return np.concatenate([corner @ np.linalg.matrix_power(turn, k) for k in range(4)])


def polygon_area(vertices: np.ndarray) -> float:
    """Area of a simple polygon given as (V, 2) vertices (shoelace)."""
    x, y = vertices.T
    return abs(x @ np.roll(y, -1) - y @ np.roll(x, -1)) / 2


def _unit_area(*outlines: np.ndarray) -> tuple[np.ndarray, ...]:
    """Scale an outline and its hole to area 1, so that all classes have one size."""
    area = polygon_area(outlines[0]) - sum(map(polygon_area, outlines[1:]))
    return tuple(outline / np.sqrt(area) for outline in outlines)


# For each shape its outline and, if it has one, its hole.
SHAPES: dict[str, tuple[np.ndarray, ...]] = {
    'disc': _unit_area(_regular(64)),
    'square': _unit_area(_regular(4)),
    'triangle': _unit_area(_regular(3)),
    'star': _unit_area(_spokes(5, 0.45)),
    'cross': _unit_area(_cross()),
    'hexagon': _unit_area(_regular(6)),
    'ring': _unit_area(_regular(64), _regular(64, 0.55)),
}


def rasterise(outlines: tuple[np.ndarray, ...], height: int, width: int) -> np.ndarray:
    """Share of the area of every pixel that is inside an outline.

    Exact except for rounding, by Green's theorem in each pixel. The outline is cut at
    the lines of the pixel grid. A piece that rises by dy adds dy to all pixels right of
    it in its row. To its own pixel it adds dy times the mean distance to the right
    border of that pixel.

    Args:
        outlines (tuple[numpy.ndarray, ...]): (V, 2) vertices (x, y) in
            pixels: the outline of a simple polygon, then the holes in it,
            all in the same sense of rotation. Pixel (row, column) spans
            [column, column + 1] x [row, row + 1].
        height (int): Height of the canvas in pixels.
        width (int): Width of the canvas in pixels.

    Returns:
        numpy.ndarray: float32 (height, width), in [0, 1].
    """
    start = np.concatenate(outlines)[:, None]
    end = np.concatenate([np.roll(o, -1, axis=0) for o in outlines])[:, None]
    sign = np.repeat([1] + [-1] * (len(outlines) - 1), [len(o) for o in outlines])[
        :, None
    ]
    delta = end - start
    with np.errstate(divide='ignore', invalid='ignore'):
        cuts = np.concatenate(
            [
                (np.arange(width + 1) - start[..., 0]) / delta[..., 0],
                (np.arange(height + 1) - start[..., 1]) / delta[..., 1],
                np.zeros_like(sign),
                np.ones_like(sign),
            ],
            axis=1,
        )
    # An edge along a grid line would divide by zero; it needs no cut.
    cuts = np.sort(np.clip(np.nan_to_num(cuts), 0, 1), axis=1)
    points = start + cuts[..., None] * delta
    middle = (points[:, 1:] + points[:, :-1]) / 2
    rise = sign * np.diff(points[..., 1], axis=1)
    row = np.floor(middle[..., 1]).astype(int)
    across = np.clip(middle[..., 0], 0, width)
    column = np.floor(across).astype(int)
    kept = (row >= 0) & (row < height) & (rise != 0)
    row, column, across, rise = (part[kept] for part in (row, column, across, rise))
    cell = row * (width + 2) + column
    own = rise * (column + 1 - across)
    change = np.bincount(
        np.concatenate([cell, cell + 1]),
        np.concatenate([own, rise - own]),
        minlength=height * (width + 2),
    )
    covered = np.cumsum(change.reshape(height, width + 2), axis=1)
    return np.clip(np.abs(covered[:, :width]), 0, 1).astype(np.float32)


def _stripes(x, y, rng):
    return np.sin(x * (2 * np.pi / rng.uniform(7, 11)))


def _zigzags(x, y, rng):
    period = rng.uniform(12, 16)
    bend = np.abs((y / period) % 1 - 0.5) * period
    return np.sin((x + 1.2 * bend) * (2 * np.pi / rng.uniform(8, 11)))


def _rays(x, y, rng):
    return np.sin(np.arctan2(y, x) * rng.integers(7, 11))


def _checks(x, y, rng):
    pace = 2 * np.pi / rng.uniform(13, 18)
    return 2 * np.sin(x * pace) * np.sin(y * pace)


def _dots(x, y, rng):
    pace = 2 * np.pi / rng.uniform(8, 11)
    return np.cos(x * pace) + np.cos(y * pace) - 0.6


def _ripples(x, y, rng):
    pace = 2 * np.pi / rng.uniform(7, 11)
    return np.sin(np.hypot(x, y) * pace + rng.uniform(0, 2 * np.pi))


# Functions of (x, y) in nominal pixels from the object's centre and of a
# random generator; the sign says which of two colours a point has.
TEXTURES: dict[str, Callable] = {
    'stripes': _stripes,
    'zigzags': _zigzags,
    'rays': _rays,
    'checks': _checks,
    'dots': _dots,
    'ripples': _ripples,
}


def _two_colours(patch: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Two colours of a photograph that differ enough to show a pattern."""
    pixels = patch.reshape(-1, 3)[rng.integers(patch[..., 0].size, size=24)]
    contrast = np.abs((pixels[1:] - pixels[0]).mean(1))
    visible = np.flatnonzero(contrast > 0.3)
    second = rng.choice(visible) if len(visible) else contrast.argmax()
    pair = pixels[[0, second + 1]]
    if not len(visible):
        # A flat patch: move the colours apart about their mean.
        centre = np.clip(pair.mean(0), 0.2, 0.8)
        sign = 1 if rng.random() < 0.5 else -1
        pair = centre + np.array([[0.17], [-0.17]]) * sign
    return pair.astype(np.float32)


def _appearance(
    texture: str, centre: np.ndarray, patch: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """Colours of an object over the whole canvas: float32 (H, W, 3)."""
    height, width = patch.shape[:2]
    y, x = np.mgrid[:height, :width].astype(np.float32) + 0.5
    scale = NOMINAL_SIDE / min(height, width)
    x, y = (x - centre[0]) * scale, (y - centre[1]) * scale
    angle = rng.uniform(0, 2 * math.pi)
    cos, sin = math.cos(angle), math.sin(angle)
    along, across = cos * x + sin * y, cos * y - sin * x
    colours = patch
    if texture != 'photo':
        pattern = TEXTURES[texture](along, across, rng)
        share = np.clip(0.5 + 2 * pattern, 0, 1).astype(np.float32)[..., None]
        first, second = _two_colours(patch, rng)
        grain = patch - patch.mean((0, 1))
        colours = first * share + second * (1 - share) + 0.25 * grain
    light = rng.normal(0, 0.006, 2)
    shading = 1 + np.clip(light[0] * x + light[1] * y, -0.3, 0.3)
    return np.clip(colours * shading[..., None], 0, 1).astype(np.float32)


def _shadow(coverage: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A soft shadow, displaced from the object that throws it."""
    side = min(coverage.shape)
    shift = rng.integers(-side // 32, side // 32 + 1, size=2)
    mask = Image.fromarray((coverage * 255).astype(np.uint8))
    mask = mask.filter(ImageFilter.GaussianBlur(side * rng.uniform(0.01, 0.03)))
    moved = np.roll(np.asarray(mask, dtype=np.float32), shift, axis=(0, 1))
    return moved * (rng.uniform(0.1, 0.5) / 255)


def _place(
    height: int, width: int, count: int, rng: np.random.Generator
) -> list[tuple[np.ndarray, float]]:
    """Centres (x, y) and sides of objects that overlap only at their borders.

    Args:
        height (int): Height of the canvas in pixels.
        width (int): Width of the canvas in pixels.
        count (int): How many objects to try to place.
        rng (numpy.random.Generator): The only source of randomness.

    Returns:
        list[tuple[numpy.ndarray, float]]: At least one place. The side is the square
        root of the object's area.
    """
    places = []
    for _ in range(20 * count):
        side = min(height, width) * rng.uniform(0.28, 0.44)
        centre = rng.uniform(0.12, 0.88, size=2) * (width, height)
        if all(
            np.hypot(*(centre - other)) > 0.5 * (side + size) for other, size in places
        ):
            places.append((centre, side))
        if len(places) == count:
            break
    return places


def random_object(
    category: int,
    centre: np.ndarray,
    side: float,
    patch: np.ndarray,
    rng: np.random.Generator,
) -> SceneObject:
    """Draw an object of a class in a random pose, texture and light.

    Args:
        category (int): Label of the class, 2 to ``len(OBJECT_CLASSES) + 1``.
        centre (numpy.ndarray): (x, y) in pixels.
        side (float): Square root of the object's area, in pixels.
        patch (numpy.ndarray): float32 (H, W, 3), a piece of a photograph to
            take colours and grain from; its size is that of the canvas.
        rng (numpy.random.Generator): The only source of randomness.

    Returns:
        SceneObject: The object on an (H, W) canvas.
    """
    kind = OBJECT_CLASSES[category - BACKGROUND - 1]
    stretch, angle = rng.uniform(0.9, 1.1), rng.uniform(0, 2 * np.pi)
    cos, sin = np.cos(angle), np.sin(angle)
    pose = np.diag([stretch, 1 / stretch]) @ [[cos, sin], [-sin, cos]]
    coverage = rasterise(
        tuple(outline @ pose * side + centre for outline in SHAPES[kind.shape]),
        *patch.shape[:2],
    )
    return SceneObject(
        category,
        coverage,
        _appearance(kind.texture, centre, patch, rng),
        _shadow(coverage, rng),
    )


def random_scene(
    regions: tuple[PhotoRegion, ...], height: int, width: int, rng: np.random.Generator
) -> Scene:
    """Compose a scene of three to five objects; fewer if there is no room.

    Args:
        regions (tuple[PhotoRegion, ...]): Where background, colours and
            grain may come from.
        height (int): Height in pixels.
        width (int): Width in pixels.
        rng (numpy.random.Generator): The only source of randomness.

    Returns:
        Scene: The scene.
    """
    background = random_patch(regions, height, width, rng)
    objects = []
    for centre, side in _place(height, width, int(rng.integers(3, 6)), rng):
        category = int(rng.integers(len(OBJECT_CLASSES))) + BACKGROUND + 1
        patch = random_patch(regions, height, width, rng)
        objects.append(random_object(category, centre, side, patch, rng))
    return Scene(background, tuple(objects))


def random_crowded_scene(
    regions: tuple[PhotoRegion, ...], height: int, width: int, rng: np.random.Generator
) -> tuple[Scene, tuple[tuple[int, ...], ...]]:
    """Compose a scene of usual objects, tiny objects and crowds of tiny objects.

    Args:
        regions (tuple[PhotoRegion, ...]): Where background, colours and
            grain may come from.
        height (int): Height in pixels.
        width (int): Width in pixels.
        rng (numpy.random.Generator): The only source of randomness.

    Returns:
        tuple[Scene, tuple[tuple[int, ...], ...]]: The scene, and the numbers of
        the objects that each instance consists of: one, or several of one class
        that are a crowd.
    """
    background = random_patch(regions, height, width, rng)
    places = _place(height, width, int(rng.integers(2, 5)), rng)
    groups = [[place] for place in places]
    shorter = min(height, width)
    if rng.random() < 0.4:
        side = shorter * rng.uniform(0.09, 0.14)
        groups += [[(c, side)] for c in _free_spots(places, height, width, side, rng)]
    elif rng.random() < 0.3:
        side = shorter * rng.uniform(0.07, 0.09)
        for middle in _free_spots(places, height, width, 3.2 * side, rng)[:1]:
            groups.append([(c, side) for c in _huddle(middle, side, rng)])
    objects, instances = [], []
    for group in groups:
        category = int(rng.integers(len(OBJECT_CLASSES))) + BACKGROUND + 1
        instances.append(tuple(range(len(objects), len(objects) + len(group))))
        for centre, side in group:
            patch = random_patch(regions, height, width, rng)
            objects.append(random_object(category, centre, side, patch, rng))
    return Scene(background, tuple(objects)), tuple(instances)


def random_object_scene(
    category: int,
    regions: tuple[PhotoRegion, ...],
    height: int,
    width: int,
    rng: np.random.Generator,
) -> Scene:
    """Compose a scene of one large object, and at most two small ones of other classes.

    The large one has at least twice the area of a small one.

    Args:
        category (int): Label of the large object's class, 2 to
            ``len(OBJECT_CLASSES) + 1``.
        regions (tuple[PhotoRegion, ...]): Where background, colours and
            grain may come from.
        height (int): Height in pixels.
        width (int): Width in pixels.
        rng (numpy.random.Generator): The only source of randomness.

    Returns:
        Scene: The scene.
    """
    background = random_patch(regions, height, width, rng)
    shorter = min(height, width)
    centre = rng.uniform(0.3, 0.7, size=2) * (width, height)
    placed = [(category, centre, shorter * rng.uniform(0.46, 0.64))]
    side = shorter * rng.uniform(0.16, 0.24)
    for spot in _free_spots([placed[0][1:]], height, width, side, rng):
        step = int(rng.integers(1, len(OBJECT_CLASSES)))
        other = (category - BACKGROUND - 1 + step) % len(OBJECT_CLASSES)
        placed.append((other + BACKGROUND + 1, spot, side))
    objects = [
        random_object(*item, random_patch(regions, height, width, rng), rng)
        for item in placed
    ]
    return Scene(background, tuple(objects))


def random_heights(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    """How high things are above the lowest point, as a laser scanner sees them.

    The background is a slope. Every object is flat and stands out of it; how high says
    nothing of its class.

    Args:
        scene (Scene): The scene.
        rng (numpy.random.Generator): The only source of randomness.

    Returns:
        numpy.ndarray: float32 (H, W), in [0, 1].
    """
    height, width = scene.background.shape[:2]
    y, x = np.mgrid[:height, :width] / (max(height, width) - 1)
    across, down = rng.uniform(0, 0.15, size=2)
    canvas = across * x + down * y
    for item in scene.objects:
        canvas = canvas * (1 - item.coverage) + rng.uniform(0.4, 1) * item.coverage
    return canvas.astype(np.float32)


def _free_spots(
    places: list[tuple[np.ndarray, float]],
    height: int,
    width: int,
    side: float,
    rng: np.random.Generator,
) -> list[np.ndarray]:
    """At most two centres at which an object of that side touches no other object."""
    spots, taken = [], list(places)
    for _ in range(40):
        centre = rng.uniform(0.1, 0.9, size=2) * (width, height)
        if len(spots) < 2 and all(
            np.hypot(*(centre - other)) > 0.75 * (side + size) for other, size in taken
        ):
            spots.append(centre)
            taken.append((centre, side))
    return spots


def _huddle(
    middle: np.ndarray, side: float, rng: np.random.Generator
) -> list[np.ndarray]:
    """Six to nine centres close together around the middle."""
    cells = [(x, y) for x in (-1, 0, 1) for y in (-1, 0, 1)]
    chosen = rng.permutation(len(cells))[: rng.integers(6, 10)]
    return [
        middle + 1.15 * side * (np.array(cells[i]) + rng.uniform(-0.15, 0.15, 2))
        for i in chosen
    ]
