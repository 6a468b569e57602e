_base_ = './baseline.py'
ablation = dict(
    order=10, row='Prediction from one register', paper=dict(_delete_=True, top1='81.7')
)
model = dict(head=dict(pooling='one'))
