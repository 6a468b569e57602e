"""What the checkpoints of VMamba and MLLA have in common."""

import re
from collections.abc import Iterable


def component(key: str) -> str | None:
    """Which part the name belongs to that is there as a whole or not at all.

    None for output norms, which classification files do not have, and for the
    counters of batch norms, which have no say in eval mode. A position
    embedding, an option of the published code that no published model takes and
    none here has, counts as part of the stem: without it a file's weights are
    of no use.
    """
    if key.endswith('.num_batches_tracked'):
        return None
    if key in ('pos_embed', 'absolute_pos_embed'):
        return 'patch_embed.'
    match = re.match(r'patch_embed\.|layers\.\d+\.(blocks|downsample)\.', key)
    return match and match[0]


def count_blocks(keys: Iterable[str]) -> tuple[int, ...]:
    """Number of blocks of each stage."""
    depths = {}
    for key in keys:
        match = re.match(r'layers\.(\d{1,6})\.blocks\.(\d{1,6})\.', key)
        if match:
            stage, block = map(int, match.groups())
            depths[stage] = max(depths.get(stage, 0), block + 1)
    return tuple(depths[stage] for stage in sorted(depths))
