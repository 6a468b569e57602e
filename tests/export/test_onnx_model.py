"""Files of to_onnx: what they compute, at which sizes, and what they are made of."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch

from export.models import BACKBONES, classifier, segmentor
from mmvssm.backbones import VSSM, MambaR
from mmvssm.export import ExportError, to_onnx
from mmvssm.export.verify import has_kernels

onnx = pytest.importorskip('onnx')
ort = pytest.importorskip('onnxruntime')
pytest.importorskip('onnxscript')
pytest.importorskip('mmseg')

# Relative to the largest output; the bound of the command is 1e-5.
CLOSE = 5e-6
# A process that has nothing but numpy and onnxruntime.
BARE = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition('.')[0] in ('torch', 'mmvssm', 'mmseg', 'mmengine', 'onnx'):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Block())
import numpy as np
import onnxruntime
session = onnxruntime.InferenceSession(sys.argv[1], providers=['CPUExecutionProvider'])
cases = np.load(sys.argv[2])
for i in range(len(cases.files) // 2):
    (got,) = session.run(None, {'image': cases[f'image{i}']})
    want = cases[f'want{i}']
    print(np.abs(got - want).max() / np.abs(want).max())
"""


def run(file, image):
    session = ort.InferenceSession(str(file), providers=['CPUExecutionProvider'])
    return session.run(None, {'image': image.numpy()})


def domains(nodes):
    for node in nodes:
        yield node.domain
        for attribute in node.attribute:
            yield from domains(attribute.g.node)


def operators(file):
    return {node.op_type for node in onnx.load(str(file)).graph.node}


def sides(value):
    return [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp('onnx')


@pytest.fixture(scope='module')
def dynamic(folder):
    """Exports a classifier of any batch and size, once."""
    made = {}

    def export(name):
        if name not in made:
            net, file = classifier(name), folder / f'{name}.onnx'
            report = to_onnx(net, file, (48, 64), ('batch', 'size'), rounds=0)
            made[name] = net, file, report
        return made[name]

    return export


@pytest.mark.parametrize('name', BACKBONES)
def test_a_classifier_of_any_batch_and_size(dynamic, name):
    net, file, report = dynamic(name)
    assert 'onnxruntime' in report.runtimes()
    shapes = {row.shape for row in report.rows}
    assert {shape[0] for shape in shapes} == {1, 3}
    assert any(shape[2] % 2 and shape[3] % 2 for shape in shapes), 'an odd size'
    assert len({shape[2:] for shape in shapes}) == 4
    assert report.error('onnxruntime') < CLOSE
    assert report.changed('onnxruntime') == 0
    torch.manual_seed(1)
    # Sizes that the check does not try.
    for shape in ((2, 3, 37, 90), (1, 3, 130, 35)):
        image = torch.randn(shape)
        with torch.no_grad():
            want = net(image).numpy()
        (got,) = run(file, image)
        assert np.abs(got - want).max() <= CLOSE * np.abs(want).max()


@pytest.mark.parametrize('name', BACKBONES)
def test_a_plain_file_has_standard_operators_only(dynamic, name):
    model = onnx.load(str(dynamic(name)[1]))
    onnx.checker.check_model(model, full_check=True)
    onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True)
    assert set(domains(model.graph.node)) <= {'', 'ai.onnx'}
    assert not model.functions
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [('', 18)]
    (image,), (logits,) = model.graph.input, model.graph.output
    assert (image.name, logits.name) == ('image', 'logits')
    assert sides(image) == ['batch', 3, 'height', 'width']
    assert sides(logits) == ['batch', 10]


def test_a_file_says_how_it_was_made(dynamic):
    _, file, report = dynamic('vmamba')
    session = ort.InferenceSession(str(file), providers=['CPUExecutionProvider'])
    notes = json.loads(session.get_modelmeta().custom_metadata_map['mmvssm'])
    assert notes['task'] == 'logits' and notes['dynamic'] == ['batch', 'size']
    assert notes['size'] == [48, 64] and notes['versions']['torch']
    measured = notes['error']['onnxruntime']['relative']
    assert measured == report.error('onnxruntime')
    assert not list(file.parent.glob('*.partial'))


