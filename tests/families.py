"""A small model of each family, of the layers that its published models have."""

from mmvssm.backbones import MLLA, VSSM, MambaR, Vim

PLAIN = dict(embed_dims=16, depth=2, patch_size=4, stride=4, d_state=4)
V0 = dict(
    depths=(1, 1),
    dims=16,
    ssm_d_state=4,
    ssm_ratio=2.0,
    forward_type='v0',
    mlp_ratio=0.0,
    patchembed_version='v1',
    downsample_version='v1',
)
STAGES = dict(out_indices=(0, 1), drop_path_rate=0.0)
# Name -> builder, which takes what the class takes. The position embeddings of Vim
# and Mamba® are for images of 32x32.
FAMILIES = {
    'vmamba_v0': lambda **k: VSSM(V0, **STAGES | k),
    'vmamba_v05_noz': lambda **k: VSSM(dict(depths=(1, 1), dims=16), **STAGES | k),
    'vim': lambda **k: Vim(
        PLAIN, img_size=32, cls_token='middle', **dict(drop_path_rate=0.0) | k
    ),
    'mambar': lambda **k: MambaR(
        dict(PLAIN, registers=3), img_size=32, **dict(drop_path_rate=0.0) | k
    ),
    'mlla': lambda **k: MLLA(
        dict(depths=(1, 1), dims=16, num_heads=(2, 4)), **STAGES | k
    ),
}
