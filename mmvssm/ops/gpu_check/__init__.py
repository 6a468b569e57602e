"""The check that decides whether the GPU kernels are used by default on a machine.

``backends.py`` asks ``choice.py``, which uses the verdicts of ``verdicts.py``. If there
is no verdict, ``run.py`` starts ``worker.py`` in another process. That process checks
the calls of ``cases.py`` with ``measure.py``. ``docs/gpu.md`` describes the check for
users.
"""