def test_a_file_runs_without_torch_and_this_package(dynamic, tmp_path):
    net, file, _ = dynamic('vmamba')
    cases = {}
    for i, shape in enumerate(((1, 3, 40, 56), (3, 3, 33, 47))):
        image = torch.randn(shape)
        with torch.no_grad():
            cases |= {f'image{i}': image.numpy(), f'want{i}': net(image).numpy()}
    np.savez(tmp_path / 'cases.npz', **cases)
    done = subprocess.run(
        [sys.executable, '-c', BARE, str(file), str(tmp_path / 'cases.npz')],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    errors = [float(line) for line in done.stdout.split()]
    assert len(errors) == 2, done.stderr
    assert all(error < CLOSE for error in errors)


@pytest.mark.parametrize(
    'name, form',
    [
        *[('vmamba', 'unrolled'), ('vim', 'unrolled')],
        *[('vmamba', 'function'), ('mambar', 'function')],
    ],
)
def test_other_forms_of_one_odd_size(folder, name, form):
    file = folder / f'{name}_{form}.onnx'
    size = (33, 47) if name == 'vmamba' else (40, 24)
    report = to_onnx(classifier(name), file, size, (), form, rounds=0)
    assert {row.shape for row in report.rows} == {(1, 3, *size)}
    assert report.error('onnxruntime') < CLOSE
    if form == 'function' and has_kernels():
        assert report.error('kernels') < CLOSE
    model = onnx.load(str(file))
    if form == 'unrolled':
        assert not operators(file) & {'Scan', 'Loop', 'If'}
        assert not model.functions
        assert set(domains(model.graph.node)) <= {'', 'ai.onnx'}
    else:
        assert 'mmvssm' in set(domains(model.graph.node))
        for function in model.functions:
            assert set(domains(function.node)) <= {'', 'ai.onnx'}


def test_a_later_opset(folder):
    file = folder / 'opset.onnx'
    report = to_onnx(classifier('vmamba'), file, (32, 40), opset=21, rounds=0)
    assert onnx.load(str(file)).opset_import[0].version == 21
    assert report.error('onnxruntime') < CLOSE


def test_a_segmentor_gives_the_labels_of_mmseg(folder):
    """From RGB of 0 to 255, at sizes that do not divide by the strides."""
    model, file = segmentor('vmamba'), folder / 'upernet.onnx'
    report = to_onnx(
        *(model, file, (64, 96), ('batch', 'size')), normalise=True, rounds=0
    )
    # Of the logits, which the file itself does not give.
    assert report.error('onnxruntime') < CLOSE
    assert report.changed('onnxruntime') <= 1e-4
    assert [x.name for x in onnx.load(str(file)).graph.output] == ['labels']
    assert not list(folder.glob('upernet.onnx.*'))
    for size in ((64, 96), (70, 50), (33, 129)):
        # As OpenCV reads them.
        pixels = torch.randint(0, 256, (3, *size), dtype=torch.uint8)
        with torch.no_grad():
            data = model.data_preprocessor(dict(inputs=[pixels]))
            (sample,) = model.predict(data['inputs'])
        want = sample.pred_sem_seg.data.numpy()
        (got,) = run(file, pixels.flip(0)[None].float())
        assert got.dtype == np.int64 and got.shape == (1, *size)
        assert len(np.unique(want)) > 1
        assert (got != want).mean() <= 1e-3


def test_the_logits_of_a_segmentor_with_a_neck(folder):
    model, file = segmentor('vim'), folder / 'logits.onnx'
    report = to_onnx(
        *(model, file, (64, 96), ('size',)), task='logits', rounds=0, bound=CLOSE
    )
    assert report.error('onnxruntime') < CLOSE
    (output,) = onnx.load(str(file)).graph.output
    assert output.name == 'logits'
    assert sides(output)[:2] == [1, 5]


def test_maps_and_registers_of_a_backbone(folder):
    arch = dict(embed_dims=16, depth=2, patch_size=8, stride=8, d_state=4, registers=3)
    torch.manual_seed(0)
    net = MambaR(arch, img_size=32, out_indices=(0, 1), return_tokens=True).eval()
    file = folder / 'maps.onnx'
    report = to_onnx(net, file, (40, 32), rounds=0)
    assert report.error('onnxruntime') < CLOSE
    names = [output.name for output in onnx.load(str(file)).graph.output]
    assert names == ['map0', 'tokens0', 'map1', 'tokens1']


@pytest.mark.parametrize('precision', ['fp16', 'int8'])
def test_layers_in_less_precision(folder, precision, images):
    file = folder / f'{precision}.onnx'
    options = dict(fp16=True) if precision == 'fp16' else dict(int8=images)
    report = to_onnx(classifier('mlla'), file, (40, 48), rounds=1, **options)
    low, high = (1e-6, 5e-3) if precision == 'fp16' else (1e-4, 0.1)
    assert low < report.error('onnxruntime') < high
    assert report.size < 0.8 * report.before.size
    assert report.before.error('onnxruntime') < CLOSE
    assert 'in float32: ' in str(report) and 'pytorch' in report.milliseconds
    if precision == 'int8':
        assert {row.images for row in report.rows} >= {path.name for path in images}
        assert 'QuantizeLinear' in operators(file)
    # Products of activations stay as they are.
    model = onnx.load(str(file))
    stored = {x.name for x in model.graph.initializer}
    assert any(
        node.op_type == 'MatMul' and not set(node.input) & stored
        for node in model.graph.node
    )


@pytest.fixture(scope='module')
def images(folder):
    from PIL import Image

    paths = [folder / f'{i}.png' for i in range(2)]
    for path in paths:
        Image.effect_noise((50, 44), 90).convert('RGB').save(path)
    return paths


def detector():
    class BaseDetector(torch.nn.Module):
        __module__ = 'mmdet.models.detectors.base'

    return BaseDetector().eval()


@pytest.mark.parametrize(
    'model, options, said',
    [
        (lambda: classifier('vmamba').train(), {}, 'call model.eval'),
        (lambda: classifier('vmamba'), dict(form='flat'), 'form must be one of'),
        (lambda: classifier('vmamba'), dict(dynamic=('height',)), 'dynamic takes'),
        (lambda: classifier('vmamba'), dict(opset=17), 'opset must be 18 to'),
        (lambda: classifier('vmamba'), dict(task='seg'), 'its task is logits'),
        (lambda: classifier('vmamba'), dict(size=(32, 0)), 'size must be height'),
        (
            lambda: classifier('vmamba'),
            dict(form='unrolled', dynamic=('size',)),
            'has one size',
        ),
        (lambda: classifier('vmamba'), dict(fp16=True, int8=['a']), 'exclude'),
        (
            lambda: classifier('vmamba'),
            dict(form='function', fp16=True),
            'take float32',
        ),
        (
            lambda: VSSM(dict(depths=(1,), dims=8), out_indices=(0,), orders='hilbert'),
            dict(dynamic=('size',)),
            "scan order 'hilbert' is a table for one size",
        ),
        (
            lambda: VSSM(
                dict(depths=(1,), dims=8), out_indices=(0,), mask_padding=True
            ),
            {},
            'build it with mask_padding=False',
        ),
        (
            lambda: segmentor('vmamba', **{'model.test_cfg.mode': 'slide'}),
            {},
            "set model.test_cfg.mode='whole'",
        ),
        (detector, {}, 'mmdeploy'),
        (lambda: classifier('vmamba').half(), {}, 'call model.float'),
        (
            lambda: VSSM(dict(depths=(1,), dims=8), out_indices=(0,), in_channels=4),
            dict(normalise=True),
            'takes 4 channels',
        ),
    ],
)
def test_what_cannot_be_exported_is_refused(tmp_path, model, options, said):
    model = model()
    if 'training mode' not in said and said != 'call model.eval':
        model.eval()
    with pytest.raises(ExportError, match=said):
        to_onnx(model, tmp_path / 'x.onnx', **dict(size=(32, 32)) | options)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('name', ['vmamba_t_s1l8', 'vim_t', 'mambar_s', 'mlla_t'])
@pytest.mark.long
def test_a_published_size(tmp_path, name):
    import mmvssm

    net = mmvssm.build_classifier(name).eval()
    report = to_onnx(net, tmp_path / 'x.onnx', 224, ('batch', 'size'))
    assert report.error('onnxruntime') < 1e-5
