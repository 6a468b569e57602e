_base_ = './mambar_b_stage3_in1k.py'
# Published for B alone. That the other sizes are trained alike is an assumption.
model = dict(
    backbone=dict(arch='l'),
    head=dict(in_channels=1024, num_registers=16, reduce=8),
)
load_from = 'work_dirs/mambar_l_stage2_in1k/epoch_100.pth'
