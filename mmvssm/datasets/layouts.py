"""File layouts of the quickstart's scenes: those of ADE20K, COCO and ImageNet."""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from mmvssm.datasets.photos import SPLITS, PhotoRegion
from mmvssm.datasets.scenes import (
    BACKGROUND,
    OBJECT_CLASSES,
    Scene,
    random_crowded_scene,
    random_heights,
    random_object_scene,
    random_scene,
)

OBJECT_NAMES = tuple(kind.name for kind in OBJECT_CLASSES)
OBJECT_PALETTE = (
    [86, 180, 233],
    [0, 90, 181],
    [240, 228, 66],
    [213, 94, 0],
    [0, 158, 115],
    [204, 121, 167],
    [150, 60, 190],
)
# A pixel belongs to an object that covers at least this share of it.
MASK_SHARE = 0.5
# How names of images end, by the number of their bands.
SUFFIXES = {3: '.jpg', 4: '.tif'}


class Ade20kLayout:
    """Images and label maps.

    ::

        root/
          images/{training,validation}/*.jpg        *.tif with four bands
          annotations/{training,validation}/*.png   0 unlabelled, 1..K classes

    Args:
        bands (int): 3 for colour photos, 4 for these and a band of heights. Defaults to
            3.
    """

    generator = 'mmvssm quickstart data'
    # Increase it if the same settings give other files than before.
    version = 1
    classes = ('background', *OBJECT_NAMES)
    palette = ([70, 75, 85], *OBJECT_PALETTE)
    images = 'images/{training,validation}'
    labels = 'annotations/{training,validation}'

    def __init__(self, bands: int = 3):
        self.bands = bands

    def start(self, root: Path) -> None:
        """Make the folders."""
        for split in SPLITS:
            root.joinpath('images', split).mkdir(parents=True)
            root.joinpath('annotations', split).mkdir(parents=True)

    def write_sample(
        self,
        root: Path,
        split: str,
        index: int,
        regions: tuple[PhotoRegion, ...],
        size: int,
        rng: np.random.Generator,
    ) -> None:
        """Write one image, with sensor noise, and its labels as PNG."""
        scene = random_scene(regions, *random_canvas(index, size, rng), rng)
        name = f'{split}_{index:05d}'
        save_image(scene, root / 'images' / split / name, rng, self.bands)
        Image.fromarray(scene.label_map()).save(
            root / 'annotations' / split / f'{name}.png'
        )

    def finish(self, root: Path) -> None:
        """Nothing is left to write."""

    def is_whole(self, root: Path, counts: Mapping[str, int]) -> bool:
        """Whether no file is missing."""
        return all(
            len(list(root.glob(f'{kind}/{split}/*'))) == count
            for split, count in counts.items()
            for kind in ('images', 'annotations')
        )


class CocoLayout:
    """Images, and a JSON file with the objects in them.

    ::

        root/
          train2017/*.jpg  annotations/instances_train2017.json
          val2017/*.jpg    annotations/instances_val2017.json

    (or ``*.tif`` with four bands)

    Besides objects of usual size there are tiny ones, crowds of tiny ones (each crowd
    is one ``iscrowd`` region), and images without objects. A mask has the pixels of
    which the visible part of an object covers at least half, as run lengths.

    Args:
        bands (int): 3 for colour photos, 4 for these and a band of heights. Defaults to
            3.
    """

    generator = 'mmvssm quickstart data, COCO'
    version = 1
    classes = OBJECT_NAMES
    palette = OBJECT_PALETTE
    images = '{train2017,val2017}'
    labels = 'annotations/instances_{train2017,val2017}.json'
    folders = dict(zip(SPLITS, ('train2017', 'val2017')))
    # One of this many images has no object.
    empty_every = 16

    def __init__(self, bands: int = 3):
        self.bands = bands

    def start(self, root: Path) -> None:
        """Make the folders.

        Raises:
            ImportError: pycocotools is not installed.
        """
        try:
            from pycocotools import mask
        except ImportError as error:
            raise ImportError(
                "COCO's layout needs pycocotools, which is not "
                'installed: `pip install pycocotools`.'
            ) from error
        self._masks = mask
        self._images = {split: [] for split in SPLITS}
        self._annotations = {split: [] for split in SPLITS}
        for folder in ('annotations', *self.folders.values()):
            root.joinpath(folder).mkdir()

    def write_sample(
        self,
        root: Path,
        split: str,
        index: int,
        regions: tuple[PhotoRegion, ...],
        size: int,
        rng: np.random.Generator,
    ) -> None:
        """Write one image, with sensor noise, and remember its objects."""
        height, width = random_canvas(index, size, rng)
        scene, instances = random_crowded_scene(regions, height, width, rng)
        if index % self.empty_every == self.empty_every - 1:
            scene, instances = Scene(scene.background, ()), ()
        name = root / self.folders[split] / f'{index + 1:012d}'
        path = save_image(scene, name, rng, self.bands)
        self._images[split].append(
            dict(id=index + 1, file_name=path.name, width=width, height=height)
        )
        visible = scene.visible_coverage()[1:]
        for members in instances:
            mask = visible[list(members)].sum(0) >= MASK_SHARE
            if mask.any():
                category = scene.objects[members[0]].category - BACKGROUND
                self._annotate(split, index + 1, category, mask, len(members) > 1)

    def _annotate(
        self, split: str, image: int, category: int, mask: np.ndarray, crowd: bool
    ) -> None:
        lengths = self._masks.encode(np.asfortranarray(mask, dtype=np.uint8))
        annotations = self._annotations[split]
        annotations.append(
            dict(
                id=len(annotations) + 1,
                image_id=image,
                category_id=category,
                iscrowd=int(crowd),
                bbox=self._masks.toBbox(lengths).tolist(),
                area=int(self._masks.area(lengths)),
                segmentation=dict(lengths, counts=lengths['counts'].decode()),
            )
        )

    def finish(self, root: Path) -> None:
        """Write the objects of all images."""
        categories = [
            dict(id=number, name=kind.name, supercategory=kind.shape)
            for number, kind in enumerate(OBJECT_CLASSES, start=1)
        ]
        for split, folder in self.folders.items():
            content = dict(
                info=dict(description=self.generator, version=str(self.version)),
                licenses=[],
                images=self._images[split],
                annotations=self._annotations[split],
                categories=categories,
            )
            path = root / 'annotations' / f'instances_{folder}.json'
            path.write_text(json.dumps(content) + '\n', encoding='utf-8')

    def is_whole(self, root: Path, counts: Mapping[str, int]) -> bool:
        """Whether no file is missing."""
        return all(
            len(list(root.glob(f'{folder}/*{SUFFIXES[self.bands]}'))) == counts[split]
            and root.joinpath(f'annotations/instances_{folder}.json').is_file()
            for split, folder in self.folders.items()
        )


