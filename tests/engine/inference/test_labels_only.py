"""Without logits the labels are those of mmseg, and nothing is of their full size."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip('mmseg')

from mmengine.config import ConfigDict
from mmengine.registry import MODELS, init_default_scope
from mmseg.evaluation import IoUMetric
from mmseg.models import EncoderDecoder, SegTTAModel
from mmseg.structures import SegDataSample

from mmvssm.engine import LabelsOnlyHook, labels_only
from mmvssm.engine.inference import labels_only as module

HEAD = dict(
    type='FCNHead',
    in_channels=8,
    channels=8,
    num_convs=1,
    concat_input=False,
    dropout_ratio=0.0,
    norm_cfg=dict(type='BN'),
)


def build(classes=45, mode=None, align_corners=False, kind=None, **head):
    torch.manual_seed(0)
    init_default_scope('mmseg')
    head = dict(HEAD, num_classes=classes, align_corners=align_corners, **head)
    more = {}
    if kind == 'CascadeEncoderDecoder':
        head = [head, dict(head, type='OCRHead', ocr_channels=4)]
        head[1].pop('num_convs'), head[1].pop('concat_input')
        more = dict(num_stages=2)
    cfg = dict(
        type=kind or 'EncoderDecoder',
        data_preprocessor=dict(type='SegDataPreProcessor', size_divisor=8),
        backbone=dict(
            type='mmvssm.VSSM', arch=dict(depths=(1, 1), dims=8), out_indices=(0,)
        ),
        decode_head=head,
        test_cfg=mode or dict(mode='whole'),
        **more,
    )
    model = MODELS.build(ConfigDict(cfg)).eval()
    last = model.decode_head[-1] if more else model.decode_head
    with torch.no_grad():
        weight, bias = last.conv_seg.weight, last.conv_seg.bias
        weight.normal_()
        # Equal logits: the first class counts.
        weight[len(weight) // 2 :] = weight[: len(weight) - len(weight) // 2].flip(0)
        bias.zero_()
    return model


SLIDE = dict(mode='slide', crop_size=(32, 24), stride=(20, 16))
SAMPLES = (
    dict(ori_shape=(61, 47)),
    dict(ori_shape=(40, 90), flip=True, flip_direction='horizontal'),
    dict(ori_shape=(41, 53), flip=True, flip_direction='vertical'),
)


def batch(samples=SAMPLES, size=(41, 53)):
    torch.manual_seed(1)
    images = [torch.randint(0, 256, (3, *size), dtype=torch.uint8) for _ in samples]
    samples = [
        SegDataSample(metainfo=dict(dict(img_shape=size, img_path='a.png'), **s))
        for s in samples
    ]
    return dict(inputs=images, data_samples=samples)


def predict(model, data):
    with torch.no_grad():
        return model.test_step(copy.deepcopy(data))


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """So that small images have several."""
    monkeypatch.setattr(module, 'BLOCK_BYTES', 2**16)
    monkeypatch.setattr(module, 'MERGED_BYTES', 2**19)


def assert_same_labels(model, data):
    want = predict(model, data)
    with labels_only(model) as done:
        got = predict(model, data)
    assert done
    for one, other in zip(got, want, strict=True):
        label = other.pred_sem_seg.data
        assert one.pred_sem_seg.data.dtype == label.dtype
        assert torch.equal(one.pred_sem_seg.data, label)
        assert 'seg_logits' not in one and not hasattr(one, 'prediction')
        assert one.metainfo == other.metainfo
    # All is as before.
    assert 'seg_logits' in predict(model, data)[0]
    return want


@pytest.mark.parametrize('align_corners', [False, True])
@pytest.mark.parametrize('mode', [None, SLIDE], ids=['whole', 'slide'])
def test_labels_are_the_same(mode, align_corners):
    model = build(mode=mode, align_corners=align_corners)
    want = assert_same_labels(model, batch())
    assert len(want[0].pred_sem_seg.data.unique()) > 2


@pytest.mark.parametrize('mode', [None, SLIDE], ids=['whole', 'slide'])
@pytest.mark.parametrize(
    'change',
    [
        dict(classes=2, out_channels=1, threshold=0.55),
        dict(classes=3),
        dict(kind='CascadeEncoderDecoder'),
    ],
    ids=['one channel', 'few classes', 'cascade'],
)
def test_heads(change, mode):
    assert_same_labels(build(mode=mode, **change), batch())


def test_channels_last_goes_the_same_way():
    model = build().to(memory_format=torch.channels_last)
    model.decode_head.register_forward_hook(
        lambda module, args, out: out.contiguous(memory_format=torch.channels_last)
    )
    assert_same_labels(model, batch())


@pytest.mark.parametrize('classes', [[31], [2, 31], [2, 3, 31]])
def test_nan_is_above_all(classes):
    model = build()
    model.decode_head.conv_seg.bias.data[classes] = torch.nan
    (want, *_) = assert_same_labels(model, batch())
    assert (want.pred_sem_seg.data == classes[0]).all()


def test_nothing_is_known_of_the_images():
    model = build()
    image = torch.rand(2, 3, 40, 48)
    with torch.no_grad(), labels_only(model):
        got = model(image, mode='predict')
    want = model(image, mode='predict')
    for one, other in zip(got, want, strict=True):
        assert torch.equal(one.pred_sem_seg.data, other.pred_sem_seg.data)


class Largest(TorchDispatchMode):
    """The most elements of a tensor that an op gives."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.is_floating_point():
            self.elements = max(self.elements, out.numel())
        return out


