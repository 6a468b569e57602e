"""Class activation maps (Grad-CAM, arXiv 1610.02391) of models of every family."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from mmvssm.families import families
from mmvssm.layers import split_tokens


class ToMap:
    """Turns the output of a layer into a map (B, C, H, W).

    It is ``reshape_transform`` of the package grad-cam. A map stays what it is. Of a
    sequence (B, L, C) class tokens and registers are taken out, and its patches are put
    on their places, for images of any size. Of a tuple it takes the first tensor.

    Args:
        backbone: Where the layer is. Its patch embedding gets a hook, which notes the
            size of the map.
    """

    def __init__(self, backbone: nn.Module):
        self.backbone = backbone
        self.size: tuple[int, int] | None = None
        backbone.patch_embed.register_forward_hook(self._note)

    def _note(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        self.size = tuple(output.shape[2:])

    def __call__(self, output: Tensor | tuple) -> Tensor:
        """Output of the layer, or its gradient -> map (B, C, H, W)."""
        output = first_tensor(output)
        if output.ndim == 4:
            return output
        if output.ndim != 3 or self.size is None:
            raise ValueError(
                f'a class activation map needs a layer that gives a map (B, C, H, W) '
                f'or a sequence (B, L, C), got {tuple(output.shape)}'
            )
        height, width = self.size
        positions = self.backbone.token_positions(height * width)
        if output.shape[1] != height * width + len(positions):
            raise ValueError(
                f'a sequence of {output.shape[1]} positions is none of {height} x '
                f'{width} patches and {len(positions)} tokens'
            )
        patches, _ = split_tokens(output, positions)
        return patches.mT.unflatten(2, (height, width))


def target_layer_and_reshape(model: nn.Module) -> tuple[nn.Module, ToMap]:
    """The layer to explain a model by, and what makes a map of its output.

    The layer is the one of the family's record: the last block of a hierarchical
    backbone; in Vim and Mamba® the mixer of the block before the last one, because
    what the other tokens give in the last mixer does not reach the class token.

    With the package grad-cam::

        layer, reshape = target_layer_and_reshape(net)
        GradCAM(model=net, target_layers=[layer], reshape_transform=reshape)

    Args:
        model: A classifier, segmentor or detector with a ``backbone`` of this package,
            or that backbone itself.

    Raises:
        ValueError: The backbone belongs to no family.
    """
    backbone = getattr(model, 'backbone', model)
    for family in families():
        if isinstance(backbone, family.backbone):
            return family.target_layer(backbone), ToMap(backbone)
    raise ValueError(
        f'{type(backbone).__name__} belongs to no family of mmvssm, so there is no '
        'layer to explain it by'
    )


def first_tensor(output: Any) -> Tensor:
    """The output of a layer, or the first one if it has several."""
    return output[0] if isinstance(output, (tuple, list)) else output


def grad_cam(
    layer: nn.Module, reshape: Callable[[Tensor], Tensor], score: Callable[[], Tensor]
) -> Tensor:
    """Where a layer's output raises a score.

    With the map F of the layer and the gradient G of the score with respect to it:
    relu(sum over channels of F[c] times the mean of G[c] over the map).

    Args:
        layer, reshape: Of :func:`target_layer_and_reshape`.
        score: Runs the model on one image in eval mode, and returns one number.

    Returns:
        (H, W), from 0 to 1.

    Raises:
        ValueError: The layer does not run, or the map is not finite or zero everywhere.
    """
    outputs: list[Tensor] = []

    def keep(module: nn.Module, inputs: Any, output: Any) -> None:
        tensor = first_tensor(output)
        outputs.append(tensor if tensor.requires_grad else tensor.requires_grad_())

    hook = layer.register_forward_hook(keep)
    try:
        with torch.enable_grad():
            value = score()
            if not outputs:
                raise ValueError('the layer to explain by does not run in this model')
            gradients = None
            if value.requires_grad:
                gradients = torch.autograd.grad(value, outputs[-1], allow_unused=True)
    finally:
        hook.remove()
    if gradients is None or gradients[0] is None:
        raise ValueError('the score does not depend on the layer to explain by')
    with torch.no_grad():
        maps, gradient = (reshape(x) for x in (outputs[-1], gradients[0]))
        weights = gradient.mean((2, 3), keepdim=True)
        found = (weights * maps).sum(1)[0].clamp(min=0)
    largest = found.max()
    if not found.isfinite().all():
        raise ValueError('the class activation map is not finite')
    if largest == 0:
        raise ValueError(
            'the class activation map is zero everywhere: nothing that this layer '
            'shows raises the score; choose another class or another layer'
        )
    return found / largest
