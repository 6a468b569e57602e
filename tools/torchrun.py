"""torchrun with the exit code of what it runs.

    tools/torchrun.py OPTIONS SCRIPT [arguments of SCRIPT]

It takes the options of ``python -m torch.distributed.run``. Where a process fails, that
command ends in a traceback of its own and exit code 1. This one ends with the exit code
of the first process that failed. After SIGTERM it is 75, as that of a training that is
to be started again.
"""

import sys

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main

if __name__ == '__main__':
    try:
        main()
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        # A negative one is that of a signal, and shells add 128 to it.
        sys.exit(failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode)
    except SignalException:
        sys.exit(75)
