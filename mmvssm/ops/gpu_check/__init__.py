"""Whether the kernels for a GPU may be taken unasked, found on that very machine.

``backends.py`` asks ``choice.py``, which goes by the verdicts in ``verdicts.py``. Where
there is none, ``run.py`` has the calls of ``cases.py`` checked by ``worker.py`` in
another process, each as ``measure.py`` says. ``docs/gpu.md`` tells users about it.
"""
