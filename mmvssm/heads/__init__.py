"""Classification heads."""

from mmvssm.heads.classifier import ClassificationHead, ImageClassifier

__all__ = ['ClassificationHead', 'ImageClassifier']
