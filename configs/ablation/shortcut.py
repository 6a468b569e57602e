_base_ = './baseline.py'
ablation = dict(
    order=3, row='+ Shortcut', paper=dict(params='28', flops='4.5', top1='77.8')
)
model = dict(backbone=dict(shortcut=True))
