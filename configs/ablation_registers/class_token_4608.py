_base_ = './class_token.py'
ablation = dict(order=4, row='A class token, widened to 4608 channels', paper=None)
model = dict(head=dict(widen=6))
