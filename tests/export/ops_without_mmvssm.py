"""Run ops of mmvssm in a process that does not import it: FILE LIBRARY.

The file has the calls, and gets what they return. See ``test_torch_library.py``.
"""

import sys

import torch

file, library = sys.argv[1:]
torch.ops.load_library(library)
found = []
with torch.no_grad():
    for name, arguments in torch.load(file):
        try:
            found.append(getattr(torch.ops.mmvssm, name)(*arguments))
        except RuntimeError as error:
            found.append(str(error))
assert 'mmvssm' not in sys.modules
torch.save(found, file)
