_base_ = './mambar_b_stage1_in1k.py'
# Published for B alone. That the other sizes are trained alike is an assumption.
model = dict(
    backbone=dict(arch='t'),
    head=dict(in_channels=192, reduce=1),
)
