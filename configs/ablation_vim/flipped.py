# As in the paper's table 4, without a class token: compare it with mean.py.
_base_ = './mean.py'
ablation = dict(
    order=6, row='Mean, one direction, sequences flipped at random', paper=None
)
model = dict(backbone=dict(directions='forward', flip_sequences=0.5))
