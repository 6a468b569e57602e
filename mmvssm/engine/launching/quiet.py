"""What other packages say in every run, and what is no fault of anybody."""

import re
import warnings

from mmvssm.compat import drop_messages

# Start of a message, and why nobody needs it.
_NOISE = {
    # Packages that nothing here uses.
    'Could not import OneDL': 'data sets of a service of the forks',
    'faster_coco_eval is not installed': 'another metric than the one in the config',
    'Fail to import ``MultiScaleDeformableAttention``': 'mmcv-lite; heads that need it '
    'fail when they are built',
    # Defaults that are meant.
    'Default ``avg_non_ignore`` is False': 'how the published models were trained',
    'The draw is False': 'pictures are drawn with --show and --show-dir only',
    'The prefix is not set in metric class': 'the metrics are called mIoU, not x/mIoU',
    r'Setting (OMP|MKL)_NUM_THREADS': "mmengine's default for several processes",
    "'pin_memory' argument is set as true but no accelerator": 'a config is for both',
    # torch about a file; what it cannot read is an error, with this package's advice.
    'Detected pickle protocol': 'it names weights_only',
    # mmengine about its own code.
    '"FileClient" will be deprecated': 'its LoggerHook uses it',
    '"HardDiskBackend" is the alias': 'its LoggerHook uses it',
    # A depthwise filter has one input channel: any stride of that axis is right.
    r'(?s)Grad strides do not match bucket view.*grad\.sizes\(\) = \[\d+, 1,': 'DDP',
}


def silence_noise() -> None:
    """Drop log lines, printed lines and warnings of ``_NOISE`` in this process.

    The tools call this when they start; importing the package does not.
    """
    for start in _NOISE:
        warnings.filterwarnings('ignore', message=start)
    drop_messages(re.compile('|'.join(f'(?:{s})' for s in _NOISE if '(?s)' not in s)))
