_base_ = './baseline.py'
ablation = dict(order=7, row='24 registers, each reduced by 8', paper=None)
model = dict(backbone=dict(registers=24), head=dict(num_registers=24, reduce=8))
