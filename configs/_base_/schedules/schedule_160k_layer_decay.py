# The schedule of the other models, with learning rates that decrease towards the stem.
_base_ = './schedule_160k.py'
optim_wrapper = dict(
    constructor='mmvssm.LayerDecayOptimWrapperConstructor',
    paramwise_cfg=dict(_delete_=True, layer_decay_rate=0.92),
)
