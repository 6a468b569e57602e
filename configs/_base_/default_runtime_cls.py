_base_ = './default_runtime.py'
default_scope = 'mmpretrain'
visualizer = dict(type='UniversalVisualizer')
# tools/test.py --tta is for segmentors.
tta_model = None
