"""Every kernel of the backend 'cuda', compiled without a GPU.

A program: it compiles what all ops launch, in the folder MMVSSM_CACHE_DIR, and prints
the paths of the sources that these kernels are in.
"""

import torch

from mmvssm.ops.cuda import kernels
from ops import ops_under_test

# Sizes for each way in which a kernel is compiled and launched.
CALLS = (
    (ops_under_test.selective_scan, (1, 32, 40, 1, 1)),
    (ops_under_test.selective_scan, (1, 32, 40, 4, 1)),
    (ops_under_test.ss2d_scan, (1, 32, 5, 6, 2, 1)),
    (ops_under_test.bidirectional_scan, (1, 32, 9, 2, 4, 4)),
    (ops_under_test.add_rms_norm, (6, 32)),
    (ops_under_test.linear_attention, (1, 4, 4, 32, 2)),
)


def launches():
    """One launch of each kernel, with whatever constants."""
    with kernels.recording() as found:
        for op, sizes in CALLS:
            op(*sizes, dtype=torch.float32).run('cuda')
    # A GPU that one CTA for each image keeps busy.
    with kernels.recording(multiprocessors=1) as small:
        case = ops_under_test.ss2d_scan(
            *(4, 64, 14, 14, 2, 1), dtype=torch.float32, channels_last=True
        )
        case.run('cuda')
    found += small
    return list({launch.kernel: launch for launch in found}.values())


def main():
    found = launches()
    kernels.prepare(found, 90)
    for launch in found:
        code = kernels.compiled(launch.kernel, launch.constants, 90)
        assert launch.kernel.entry.encode() in code
        print(launch.kernel.path)


if __name__ == '__main__':
    main()
