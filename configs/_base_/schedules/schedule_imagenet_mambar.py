# That of Mamba®'s first stage. The published code keeps averages of the weights, but
# neither evaluates them nor hands them on, so there are none here. It validates in
# bfloat16; here it is float32.
_base_ = './schedule_imagenet.py'
optim_wrapper = dict(type='mmvssm.Bf16OptimWrapper')
# By epoch. The cosine spans all epochs, and the warm-up hides its begin.
param_scheduler = dict(
    type='mmvssm.TimmCosineLR', warmup=5, warmup_lr=1e-6, eta_min=1e-5, by_epoch=True
)
