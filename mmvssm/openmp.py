"""How long torch's threads wait in a loop for their next work.

On Linux torch computes on the threads of GNU OpenMP (libgomp). Between two pieces of
work they wait in a loop and keep their cores busy meanwhile. If other programs need
these cores, the threads that wait take them from those that have work. A short wait
avoids a part of that, and still finds the next work without a sleep where there are no
other programs: ``python benchmarks/contention.py --settings GOMP_SPINCOUNT=300000
default`` compares it with libgomp's own.
"""

import os
import sys

# Rounds of the loop. Fewer slow a training that is alone, more one that is not.
SPIN_COUNT = 1000


def shorten_wait() -> bool:
    """Let the threads sleep after a short wait, unless the environment says otherwise.

    libgomp reads ``GOMP_SPINCOUNT`` and ``OMP_WAIT_POLICY`` when torch is loaded, so
    this has an effect before that only. Child processes inherit it.

    Returns:
        Whether the wait was set.
    """
    given = {'GOMP_SPINCOUNT', 'OMP_WAIT_POLICY'} & set(os.environ)
    if given or 'torch' in sys.modules:
        return False
    os.environ['GOMP_SPINCOUNT'] = str(SPIN_COUNT)
    return True
