"""Prints what a GPU machine without a network must be brought as wheels.

    pip download --no-deps -d DIR $(python benchmarks/gpu_wheels.py)

One requirement a line: all that mmvssm, its GPU tests and the suite import, in the
versions that are installed here, but what comes with torch; and the rivals of
``gpu_suite.sh``. The machine needs a Python with torch; what it has besides stays as
it is. For another Python or system than this one, tell pip (``--python-version``,
``--platform``, ``--only-binary=:all:``).
"""

from importlib import metadata

from packaging.requirements import Requirement

# What the suite imports, and the rivals, which are left out where they are missing.
NEEDED = ('onedl-mmengine', 'pytest', 'pytest-xdist')
RIVALS = ('timm',)
# What any torch is installed with, and what this package does not import.
_THERE = {'torch', 'torchvision', 'numpy', 'triton', 'matplotlib', 'opencv-python'}


def wheels() -> list[str]:
    """The requirements, those of others among them, by name."""
    found: dict[str, str] = {}
    left = [*NEEDED, *RIVALS]
    while left:
        name = left.pop()
        if name in found or name in _THERE:
            continue
        try:
            distribution = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            found[name] = name
            continue
        found[name] = f'{name}=={distribution.version}'
        for requirement in map(Requirement, distribution.requires or ()):
            marker = requirement.marker
            if marker is None or marker.evaluate({'extra': ''}):
                left.append(requirement.name.lower().replace('_', '-'))
    return sorted(found.values())


if __name__ == '__main__':
    print(*wheels(), sep='\n')
