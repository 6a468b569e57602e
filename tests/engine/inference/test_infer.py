import pytest
from mmengine.config import Config
from PIL import Image

pytest.importorskip('mmseg')

from mmvssm.engine import UsageError
from mmvssm.engine.inference.infer import find_images, free_name, load_model


def test_files_folders_and_patterns(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'in/deep').mkdir(parents=True)
    for name in ('in/b.JPG', 'in/deep/a.png', 'c[1].png'):
        Image.new('RGB', (4, 4)).save(name)
    (tmp_path / 'in/notes.txt').write_text('')
    found = find_images(['in', 'in/*.JPG', 'c[1].png', 'absent.jpg'])
    assert list(map(str, found)) == [
        'in/b.JPG',
        'in/deep/a.png',
        'c[1].png',
        'absent.jpg',
    ]
    assert find_images([f'{tmp_path}/in/**/*.png']) == [tmp_path / 'in/deep/a.png']
    for nothing in ('*.bmp', 'empty'):
        (tmp_path / 'empty').mkdir(exist_ok=True)
        with pytest.raises(UsageError, match='no image in'):
            find_images([nothing])


def test_names_do_not_collide(tmp_path):
    taken = set()
    names = [
        free_name(tmp_path / x, taken)
        for x in ('a.png', 'b/a.jpg', 'a_2.png', 'c/a.png')
    ]
    assert names == ['a', 'a_2', 'a_2_2', 'a_3']


@pytest.mark.parametrize('device', ['gpu', 'cuda:99'])
def test_no_such_device(device):
    with pytest.raises(UsageError, match=f"cannot use the device '{device}'"):
        load_model(Config(), 'absent.pth', device)
