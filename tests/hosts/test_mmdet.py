"""Detectors of mmdet with each of our backbones."""

from pathlib import Path

import pytest
import torch
from mmengine.logging import MessageHub

import mmvssm  # noqa: F401  registers the backbones
from mmvssm.engine.model_check.samples import detection_sample
from tiny_det import batch, needs_detection

from .swap import Host, build, case_name, cases, complaints, without_gradient

pytestmark = needs_detection
# The maps have odd sizes, and the last one, at stride 128, two positions: a group norm
# needs that of one image.
SIZE = (97, 131)
BOXES = ((8, 8, 60, 56), (40, 30, 125, 90))
# Images of these are multiples of the last stride: their necks double sizes.
WHOLE = {
    'data_preprocessor.pad_size_divisor': 32,
    'data_preprocessor.pad_mask': True,
}
# Heads that take their width from no other setting.
WIDE = {'bbox_head.embed_dims': 32}
GRIDS = {'mask_head.num_grids': [8, 6, 4, 3, 2], 'test_cfg.mask_thr': 0.0}
# The boxes of untrained stages stay within the image.
NEAR = {f'roi_head.bbox_head.{i}.bbox_coder.target_stds': (0.01,) * 4 for i in range(6)}
BOX_HOSTS = [
    # Anchors
    Host('retinanet/retinanet_r50_fpn_1x_coco'),
    Host('faster_rcnn/faster-rcnn_r50_fpn_1x_coco'),
    Host(
        'faster_rcnn/faster-rcnn_r50-caffe-dc5_1x_coco',
        maps=(2,),
        fit=lambda c: {
            'rpn_head.in_channels': c[0],
            'roi_head.bbox_roi_extractor.out_channels': c[0],
            'roi_head.bbox_head.in_channels': c[0],
        },
    ),
    Host('cascade_rcnn/cascade-rcnn_r50_fpn_1x_coco'),
    Host('dynamic_rcnn/dynamic-rcnn_r50_fpn_1x_coco'),
    Host('double_heads/dh-faster-rcnn_r50_fpn_1x_coco'),
    Host('grid_rcnn/grid-rcnn_r50_fpn_gn-head_1x_coco'),
    Host('libra_rcnn/libra-faster-rcnn_r50_fpn_1x_coco'),
    Host('pafpn/faster-rcnn_r50_pafpn_1x_coco'),
    Host('cascade_rpn/cascade-rpn_faster-rcnn_r50-caffe_fpn_1x_coco'),
    Host('atss/atss_r50_fpn_1x_coco'),
    Host('dyhead/atss_r50_fpn_dyhead_1x_coco'),
    Host('gfl/gfl_r50_fpn_1x_coco'),
    Host('ddod/ddod_r50_fpn_1x_coco', tiny={'bbox_head.use_dcn': False}),
    Host('free_anchor/freeanchor_r50_fpn_1x_coco'),
    Host('fsaf/fsaf_r50_fpn_1x_coco'),
    Host('sabl/sabl-retinanet_r50_fpn_1x_coco'),
    Host('nas_fpn/retinanet_r50_nasfpn_crop640-50e_coco'),
    Host('yolof/yolof_r50-c5_8xb8-1x_coco'),
    Host(
        'yolo/yolov3_d53_8xb8-320-273e_coco',
        fit=lambda c: {'neck.in_channels': c[::-1]},
    ),
    # No anchors
    Host('fcos/fcos_r50-caffe_fpn_gn-head_1x_coco'),
    Host('reppoints/reppoints-moment_r50_fpn-gn_head-gn_1x_coco'),
    Host('tood/tood_r50_fpn_1x_coco'),
    Host('vfnet/vfnet_r50_fpn_1x_coco'),
    Host('autoassign/autoassign_r50-caffe_fpn_1x_coco'),
    Host('foveabox/fovea_r50_fpn_4xb4-1x_coco'),
    Host(
        'nas_fcos/nas-fcos_r50-caffe_fpn_nashead-gn-head_4xb4-1x_coco',
        maps=(0, 1, 2, 3),
        unread=True,
        fit=lambda c: {'neck.in_channels': c},
    ),
    Host('centernet/centernet_r18_8xb16-crop512-140e_coco'),
    Host('centernet/centernet-update_r50_fpn_8xb8-amp-lsj-200e_coco'),
    Host('yolox/yolox_s_8xb8-300e_coco'),
    Host('rtmdet/rtmdet_s_8xb32-300e_coco', tiny=WHOLE),
    # Queries
    Host('detr/detr_r50_8xb2-150e_coco'),
    Host('conditional_detr/conditional-detr_r50_8xb2-50e_coco', by=1),
    Host('dab_detr/dab-detr_r50_8xb2-50e_coco'),
    Host('deformable_detr/deformable-detr_r50_16xb2-50e_coco', tiny=WIDE),
    Host('dino/dino-4scale_r50_8xb2-12e_coco', tiny=WIDE),
    Host('ddq/ddq-detr-4scale_r50_8xb2-12e_coco', tiny=WIDE),
    Host('sparse_rcnn/sparse-rcnn_r50_fpn_1x_coco'),
]
MASK_HOSTS = [
    Host('mask_rcnn/mask-rcnn_r50_fpn_1x_coco'),
    Host('cascade_rcnn/cascade-mask-rcnn_r50_fpn_1x_coco'),
    Host('htc/htc_r50_fpn_1x_coco'),
    Host('ms_rcnn/ms-rcnn_r50_fpn_1x_coco'),
    Host('scnet/scnet_r50_fpn_1x_coco'),
    Host('point_rend/point-rend_r50-caffe_fpn_ms-1x_coco'),
    Host('queryinst/queryinst_r50_fpn_1x_coco', tiny=NEAR),
    Host('solo/solo_r50_fpn_1x_coco', tiny=GRIDS),
    Host(
        'solov2/solov2_r50_fpn_1x_coco',
        tiny={**GRIDS, 'mask_head.mask_feature_head.feat_channels': 32},
    ),
    Host(
        'condinst/condinst_r50_fpn_ms-poly-90k_coco_instance',
        tiny={'mask_head.num_layers': 3},
    ),
    Host(
        'boxinst/boxinst_r50_fpn_ms-90k_coco',
        tiny={
            'mask_head.num_layers': 3,
            'mask_head.feat_channels': 16,
            'mask_head.mask_feature_head.out_channels': 16,
        },
    ),
    Host('yolact/yolact_r50_1xb8-55e_coco'),
    Host('rtmdet/rtmdet-ins_s_8xb32-300e_coco', tiny=WHOLE),
    Host('mask2former/mask2former_r50_8xb2-lsj-50e_coco'),
]
PANOPTIC_HOSTS = [
    Host(
        'panoptic_fpn/panoptic-fpn_r50_fpn_1x_coco',
        tiny={'semantic_head.inner_channels': 32},
    ),
    Host('maskformer/maskformer_r50_ms-16xb1-75e_coco'),
    Host('mask2former/mask2former_r50_8xb2-lsj-50e_coco-panoptic'),
]
HOSTS = BOX_HOSTS + MASK_HOSTS + PANOPTIC_HOSTS


