_base_ = './mambar_b_stage1_in1k.py'
# Published for B alone. That the other sizes are trained alike is an assumption.
model = dict(
    backbone=dict(arch='l'),
    head=dict(in_channels=1024, num_registers=16, reduce=8),
)
