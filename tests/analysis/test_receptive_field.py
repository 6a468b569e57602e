import pytest
import torch

from families import FAMILIES
from mmvssm.analysis.receptive_field import (
    cumulative_shares,
    receptive_field,
    squares_of,
)

HEIGHT, WIDTH = 12, 8


@pytest.mark.parametrize('name', FAMILIES)
def test_field_against_differences(name):
    """The definition in float64: move one value of the image after another."""
    torch.manual_seed(0)
    backbone = FAMILIES[name]().double().eval()
    image = torch.randn(1, 3, HEIGHT, WIDTH, dtype=torch.float64)
    found = receptive_field(backbone, image)

    step = 1e-5
    moves = torch.eye(image.numel(), dtype=torch.float64).view(-1, 3, HEIGHT, WIDTH)

    def scores(images):
        with torch.no_grad():
            out = backbone(images)[-1]
        rows, columns = out.shape[2:]
        centre = out[:, :, rows // 2, columns // 2]
        return torch.stack([sum(v for v in row if v > 0) for row in centre])

    slopes = (scores(image + step * moves) - scores(image - step * moves)) / (2 * step)
    expected = torch.zeros(HEIGHT, WIDTH, dtype=torch.float64)
    for k, slope in enumerate(slopes.tolist()):
        i, j = k // WIDTH % HEIGHT, k % WIDTH
        expected[i, j] += max(slope, 0.0)
    assert expected.sum() > 0
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


def test_images_are_summed_and_left_alone():
    torch.manual_seed(0)
    backbone = FAMILIES['vmamba_v05_noz']().eval()
    images = torch.randn(2, 3, 16, 16)
    together = receptive_field(backbone, images)
    alone = [receptive_field(backbone, image[None]) for image in images]
    torch.testing.assert_close(together, alone[0] + alone[1])
    assert not images.requires_grad
    assert all(p.grad is None for p in backbone.parameters())


@pytest.mark.parametrize('size', [(9, 9), (8, 8), (6, 11), (5, 2)])
def test_squares_against_loops(size):
    height, width = size
    field = torch.rand(size, generator=torch.Generator().manual_seed(0)).double()
    shares = (0.2, 0.3, 0.5, 0.99)
    total = field.sum().item()
    expected = []
    for share in shares:
        for i in range(1, max(size)):
            pixels = [
                field[r, c].item()
                for r in range(height)
                for c in range(width)
                if abs(r - height // 2) <= i and abs(c - width // 2) <= i
            ]
            if sum(pixels) > share * total:
                expected.append((share, 2 * i + 1, len(pixels) / (height * width)))
                break
    assert [tuple(x) for x in squares_of(field, shares)] == [
        (share, side, pytest.approx(area)) for share, side, area in expected
    ]
    for i, share in enumerate(cumulative_shares(field).tolist()):
        inside = sum(
            field[r, c].item()
            for r in range(height)
            for c in range(width)
            if max(abs(r - height // 2), abs(c - width // 2)) <= i
        )
        assert share == pytest.approx(inside / total)
    assert share == pytest.approx(1)


def test_a_single_bright_pixel_is_in_the_smallest_square():
    field = torch.zeros(32, 32)
    field[16, 16] = 1
    assert {square.side for square in squares_of(field)} == {3}


@pytest.mark.parametrize('value', [0.0, float('nan'), float('inf')])
def test_no_shares(value):
    with pytest.raises(ValueError, match='there are no shares'):
        squares_of(torch.full((4, 4), value))
