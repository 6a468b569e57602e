_base_ = './baseline.py'
ablation = dict(
    order=5, row='- Multi-head', paper=dict(params='24', flops='3.9', top1='73.5')
)
model = dict(backbone=dict(single_head=True))
