_base_ = './default_runtime.py'
default_scope = 'mmpretrain'
visualizer = dict(type='UniversalVisualizer')
# For tools/test.py --tta, with a tta_pipeline: averages the scores of each image.
tta_model = dict(type='AverageClsScoreTTA')
