"""The check of what was exported: what it tries, what it refuses, what it says."""

import sys

import numpy as np
import pytest
import torch
from torch import nn

from export.models import classifier
from mmvssm.export import DifferenceError, ExportError, to_onnx, verify
from mmvssm.export.signal_stack import SignalStack
from mmvssm.export.wrappers import wrap

onnx = pytest.importorskip('onnx')
pytest.importorskip('onnxruntime')
pytest.importorskip('onnxscript')

from onnxscript import opset18 as op  # noqa: E402  it may be missing

from mmvssm.export import aten  # noqa: E402


class Small(nn.Module):
    """A classifier of five classes that takes images of 20 pixels or more."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 8, 3, stride=2)
        self.act = nn.GELU()
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        if min(x.shape[2:]) < 20:
            raise ValueError('too small')
        return self.head(self.act(self.conv(x)).mean((2, 3)))


@pytest.fixture(scope='module')
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp('verify') / 'small.onnx'
    to_onnx(Small().eval(), path, (40, 56), ('batch',), rounds=0)
    return path


@pytest.fixture
def broken(monkeypatch):
    """GELU becomes ReLU in all files that are written."""
    right = aten.translations()
    wrong = {
        torch.ops.aten.gelu.default: lambda self, approximate='none': op.Relu(self)
    }
    monkeypatch.setattr(aten, 'translations', lambda: right | wrong)


def test_a_broken_model_leaves_no_file_and_names_the_layer(broken, tmp_path):
    with pytest.raises(DifferenceError) as caught:
        to_onnx(classifier('vmamba'), tmp_path / 'x.onnx', 32)
    assert 'differs from PyTorch by' in str(caught.value)
    layer = 'the first layer that differs is model.backbone.patch_embed.4'
    assert str(caught.value).endswith(layer), 'the first GELU'
    assert caught.value.report.error('onnxruntime') > 1e-3
    assert not list(tmp_path.iterdir())


def test_a_failed_export_leaves_the_old_file(broken, tmp_path):
    (tmp_path / 'x.onnx').write_text('old')
    with pytest.raises(DifferenceError):
        to_onnx(Small().eval(), tmp_path / 'x.onnx', 32)
    assert [path.name for path in tmp_path.iterdir()] == ['x.onnx']
    assert (tmp_path / 'x.onnx').read_text() == 'old'


def change(file, target, edit):
    """Write a file with other weights."""
    model = onnx.load(str(file))
    for tensor in model.graph.initializer:
        values = onnx.numpy_helper.to_array(tensor).copy()
        if values.dtype == np.float32 and values.size > 1:
            edit(values)
            tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
    onnx.save(model, str(target))
    return target


def test_nan_fails_whatever_the_bound(file, tmp_path):
    def edit(values):
        values.flat[0] = np.nan

    path = change(file, tmp_path / 'nan.onnx', edit)
    for bound in (1e9, None):
        with pytest.raises(DifferenceError, match='not finite'):
            verify.verify(path, wrap(Small().eval()), (40, 56), bound=bound, rounds=0)


def test_a_difference_above_the_bound_fails(file, tmp_path):
    def edit(values):
        values *= 1.001

    path = change(file, tmp_path / 'off.onnx', edit)
    module, size = wrap(Small().eval()), (40, 56)
    with pytest.raises(DifferenceError, match='the bound is 1.0e-05'):
        verify.verify(path, module, size, rounds=0)
    report = verify.verify(path, module, size, bound=0.1, rounds=0)
    assert 1e-4 < report.error('onnxruntime') < 0.1


def test_a_file_that_cannot_be_written(tmp_path):
    (tmp_path / 'file').touch()
    for path, said in (
        (tmp_path, 'is a folder'),
        (tmp_path / 'file' / 'x.onnx', 'cannot write'),
    ):
        with pytest.raises(ExportError, match=said):
            to_onnx(Small().eval(), path, 32, rounds=0)


def test_a_file_that_does_not_run_fails(tmp_path, file):
    module = wrap(Small().eval())
    with pytest.raises(DifferenceError, match='onnxruntime does not run the file'):
        verify.verify(file, module, (41, 56), rounds=0)


def test_a_dynamic_file_is_run_at_sizes_that_the_model_takes(file):
    module = wrap(Small().eval())
    sizes = verify.check_sizes(module, (40, 56), ('size',))
    assert sizes == [(40, 56), (72, 120), (39, 57), (32, 48)]
    assert verify.check_sizes(module, (40, 56), ()) == [(40, 56)]


def test_real_images_are_read_and_normalised(file, tmp_path):
    from PIL import Image

    paths = [tmp_path / 'a.png', tmp_path / 'b.jpg']
    Image.effect_noise((70, 50), 90).save(paths[0])
    Image.new('RGB', (40, 40), (255, 0, 0)).save(paths[1], quality=100)
    module = wrap(Small().eval())
    report = verify.verify(file, module, (40, 56), ('batch',), images=paths, rounds=1)
    assert {'a.png', 'b.jpg'} <= {row.images for row in report.rows}
    assert set(report.milliseconds) == {'pytorch', *report.runtimes()}
    (_, grey), (_, red) = verify.load_images(module, paths)
    assert grey.shape == (1, 3, 50, 70) and red.shape == (1, 3, 40, 40)
    assert red[0, :, 5, 5] == pytest.approx([2.25, -2.04, -1.80], abs=0.05)
    with pytest.raises(ExportError, match='cannot read the image'):
        list(verify.load_images(module, [tmp_path / 'absent.png']))


def test_images_of_four_channels_are_not_read_from_files(tmp_path):
    net = nn.Sequential(nn.Conv2d(4, 5, 3, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    report = to_onnx(net.eval(), tmp_path / 'x.onnx', 32, rounds=0)
    assert {row.shape for row in report.rows} == {(1, 4, 32, 32)}
    with pytest.raises(ExportError, match='the model takes 4: leave out the images'):
        to_onnx(net, tmp_path / 'x.onnx', 32, images=['a.png'], rounds=0)


def row(want, got, kind='float32'):
    want, got = (np.asarray(x, kind) for x in (want, got))
    return verify.compare(
        'onnxruntime', 'random', np.zeros((1, 3, 8, 8)), [want], [got]
    )


def test_comparisons():
    assert row([[0.0, 10.0]], [[1e-3, 10.0]]).error == pytest.approx(1e-4)
    assert row([[0.0, 10.0]], [[11.0, 10.0]]).changed == 1
    assert np.isnan(row([[0.0, 1.0]], [[np.nan, 1.0]]).error)
    assert np.isnan(row([[np.inf, 1.0]], [[np.inf, 1.0]]).error)
    labels = row([[[0, 1, 2, 3]]], [[[0, 1, 2, 0]]], 'int64')
    assert labels.error is None and labels.changed == 0.25 and labels.number == 4
    with pytest.raises(ValueError, match='outputs have shapes'):
        row([[0.0, 1.0]], [[0.0]])


@pytest.mark.parametrize('number, fails', [(2, False), (3, True)])
def test_few_pixels_may_change(number, fails):
    want = np.zeros((1, 20, 20), np.int64)
    got = want.copy()
    got.flat[:number] = 1
    report = verify.Report('x.onnx', [row(want, got, 'int64')])
    if fails:
        with pytest.raises(DifferenceError, match='of the pixels another class'):
            verify._judge(report, 'onnxruntime', 1e-5, 1e-4)
    else:
        verify._judge(report, 'onnxruntime', 1e-5, 1e-4)


def test_a_missing_package_is_named(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, 'onnx', None)
    with pytest.raises(ExportError, match=r'pip install "mmvssm\[export\]"'):
        to_onnx(Small().eval(), 'x.onnx', 32)


@pytest.mark.skipif(sys.platform != 'linux', reason='it is of Linux')
def test_runtimes_leave_the_stack_of_signals(tmp_path):
    """On OpenVINO's own, which it frees, a signal ends the process."""
    pytest.importorskip('openvino')
    before = SignalStack.of_this_thread()
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Flatten()).eval()
    to_onnx(model, tmp_path / 'model.onnx', 16, runtimes=['openvino'], rounds=1)
    after = SignalStack.of_this_thread()
    assert (before.pointer, before.flags) == (after.pointer, after.flags)