@pytest.mark.parametrize('mode', [None, SLIDE], ids=['whole', 'slide'])
def test_there_is_no_map_of_all_classes(mode):
    model = build(classes=90, mode=mode)
    data = batch([dict(ori_shape=(160, 160))], (160, 160))
    full = 90 * 160 * 160
    with Largest() as largest:
        predict(model, data)
    assert largest.elements == full
    with labels_only(model), Largest() as largest:
        predict(model, data)
    assert 0 < largest.elements < 0.4 * full


def test_windows_that_the_head_gives_whole_are_added_up():
    """Kept one by one they would take more than the map."""
    model = build(mode=SLIDE)
    head = model.decode_head
    # Not mmseg's own, so what it resizes to is not known.
    kind = type('Own', (type(head),), dict(predict_by_feat=lambda *a: _plain(*a)))
    head.__class__ = kind
    assert_same_labels(model, batch())


def _plain(head, logits, metas):
    from mmseg.models.decode_heads.decode_head import BaseDecodeHead

    return BaseDecodeHead.predict_by_feat(head, logits, metas) * 2


def test_a_model_that_changes_the_logits_is_heard():
    class Changed(EncoderDecoder):
        def encode_decode(self, inputs, metas):
            logits = super().encode_decode(inputs, metas)
            return logits.mul_(torch.linspace(-1, 1, logits.shape[-1]))

    for mode in (None, SLIDE):
        model = build(mode=mode)
        model.__class__ = Changed
        assert_same_labels(model, batch())


class OwnResult(EncoderDecoder):
    def postprocess_result(self, *args):
        return super().postprocess_result(*args)


class OwnPredict(EncoderDecoder):
    def predict(self, *args):
        return super().predict(*args)


class OwnMerge(SegTTAModel):
    def merge_preds(self, *args):
        return super().merge_preds(*args)


@pytest.mark.parametrize('kind', [OwnResult, OwnPredict])
def test_a_segmentor_of_its_own_kind_is_left_alone(kind):
    model = build()
    model.__class__ = kind
    with labels_only(model) as done:
        assert not done and 'seg_logits' in predict(model, batch())[0]
    for other in (OwnMerge(module=model), torch.nn.Linear(1, 1)):
        with labels_only(other) as done:
            assert not done


