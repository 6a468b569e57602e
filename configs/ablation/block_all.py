# The paper does not say how this row keeps its FLOPs. With as many blocks as the
# baseline it would have 24.0 M and 3.9 G.
_base_ = './baseline.py'
ablation = dict(
    order=6,
    row='+ Block design, all',
    paper=dict(params='28', flops='4.7', top1='79.4'),
)
model = dict(
    backbone=dict(arch=dict(_delete_=True, depths=(2, 2, 9, 2), dims=96), design='all')
)
