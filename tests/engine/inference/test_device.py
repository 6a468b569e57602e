import pytest

from mmvssm.engine import UsageError
from mmvssm.engine.inference.device import checked_device


def test_a_device_that_is_there():
    assert checked_device('cpu') == 'cpu'
    assert checked_device(None)


@pytest.mark.parametrize('device', ['cuda:77', 'nonsense'])
def test_no_such_device(device):
    with pytest.raises(UsageError, match=f"cannot use the device '{device}'"):
        checked_device(device)
