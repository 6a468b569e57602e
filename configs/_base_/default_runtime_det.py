_base_ = './default_runtime.py'
default_scope = 'mmdet'
# Image sizes differ from batch to batch.
env_cfg = dict(cudnn_benchmark=False)
visualizer = dict(type='DetLocalVisualizer')
log_processor = dict(by_epoch=True)
# mmdet cannot merge masks: tools/test.py --tta is for segmentors.
tta_model = None
