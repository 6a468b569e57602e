_base_ = './baseline.py'
ablation = dict(
    order=1, row='+ Input gate', paper=dict(params='29', flops='4.5', top1='77.8')
)
model = dict(backbone=dict(input_gate=True))
