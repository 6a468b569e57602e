_base_ = './baseline.py'
ablation = dict(
    order=4, row='- Normalisation', paper=dict(params='28', flops='4.5', top1='72.4')
)
model = dict(backbone=dict(normalise=False))
