# One register, not reduced, in the middle: a Vim with a class token.
_base_ = './baseline.py'
ablation = dict(order=2, row='1 register in the middle: a class token', paper=None)
model = dict(
    backbone=dict(registers=1, placement='middle'),
    head=dict(num_registers=1, reduce=1),
)
