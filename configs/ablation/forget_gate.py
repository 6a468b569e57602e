_base_ = './baseline.py'
ablation = dict(
    order=2, row='+ Forget gate', paper=dict(params='29', flops='4.8', top1='78.4')
)
model = dict(backbone=dict(forget_gate=True))
