_base_ = './baseline.py'
ablation = dict(order=1, row='No registers, mean of the patches', paper=None)
model = dict(
    backbone=dict(registers=0),
    head=dict(num_registers=0, reduce=1, pooling='patches'),
)
