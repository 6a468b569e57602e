"""Runs ONNX files with the kernel library, in a process without torch.

``python in_onnxruntime.py FOLDER LIBRARY THREADS ...``: for every ``NAME.onnx`` with
its inputs ``NAME.npz``, the outputs for each number of threads go to
``NAME.THREADS.npz``, or the message of an error to ``NAME.THREADS.txt``.
"""

import os
import sys
import threading
from pathlib import Path

import numpy as np
import onnxruntime


def tasks():
    folder = Path('/proc/self/task')
    return len(os.listdir(folder)) if folder.exists() else 0


def session_of(file, library, threads):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    # So that tools which watch over memory see each tensor.
    options.enable_cpu_mem_arena = False
    options.register_custom_ops_library(library)
    return onnxruntime.InferenceSession(
        str(file), options, providers=['CPUExecutionProvider']
    )


def run(session, inputs):
    """Outputs, the same in every run: three by turns, three at once."""
    names = [output.name for output in session.get_outputs()]
    found = []

    def once():
        found.append(session.run(names, inputs))

    for _ in range(3):
        once()
    together = [threading.Thread(target=once) for _ in range(3)]
    for thread in together:
        thread.start()
    for thread in together:
        thread.join()
    assert len(found) == 6
    for outputs in found[1:]:
        for a, b in zip(found[0], outputs):
            assert a.tobytes() == b.tobytes(), 'another run has other bits'
    return dict(zip(names, found[0]))


def main(folder, library, *numbers_of_threads):
    for file in sorted(Path(folder).glob('*.onnx')):
        with np.load(file.with_suffix('.npz')) as arrays:
            inputs = dict(arrays)
        for threads in map(int, numbers_of_threads):
            base = file.with_suffix(f'.{threads}')
            try:
                session = session_of(file, library, threads)
                before = tasks()
                session.run(None, inputs)
                # The session has its threads, and the kernels use no others. (One of
                # the last session may have ended only now.)
                assert tasks() <= before, 'the kernels started threads'
                np.savez(f'{base}.npz', **run(session, inputs))
            except AssertionError:
                raise
            except Exception as error:
                Path(f'{base}.txt').write_text(str(error))
    assert not {'torch', 'mmvssm'} & set(sys.modules)
    maps = Path('/proc/self/maps')
    assert not (maps.exists() and 'omp.so' in maps.read_text()), 'OpenMP was loaded'


if __name__ == '__main__':
    main(*sys.argv[1:])
