_base_ = './baseline.py'
ablation = dict(order=5, row='1 register, not reduced', paper=None)
model = dict(backbone=dict(registers=1), head=dict(num_registers=1, reduce=1))
