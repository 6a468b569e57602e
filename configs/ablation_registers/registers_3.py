_base_ = './baseline.py'
ablation = dict(order=5, row='3 registers, not reduced', paper=None)
model = dict(backbone=dict(registers=3), head=dict(num_registers=3, reduce=1))
