"""Operators of torch whose translation is our own, at sizes other than the traced."""

import operator

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

onnx = pytest.importorskip('onnx')
ort = pytest.importorskip('onnxruntime')
pytest.importorskip('onnxscript')

from mmvssm.export import aten  # noqa: E402  its packages may be missing
from mmvssm.export.verify import Runtime, installed_runtimes  # noqa: E402


class Pools(nn.Module):
    """What UPerNet does with its last map, and resizing to a line."""

    def __init__(self, align_corners):
        super().__init__()
        self.align_corners = align_corners

    def forward(self, x):
        options = dict(mode='bilinear', align_corners=self.align_corners)
        pooled = [F.adaptive_avg_pool2d(x, scale) for scale in (1, 2, 3, 6, (3, 1))]
        outs = [F.interpolate(p, size=x.shape[2:], **options) for p in pooled]
        outs.append(F.interpolate(x, size=(1, 2 * x.shape[3]), **options))
        outs.append(F.interpolate(x, scale_factor=2, **options))
        return [*pooled, *outs]


def export(module, image, folder):
    sizes = {0: torch.export.Dim.DYNAMIC, 2: torch.export.Dim.DYNAMIC}
    sizes[3] = torch.export.Dim.DYNAMIC
    program = torch.export.export(module, (image,), dynamic_shapes=(sizes,))
    file = folder / 'x.onnx'
    torch.onnx.export(
        program,
        f=file,
        dynamo=True,
        verbose=False,
        opset_version=18,
        custom_translation_table=aten.translations(),
        input_names=['image'],
        external_data=False,
    )
    return file


@pytest.mark.parametrize('align_corners', [False, True])
def test_pooling_and_resizing_at_any_size(tmp_path, align_corners):
    module = Pools(align_corners).eval()
    file = export(module, torch.randn(2, 5, 14, 11), tmp_path)
    for name in installed_runtimes():
        run = Runtime(name, file)
        for shape in ((2, 5, 14, 11), (1, 5, 1, 1), (3, 5, 7, 23), (1, 5, 6, 13)):
            image = torch.randn(shape)
            for got, want in zip(run(image.numpy()), module(image), strict=True):
                assert got.shape == want.shape
                assert np.abs(got - want.numpy()).max() <= 1e-5, (name, shape)


class Pad(nn.Module):
    """To whole patches, as one writes rounding up in Python."""

    def forward(self, x):
        more = [-(-size // 4) * 4 - size for size in x.shape[2:]]
        return F.pad(x, (0, more[1], 0, more[0]))


def test_sizes_are_rounded_up(tmp_path):
    file = export(Pad(), torch.randn(2, 1, 18, 13), tmp_path)
    for name in installed_runtimes():
        run = Runtime(name, file)
        for size in ((18, 13), (16, 15), (5, 3), (4, 8)):
            image = torch.randn(1, 1, *size)
            (got,) = run(image.numpy())
            np.testing.assert_array_equal(got, Pad()(image).numpy())


def test_every_entry_replaces_one_of_torchs():
    known = {operator.floordiv}
    for target in aten.translations():
        assert target in known or target.namespace == 'aten'


@pytest.mark.parametrize('approximate', ['none', 'tanh'])
def test_gelu(tmp_path, approximate):
    module = nn.GELU(approximate)
    image = 4 * torch.randn(2, 5, 7, 3)
    file = export(module, image, tmp_path)
    for name in installed_runtimes():
        (got,) = Runtime(name, file)(image.numpy())
        assert np.abs(got - module(image).numpy()).max() < 2e-6, name


def test_gelu_is_one_operator_of_onnxruntime(tmp_path):
    file = export(nn.GELU(), torch.randn(2, 5, 7, 3), tmp_path)
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / 'optimised.onnx')
    options.log_severity_level = 3
    ort.InferenceSession(str(file), options)
    optimised = onnx.load(tmp_path / 'optimised.onnx')
    assert [node.op_type for node in optimised.graph.node] == ['Gelu']
