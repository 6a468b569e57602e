_base_ = './upernet_mambar_l.py'
# Weights, gradients and the state of AdamW are spread over the processes.
strategy = dict(type='mmvssm.FSDPStrategy')
