# The scan of Mamba in the block of Mamba, in one direction. There is no normalisation,
# so queries and keys need no feature map.
_base_ = './baseline.py'
ablation = dict(order=14, row='All six: Mamba', paper=None)
model = dict(
    backbone=dict(
        arch=dict(_delete_=True, depths=(2, 2, 9, 2), dims=96),
        design='all',
        input_gate=True,
        forget_gate=True,
        shortcut=True,
        normalise=False,
        single_head=True,
        feature_map=False,
    )
)
