# As in the paper's table 4, without a class token: compare it with mean.py.
_base_ = './mean.py'
ablation = dict(
    order=5, row='Mean, one direction', paper=dict(_delete_=True, top1='73.2')
)
model = dict(backbone=dict(directions='forward'))
