_base_ = './baseline.py'
ablation = dict(order=11, row='Prediction from the mean of the registers', paper=None)
model = dict(head=dict(pooling='mean'))
