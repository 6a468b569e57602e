"""Small plain backbones, and what their tests share."""

from mmvssm.backbones import MambaR, Vim

TINY = dict(embed_dims=16, depth=4, patch_size=4, stride=4, d_state=4)
# Name -> builder. Every one takes the arguments the two classes share.
BUILDERS = {
    'vim': lambda **k: Vim(TINY, img_size=32, **k),
    'vim-middle': lambda **k: Vim(TINY, img_size=32, cls_token='middle', **k),
    'vim-double': lambda **k: Vim(TINY, img_size=32, cls_token='double', **k),
    'vim-rope': lambda **k: Vim(
        TINY,
        img_size=32,
        cls_token='head',
        rope=True,
        rope_residual=True,
        rope_grid=8,
        **k,
    ),
    'vim-overlap': lambda **k: Vim(dict(TINY, stride=2), img_size=32, **k),
    'mambar': lambda **k: MambaR(dict(TINY, registers=3), img_size=32, **k),
    'mambar-none': lambda **k: MambaR(TINY, img_size=32, registers=0, **k),
    'mambar-head': lambda **k: MambaR(TINY, img_size=32, placement='head', **k),
}


def loss(maps):
    return sum(x.square().mean() for x in maps)
