"""Classification heads."""

from mmvssm.heads.classifier import ClassificationHead, ImageClassifier
from mmvssm.heads.tokens import ClassTokenHead, RegisterHead

__all__ = ['ClassTokenHead', 'ClassificationHead', 'ImageClassifier', 'RegisterHead']
