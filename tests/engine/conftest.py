import pytest

import warm


@pytest.fixture(autouse=True, scope='package')
def quick_runners():
    with pytest.MonkeyPatch.context() as patch:
        warm.hurry_runners(patch.setattr)
        yield
