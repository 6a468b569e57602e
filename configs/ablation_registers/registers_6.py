_base_ = './baseline.py'
ablation = dict(order=6, row='6 registers, each reduced by 2', paper=None)
model = dict(backbone=dict(registers=6), head=dict(num_registers=6, reduce=2))