def built(host, family):
    import mmdet

    # Losses that change during the training ask for these.
    MessageHub.get_current_instance().update_info_dict(dict(epoch=0, iter=0))
    path = Path(mmdet.__file__).parent / '.mim' / 'configs' / f'{host.file}.py'
    # Not to sizes that are drawn, or for training at 1024x1024.
    return build(path, 'mmdet', host, family, batch_augments=None)


def data(host, number):
    """What the pipelines of the host would load."""
    from mmengine.structures import PixelData

    found = batch(BOXES, number=number, size=SIZE)
    for sample in found['data_samples']:
        sample.set_metainfo(dict(border=(0, SIZE[0], 0, SIZE[1])))
        sample.gt_sem_seg = PixelData(sem_seg=torch.randint(0, 50, (1, *SIZE)))
        if host in BOX_HOSTS:
            del sample.gt_instances.masks
    return found


# The maps of LinearAttentionStudy are like those of MLLA.
@pytest.mark.parametrize(
    'host, family', cases(HOSTS, long=['LinearAttentionStudy']), ids=case_name
)
def test_trained_and_tested(host, family):
    model = built(host, family)
    given = model.data_preprocessor(data(host, 2), True)
    loss, _ = model.parse_losses(model(**given, mode='loss'))
    assert loss.isfinite()
    loss.backward()
    assert not without_gradient(model)
    with torch.no_grad():
        (sample,) = model.eval().test_step(data(host, 1))
    if 'pred_panoptic_seg' in sample:
        assert sample.pred_panoptic_seg.sem_seg.shape == (1, *SIZE)
        return
    found = sample.pred_instances
    assert len(found)
    assert found.scores.isfinite().all()
    assert ((0 <= found.labels) & (found.labels < 80)).all()
    if 'masks' in found:
        assert found.masks.shape == (len(found), *SIZE)


@pytest.mark.parametrize(
    # The masks of BoxInst are not those of a made-up sample.
    'host',
    [x for x in HOSTS if 'boxinst' not in x.file],
    ids=case_name,
)
def test_nothing_to_complain_of(host):
    # Of whole maps: no preprocessor pads it.
    sample = detection_sample((128, 128), masks=host not in BOX_HOSTS)
    assert not complaints(built(host, 'VSSM'), sample)