class ImageNetLayout:
    """A folder of images for each class.

    ::

        root/
          {train,val}/checked_triangle/*.jpg        *.tif with four bands
          {train,val}/dotted_cross/*.jpg
          ...

    The class of an image is that of its large object. It is not alone: the smaller ones
    are of other classes. All classes have equally many images, or one more.

    Args:
        bands (int): 3 for colour photos, 4 for these and a band of heights. Defaults to
            3.
    """

    generator = 'mmvssm quickstart data, ImageNet'
    version = 1
    # In the order of the folders' names, which numbers the classes.
    classes, palette = zip(*sorted(zip(OBJECT_NAMES, OBJECT_PALETTE)))
    # The names of the folders are the labels.
    images = labels = '{train,val}/CLASS'
    folders = dict(zip(SPLITS, ('train', 'val')))

    def __init__(self, bands: int = 3):
        self.bands = bands

    def start(self, root: Path) -> None:
        """Make the folders."""
        for folder in self.folders.values():
            for name in OBJECT_NAMES:
                root.joinpath(folder, class_folder(name)).mkdir(parents=True)

    def write_sample(
        self,
        root: Path,
        split: str,
        index: int,
        regions: tuple[PhotoRegion, ...],
        size: int,
        rng: np.random.Generator,
    ) -> None:
        """Write one image, with sensor noise, into the folder of its class."""
        kind = index % len(OBJECT_CLASSES)
        canvas = random_canvas(index, size, rng)
        scene = random_object_scene(kind + BACKGROUND + 1, regions, *canvas, rng)
        folder = self.folders[split]
        name = root / folder / class_folder(OBJECT_NAMES[kind])
        save_image(scene, name / f'{folder}_{index:05d}', rng, self.bands)

    def finish(self, root: Path) -> None:
        """Nothing is left to write."""

    def is_whole(self, root: Path, counts: Mapping[str, int]) -> bool:
        """Whether no file is missing."""
        return all(
            len(list(root.glob(f'{folder}/*/*{SUFFIXES[self.bands]}'))) == counts[split]
            for split, folder in self.folders.items()
        )


LAYOUTS = {'ade20k': Ade20kLayout, 'coco': CocoLayout, 'imagenet': ImageNetLayout}


def class_folder(name: str) -> str:
    """Name of the folder of a class."""
    return name.replace(' ', '_')


def random_canvas(index: int, size: int, rng: np.random.Generator) -> tuple[int, int]:
    """Height and width: every fourth image is not square."""
    if index % 4 != 3:
        return size, size
    longer = 5 * size // 4
    return (size, longer) if rng.random() < 0.5 else (longer, size)


def save_image(
    scene: Scene, name: Path, rng: np.random.Generator, bands: int = 3
) -> Path:
    """Write a scene with sensor noise.

    Args:
        scene (Scene): What to write.
        name (pathlib.Path): The file, without the end of its name.
        rng (numpy.random.Generator): The only source of randomness.
        bands (int): 3 writes a JPEG. 4 writes a TIFF, uint8 (H, W, 4): red, green,
            blue and height, without the losses of JPEG. Defaults to 3.

    Returns:
        pathlib.Path: The file.
    """
    path = name.with_name(name.name + SUFFIXES[bands])
    pixels = _to_bytes(_with_noise(scene.image(), rng))
    if bands == 3:
        Image.fromarray(pixels).save(path, quality=int(rng.integers(75, 96)))
        return path
    import tifffile  # scikit-image needs it, too.

    heights = _to_bytes(_with_noise(random_heights(scene, rng), rng))
    tifffile.imwrite(
        path,
        np.dstack([pixels, heights]),
        photometric='rgb',
        extrasamples=['unspecified'],
        planarconfig='contig',
    )
    return path


def _with_noise(values: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return values + rng.normal(0, rng.uniform(0.005, 0.03), values.shape)


def _to_bytes(values: np.ndarray) -> np.ndarray:
    return np.clip(values * 255 + 0.5, 0, 255).astype(np.uint8)
