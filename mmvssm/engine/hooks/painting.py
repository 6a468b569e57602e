"""Paint what was predicted for the images of a test."""

import os
from collections.abc import Sequence

from mmengine.hooks import Hook
from mmengine.runner import Runner
from mmengine.structures import BaseDataElement

from mmvssm.analysis.pictures import load_picture
from mmvssm.registry import HOOKS


@HOOKS.register_module()
class PaintingHook(Hook):
    """Paints truth and prediction over every tested image.

    Images are read as the test reads them: of any channels and dtype, and turned as
    their EXIF data say only if the test turns them. (The hooks of mmseg and mmdet read
    each file anew, always as an 8-bit photograph; that of mmpretrain paints the crop.)

    Args:
        show: Open a window for each image, instead of writing files.
        wait_time: Seconds that a window stays open.
    """

    def __init__(self, show: bool = False, wait_time: float = 2.0):
        self.show = show
        self.wait_time = wait_time
        self._number = 0

    def before_test(self, runner: Runner) -> None:
        """Write no files where windows are opened, as mmseg and mmdet do."""
        if self.show:
            runner.visualizer._vis_backends = {}

    def after_test_iter(
        self,
        runner: Runner,
        batch_idx: int,
        data_batch: dict | None = None,
        outputs: Sequence[BaseDataElement] | None = None,
    ) -> None:
        """Paint the images of a batch."""
        dataset = runner.test_loop.dataloader.dataset
        painter = runner.visualizer
        # MMPretrain's has one method for each of its tasks.
        paint = getattr(painter, 'visualize_cls', None) or painter.add_datasample
        for sample in outputs or ():
            self._number += 1
            paint(
                name=f'test_{os.path.basename(sample.img_path)}',
                image=load_picture(sample.img_path, dataset),
                data_sample=sample,
                show=self.show,
                wait_time=self.wait_time,
                step=self._number,
            )
