_base_ = './baseline.py'
ablation = dict(order=11, row='Prediction from one register', paper=dict(top1='81.7'))
model = dict(head=dict(pooling='one'))
