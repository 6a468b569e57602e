"""What is exported of MMPretrain's classifiers."""

import pytest
import torch

from mmvssm.export.source import load_source
from mmvssm.export.wrappers import wrap
from tiny_cls import PARTS, write_config, write_folders


@pytest.mark.parametrize('family', PARTS)
def test_the_config_of_a_classifier(family, tmp_path):
    """Logits of images, normalised inside as the data preprocessor does it."""
    root = write_folders(tmp_path / 'data', train=1, val=1)
    path = write_config(tmp_path / 'c.py', root, family=family)
    source = load_source(str(path), from_scratch=True)
    assert source.size == (32, 32)
    whole = wrap(source.model, normalise=True)
    image = torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        (logits,) = whole(image[None].float())
        # What is loaded is BGR.
        (sample,) = source.model.test_step(dict(inputs=[image.flip(0)]))
    assert (whole.task, whole.output_names) == ('logits', ('logits',))
    torch.testing.assert_close(logits.softmax(1)[0], sample.pred_score)
