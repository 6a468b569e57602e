_base_ = './baseline.py'
ablation = dict(order=12, row='Prediction from the mean of the patches', paper=None)
model = dict(head=dict(pooling='patches'))
