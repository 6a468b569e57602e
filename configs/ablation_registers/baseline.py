# Mamba-R B: 12 registers, each reduced to a quarter of its channels, spread evenly. All
# other rows inherit from this one. They are classifiers, as segmentors drop the
# registers, and train as the first of the three published trainings, at 128x128.
# `ablation` has the place of a row in the table, and the figures of the article
# (arXiv 2405.14858), whose accuracies are those after all three.
_base_ = ['../classification/mambar_b_stage1_in1k.py']
ablation = dict(
    order=0,
    row='12 registers, each reduced by 4 (Mamba-R B)',
    paper=dict(params='99', top1='82.9'),
)
