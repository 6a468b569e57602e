import pytest
import torch

from mmvssm.layers import insert_tokens, split_tokens, token_positions
from mmvssm.layers.tokens import PLACEMENTS


@pytest.mark.parametrize(
    'patches,tokens,placement,positions',
    [
        (196, 1, 'middle', (98,)),
        (729, 1, 'middle', (364,)),
        (196, 1, 'head', (0,)),
        (196, 2, 'ends', (0, 197)),
        (1, 2, 'ends', (0, 2)),
        (9, 0, 'even', ()),
        (9, 0, 'middle', ()),
        (9, 3, 'even', (2, 5, 8)),
        (9, 3, 'head', (0, 1, 2)),
        (9, 3, 'middle', (4, 5, 6)),
        (196, 12, 'even', tuple(range(15, 192, 16))),
        # Fewer patches than registers.
        (2, 3, 'even', (0, 1, 2)),
    ],
)
def test_positions(patches, tokens, placement, positions):
    assert token_positions(patches, tokens, placement) == positions


@pytest.mark.parametrize('placement,tokens', [('tail', 1), ('ends', 1), ('ends', 3)])
def test_wrong_placement(placement, tokens):
    with pytest.raises(ValueError, match=f'cannot place {tokens} tokens at'):
        token_positions(9, tokens, placement)


@pytest.mark.parametrize('placement', PLACEMENTS)
@pytest.mark.parametrize('patches', [1, 2, 7, 40])
@pytest.mark.parametrize('tokens', [0, 1, 2, 3, 12])
def test_insert_and_split(patches, tokens, placement):
    if placement == 'ends' and tokens != 2:
        return
    positions = token_positions(patches, tokens, placement)
    assert len(positions) == tokens
    x, extra = torch.randn(2, patches, 3), torch.randn(2, tokens, 3)
    sequence = insert_tokens(x, extra, positions)
    assert sequence.shape == (2, patches + tokens, 3)
    for k, position in enumerate(positions):
        assert torch.equal(sequence[:, position], extra[:, k])
    again, again_extra = split_tokens(sequence, positions)
    assert torch.equal(again, x) and torch.equal(again_extra, extra)