def test_a_segmentor_with_other_inference_keeps_only_labels():
    """mmseg has one: its logits are whole, but once."""

    class Own(EncoderDecoder):
        def whole_inference(self, *args):
            return super().whole_inference(*args) * 2

    Own.__module__ = 'mmseg.own'
    model = build()
    model.__class__ = Own
    assert_same_labels(model, batch())


# Several scales and flips


def scales():
    """What a data loader gives of one image: inputs and samples of each form."""
    forms = []
    for size in ((41, 53), (56, 72)):
        for flip in (False, True):
            form = dict(ori_shape=(61, 77), flip=flip, flip_direction='horizontal')
            forms.append(batch([form], size))
    return {key: [form[key] for form in forms] for key in forms[0]}


@pytest.fixture
def one_thread():
    """More of them share out the pixels, and round the ends of each share otherwise."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_parts_of_a_softmax_have_the_bits_of_the_whole(one_thread):
    logits = 4 * torch.randn(19, 3 * module.MERGED_STEP + 77)
    parts = [part.softmax(dim=0) for part in logits.split(module.MERGED_STEP, dim=1)]
    assert torch.equal(torch.cat(parts, dim=1), logits.softmax(dim=0))


@pytest.mark.usefixtures('one_thread')
@pytest.mark.parametrize('classes', [45, 1])
@pytest.mark.parametrize('mode', [None, SLIDE], ids=['whole', 'slide'])
@pytest.mark.parametrize('merged', [2**30, 2**19], ids=['at once', 'in parts'])
def test_labels_of_several_scales_are_the_same(classes, mode, merged, monkeypatch):
    monkeypatch.setattr(module, 'MERGED_BYTES', merged)
    if classes == 1:
        segmentor = build(classes=2, mode=mode, out_channels=1, threshold=0.62)
    else:
        segmentor = build(mode=mode)
    want = assert_same_labels(SegTTAModel(module=segmentor), scales())
    assert len(want[0].pred_sem_seg.data.unique()) > (1 if classes == 1 else 2)


# The hook


def runner(metric, *hooks, model=None):
    from mmseg.visualization import SegLocalVisualizer

    part = type('Part', (SimpleNamespace,), dict(__module__='mmengine.x'))
    loop = part(evaluator=part(metrics=[metric]))
    return SimpleNamespace(
        model=model or build(),
        val_loop=loop,
        test_loop=loop,
        hooks=hooks,
        visualizer=SegLocalVisualizer(),
    )


@pytest.mark.parametrize('task', ['val', 'test'])
def test_the_hook_leaves_them_out_and_gives_them_back(task):
    from mmengine.hooks import IterTimerHook

    run = runner(IoUMetric(), IterTimerHook())
    hook = LabelsOnlyHook()
    getattr(hook, f'before_{task}')(run)
    assert 'seg_logits' not in predict(run.model, batch())[0]
    getattr(hook, f'after_{task}')(run)
    assert 'seg_logits' in predict(run.model, batch())[0]


class OwnMetric(IoUMetric):
    """Might read logits."""


def own_hook(method):
    from mmengine.hooks import Hook

    return type('Own', (Hook,), {method: lambda *args, **kwargs: None})()


@pytest.mark.parametrize(
    'parts',
    [(OwnMetric(),)]
    + [(IoUMetric(), own_hook(x)) for x in ('after_test_iter', '_after_iter')],
)
def test_parts_of_another_package_keep_them(parts):
    run = runner(*parts)
    LabelsOnlyHook().before_test(run)
    assert 'seg_logits' in predict(run.model, batch())[0]


def test_hooks_that_look_at_no_prediction_do_not_matter():
    run = runner(IoUMetric(), own_hook('after_train_iter'))
    LabelsOnlyHook().before_test(run)
    assert 'seg_logits' not in predict(run.model, batch())[0]
