_base_ = './mambar_b_stage3_in1k.py'
# Published for B alone. That the other sizes are trained alike is an assumption.
model = dict(
    backbone=dict(arch='s'),
    head=dict(in_channels=384, reduce=2),
)
load_from = 'work_dirs/mambar_s_stage2_in1k/epoch_100.pth'
