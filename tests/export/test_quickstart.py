"""A model of the quickstart, exported by the command of the README."""

import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from tiny import REPO

pytest.importorskip('onnx')
pytest.importorskip('onnxruntime')
pytest.importorskip('onnxscript')
pytest.importorskip('mmseg')
pytest.importorskip('skimage')

CONFIG = REPO / 'configs' / 'upernet_vmamba_quickstart.py'
IMAGES = 'data/quickstart/images/validation'
WEIGHTS = ('--checkpoint', 'work_dirs/quickstart/iter_200.pth')


def run(cwd, tool, *args):
    done = subprocess.run(
        [sys.executable, str(REPO / 'tools' / tool), *map(str, args)],
        cwd=cwd,
        env=os.environ | dict(PYTHONPATH=str(REPO)),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


@pytest.mark.long
@pytest.mark.parametrize('task', ['seg', 'logits'])
def test_the_same_masks_on_all_validation_images(tmp_path_factory, task):
    folder = tmp_path_factory.getbasetemp() / 'quickstart'
    if not folder.exists():
        folder.mkdir()
        run(folder, 'quickstart.py', '--iterations', 200)
        run(folder, 'infer.py', IMAGES, '--config', CONFIG, *WEIGHTS, '--out-dir', 'pt')
    options = ('--out', 'x.onnx', '--dynamic', 'size', '--normalise', '--task', task)
    run(folder, 'export.py', CONFIG, *WEIGHTS, *options)
    run(folder, 'infer.py', IMAGES, '--onnx', 'x.onnx', '--out-dir', task)
    masks = sorted((folder / 'pt').glob('*_labels.png'))
    assert len(masks) == 96
    total = other = 0
    seen = set()
    for path in masks:
        want, got = (
            np.asarray(Image.open(folder / f / path.name)) for f in ('pt', task)
        )
        other += int((want != got).sum())
        total += want.size
        seen |= set(np.unique(want))
    assert len(seen) > 1
    assert other <= 1e-3 * total
