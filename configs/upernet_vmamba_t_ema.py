_base_ = './upernet_vmamba_t.py'
# A moving average of the weights (decay 1 - momentum = 0.9999) is validated, and saved
# as 'state_dict' in checkpoints. The weights that are being trained are saved as
# 'ema_state_dict'.
custom_hooks = [dict(type='EMAHook', momentum=1e-4)]
