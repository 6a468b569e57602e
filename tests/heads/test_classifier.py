import torch

from mmvssm.heads import ClassificationHead, ImageClassifier


def test_head_norms_before_it_pools():
    torch.manual_seed(0)
    head = ClassificationHead(8, 5)
    x = torch.randn(2, 8, 3, 4)
    pooled = torch.nn.functional.layer_norm(x.movedim(1, -1), (8,)).mean((1, 2))
    torch.testing.assert_close(head.pre_logits(x), pooled)
    torch.testing.assert_close(head(x), head.head(pooled))


def test_head_names_and_initialisation():
    torch.manual_seed(0)
    head = ClassificationHead(64, 1000)
    assert list(head.state_dict()) == [
        'norm.weight',
        'norm.bias',
        'head.weight',
        'head.bias',
    ]
    assert abs(head.head.weight.std() - 0.02) < 1e-3
    assert not head.head.bias.any()


def test_classifier_takes_the_last_map():

    class Maps(torch.nn.Module):
        def forward(self, x):
            return x, x[:, :, :2] + 1

    net = ImageClassifier(Maps(), ClassificationHead(8, 5))
    x = torch.randn(2, 8, 3, 4)
    torch.testing.assert_close(net(x), net.classifier(x[:, :, :2] + 1))
