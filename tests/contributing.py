"""The worked examples of CONTRIBUTING.md."""

import re

from tiny import REPO


def example_code(section):
    """The Python code of a section, which has one block of it."""
    text = (REPO / 'CONTRIBUTING.md').read_text()
    (body,) = re.findall(rf'^## {section}\n(.*?)(?=^## |\Z)', text, re.S | re.M)
    (code,) = re.findall(r'```python\n(.*?)```', body, re.S)
    return code


def run_example(section, **names):
    """Run the Python code of a section; gives what it defines."""
    found = dict(names, __name__='example')
    exec(compile(example_code(section), f'CONTRIBUTING.md: {section}', 'exec'), found)
    return found
