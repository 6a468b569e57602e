default_scope = 'mmseg'
# On a machine without an accelerator the tools use gloo.
env_cfg = dict(
    cudnn_benchmark=True,
    mp_cfg=dict(mp_start_method='fork', opencv_num_threads=0),
    dist_cfg=dict(backend='nccl'),
)
randomness = dict(seed=0)
# More to add: dict(type='TensorboardVisBackend'), dict(type='WandbVisBackend')
vis_backends = [dict(type='LocalVisBackend')]
visualizer = dict(
    type='SegLocalVisualizer', vis_backends=vis_backends, name='visualizer'
)
log_processor = dict(by_epoch=False)
log_level = 'INFO'
load_from = None
resume = False

# For tools/test.py --tta: averages over scales and flips, with the tta_pipeline.
tta_model = dict(type='SegTTAModel')
