_base_ = './class_token.py'
ablation = dict(order=3, row='A class token, widened to 2304 channels', paper=None)
model = dict(head=dict(widen=3))
