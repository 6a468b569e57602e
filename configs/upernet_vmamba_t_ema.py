_base_ = './upernet_vmamba_t.py'
# A moving average of the weights (decay 1 - momentum = 0.9999) is what is validated
# and what checkpoints have as 'state_dict'; the weights that are trained are in their
# 'ema_state_dict'.
custom_hooks = [dict(type='EMAHook', momentum=1e-4)]
