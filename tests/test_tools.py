"""The tools, run as their users run them."""

import os
import re
import runpy
import subprocess
import sys

import mmengine.runner.runner
import numpy as np
import pytest
import torch
from PIL import Image

import warm
from mmvssm import compat
from mmvssm.backbones import VSSM
from mmvssm.checkpoints.read import read_state_dict
from tiny import REPO, write_ade, write_config

pytest.importorskip('mmseg')

TOOLS = REPO / 'tools'


@pytest.fixture(scope='module')
def work(tmp_path_factory):
    """A folder outside the repository with data and a config."""
    folder = tmp_path_factory.mktemp('tools')
    write_ade(folder / 'ade')
    write_config(folder / 'tiny.py', folder / 'ade')
    return folder


def run(tool, *args, cwd, code=0, **env):
    env = {k: v for k, v in os.environ.items() if k != 'ADE20K_ROOT'} | {
        'OMP_NUM_THREADS': '1',
        **env,
    }
    done = warm.run([TOOLS / tool, *args], cwd=cwd, env=env)
    output = done.stdout + done.stderr
    assert done.returncode == code, output[-3000:]
    return output


def fail(monkeypatch, capsys, tool, *args):
    """Run a tool in this process; returns the one message it ends with."""
    monkeypatch.setattr(sys, 'argv', [tool, *map(str, args)])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(TOOLS / tool), run_name='__main__')
    assert stop.value.code == 2
    return capsys.readouterr().err


@pytest.fixture(scope='module')
def trained(work):
    """Two iterations in bfloat16 from a backbone's weights; the work dir."""
    backbone = VSSM(dict(depths=(1, 1, 1, 1), dims=8))
    torch.save(dict(model=backbone.state_dict()), work / 'backbone.pth')
    output = run(
        'train.py',
        'tiny.py',
        '--work-dir',
        'out',
        '--amp',
        '--pretrained',
        'backbone.pth',
        cwd=work,
    )
    number = len(backbone.state_dict())
    assert f'loaded {number} of {number} tensors of the model' in output
    assert len(re.findall(r'Iter\(train\) \[[12]/2\]', output)) == 2
    return work / 'out'


def test_train_writes_a_float32_checkpoint(trained):
    state = read_state_dict(trained / 'iter_2.pth')
    weights = [v for v in state.values() if v.is_floating_point()]
    assert {v.dtype for v in weights} == {torch.float32}
    assert all(v.isfinite().all() for v in weights)
    dumped = (trained / 'tiny.py').read_text()
    assert 'Bf16OptimWrapper' in dumped


def test_resume_auto_goes_on_from_the_latest(trained, work):
    output = run(
        'train.py',
        'tiny.py',
        '--work-dir',
        'out',
        '--resume',
        'auto',
        '--cfg-options',
        'train_cfg.max_iters=3',
        cwd=work,
    )
    assert 'iter_2.pth' in output
    assert re.findall(r'Iter\(train\) \[(\d)/3\]', output) == ['3']
    assert (trained / 'iter_3.pth').is_file()


def test_evaluate_with_pictures_and_tta(trained, work):
    output = run(
        'test.py',
        'tiny.py',
        trained / 'iter_2.pth',
        '--tta',
        '--show-dir',
        'shown',
        '--out',
        'maps',
        '--work-dir',
        'tested',
        '--cfg-options',
        'resume=True',
        cwd=work,
    )
    assert re.search(r'mIoU: +\d', output)
    assert 'resumed' not in output, 'the weights are those of the argument'
    labels = [Image.open(work / 'maps' / f'{i}.png') for i in range(2)]
    assert all(x.size == (80, 64) for x in labels)
    pictures = list((work / 'shown').rglob('*.png'))
    assert len(pictures) == 2


def test_infer_skips_and_names_a_broken_image(trained, work):
    images = work / 'photos'
    (images / 'sub').mkdir(parents=True)
    for name, size in (
        ('a.png', (50, 70)),
        ('sub/a.png', (64, 64)),
        ('b.jpg', (33, 97)),
    ):
        Image.effect_noise(size, 90).convert('RGB').save(images / name)
    whole = (images / 'b.jpg').read_bytes()
    (images / 'cut.jpg').write_bytes(whole[: len(whole) // 2])
    output = run(
        'infer.py',
        'photos',
        'photos/*.jpg',
        'absent.png',
        '--config',
        'tiny.py',
        '--checkpoint',
        trained / 'iter_2.pth',
        '--out-dir',
        'seen',
        cwd=work,
        code=1,
    )
    assert '3 of 5 images segmented' in output
    assert re.findall(r'skipped (\S+):', output) == ['photos/cut.jpg', 'absent.png']
    assert {p.name for p in (work / 'seen').iterdir()} == {
        f'{name}_{kind}.png'
        for name in ('a', 'a_2', 'b')
        for kind in ('labels', 'overlay')
    }
    labels = Image.open(work / 'seen' / 'b_labels.png')
    overlay = Image.open(work / 'seen' / 'b_overlay.png')
    assert labels.size == overlay.size == (33, 97)
    assert labels.mode == 'P' and labels.getextrema()[1] < 150


@pytest.mark.parametrize('by', ['path', 'name'])
def test_inferencer_of_mmseg_gives_the_same(trained, work, by, monkeypatch):
    from mmseg.apis import MMSegInferencer

    import mmvssm.engine  # noqa: F401  makes models known by name

    image = work / 'ade/images/validation/0.jpg'
    arguments = ('--config', 'tiny.py', '--checkpoint', trained / 'iter_2.pth')
    run('infer.py', image, *arguments, '--out-dir', f'by {by}', cwd=work)
    labels = np.asarray(Image.open(work / f'by {by}/0_labels.png'))

    model = str(work / 'tiny.py')
    if by == 'name':
        # As if the package had shipped it.
        monkeypatch.setattr(compat, '_CONFIGS', work)
        model = 'tiny'
    inferencer = MMSegInferencer(model, str(trained / 'iter_2.pth'), device='cpu')
    np.testing.assert_array_equal(inferencer(str(image))['predictions'], labels)


def test_get_flops(work):
    output = run('get_flops.py', 'tiny.py', '--shape', 64, 96, cwd=work)
    assert 'tiny.py at 64x96' in output
    assert re.search(r'FLOPs +\d+\.\d\d G', output)
    assert 'ss2d_scan: scan' in output


def test_without_ade20k_one_message(tmp_path):
    output = run(
        'train.py', REPO / 'configs' / 'upernet_vmamba_t.py', cwd=tmp_path, code=2
    )
    looked = tmp_path / 'data/ade/ADEChallengeData2016/images/training'
    for said in (
        str(looked),
        'annotations/validation/*.png',
        'ADE20K_ROOT',
        '--cfg-options',
        'make quickstart',
    ):
        assert said in output
    assert 'Traceback' not in output
    # Nothing was built or written before it.
    assert not list(tmp_path.iterdir())


def test_foreign_checkpoint_is_refused(trained, work, monkeypatch, capsys):
    state = read_state_dict(trained / 'iter_2.pth')
    state.pop('decode_head.conv_seg.weight')
    torch.save(dict(state_dict=state), work / 'headless.pth')
    torch.save({'conv1.weight': torch.ones(4, 3, 7, 7)}, work / 'resnet.pth')
    whole = (trained / 'iter_2.pth').read_bytes()
    (work / 'cut.pth').write_bytes(whole[: len(whole) // 2])
    monkeypatch.chdir(work)

    def refuse(checkpoint):
        arguments = ('ade/images', '--config', 'tiny.py', '--checkpoint', checkpoint)
        return fail(monkeypatch, capsys, 'infer.py', *arguments)

    said = refuse('headless.pth')
    assert 'does not belong' in said
    assert 'first misfit: decode_head.conv_seg.weight' in said
    assert re.search(r'backbone: 0 of \d+ tensors match', refuse('resnet.pth'))
    said = refuse('cut.pth')
    assert 'cut.pth' in said and 'truncated' in said
    said = fail(monkeypatch, capsys, 'test.py', 'tiny.py', 'absent.pth')
    assert f'no checkpoint at {work / "absent.pth"}' in said


def _init_cfg(checkpoint):
    prefix = 'model.backbone.init_cfg'
    return (
        '--cfg-options',
        f'{prefix}.type=Pretrained',
        f'{prefix}.checkpoint={checkpoint}',
    )


@pytest.mark.parametrize(
    'args, said',
    [
        (['absent.py'], 'no config file at'),
        ([REPO / 'configs/_base_/default_runtime.py'], 'not a whole experiment'),
        (['broken.py'], 'NameError'),
        (['tiny.py', '--cfg-options', 'no-equals-sign'], 'KEY.SUBKEY=VALUE'),
        (['tiny.py', '--resume', 'absent.pth'], 'no checkpoint at'),
        (['tiny.py', '--pretrained', 'absent.pth'], 'no checkpoint at'),
        (['tiny.py', *_init_cfg('absent.pth')], 'no checkpoint at'),
        (['tiny.py', '--amp', 'float64'], 'invalid choice'),
        (['tiny.py', '--launcher', 'pytorch'], 'torchrun'),
    ],
)
def test_mistakes_end_in_one_message(args, said, work, monkeypatch, capsys):
    monkeypatch.chdir(work)
    monkeypatch.delenv('RANK', raising=False)
    (work / 'broken.py').write_text('model = undefined_name')
    assert said in fail(monkeypatch, capsys, 'train.py', *args)


def test_a_crash_leaves_its_traceback_beside_the_log(work):
    (work / 'faulty.py').write_text(
        'from mmengine.hooks import Hook\n'
        'from mmengine.registry import HOOKS\n'
        '@HOOKS.register_module()\n'
        'class Faulty(Hook):\n'
        '    def after_train_iter(self, runner, **_):\n'
        "        raise LookupError('in the hook')\n"
    )
    more = (
        "custom_imports = dict(imports=['faulty'])\n"
        "custom_hooks = [dict(type='Faulty')]"
    )
    write_config(work / 'crashes.py', work / 'ade', more)
    options = ('crashes.py', '--work-dir', 'crashed')
    output = run('train.py', *options, cwd=work, code=1, PYTHONPATH=str(work))
    said = output.splitlines()[-1]
    (file,) = (work / 'crashed').glob('*/error.txt')
    assert said.startswith('error: LookupError: in the hook (unexpected: ')
    assert str(file) in said and 'Traceback' not in output
    assert list(file.parent.glob('*.log'))
    assert 'faulty.py", line 6, in after_train_iter' in file.read_text()


_WEIGHTS = ('--checkpoint', 'out/iter_2.pth')


@pytest.mark.parametrize(
    'tool, args, key, name',
    [
        ('train.py', ('tiny.py',), 'model.backbone.type', 'VSSM'),
        ('test.py', ('tiny.py', 'out/iter_2.pth'), 'model.backbone.type', 'VSSM'),
        ('get_flops.py', ('tiny.py',), 'model.backbone.type', 'VSSM'),
        (
            'infer.py',
            ('ade/images', '--config', 'tiny.py', *_WEIGHTS),
            'test_dataloader.dataset.pipeline.1.type',
            'mmvssm.ResizeToMultiple',
        ),
        (
            'check_data.py',
            ('tiny.py',),
            'val_dataloader.dataset.pipeline.1.type',
            'mmvssm.ResizeToMultiple',
        ),
        (
            'run_ablation.py',
            ('--count', '--rows', 'baseline'),
            'model.backbone.type',
            'VSSM',
        ),
    ],
)
@pytest.mark.usefixtures('trained')
def test_an_unknown_type_is_one_sentence(
    tool, args, key, name, work, monkeypatch, capsys
):
    monkeypatch.chdir(work)
    monkeypatch.setattr(mmengine.runner.runner, 'collect_env', dict)
    said = fail(monkeypatch, capsys, tool, *args, '--cfg-options', f'{key}={name}')
    last = said.splitlines()[-1]
    assert last.startswith(f"error: {key}: '{name}' is not in mm")
    meant = {'VSSM': 'mmvssm.VSSM', 'mmvssm.ResizeToMultiple': 'ResizeToMultiple'}[name]
    assert f"did you mean '{meant}'" in last


@pytest.mark.skipif(torch.cuda.is_available(), reason='float16 runs here')
def test_float16_without_a_gpu(work, monkeypatch, capsys):
    monkeypatch.chdir(work)
    said = fail(monkeypatch, capsys, 'train.py', 'tiny.py', '--amp', 'float16')
    assert 'needs a GPU' in said and 'bfloat16' in said


def options_of_srun(tmp_path, script, *arguments, **environment):
    """What a script would give to srun."""
    srun = tmp_path / 'srun'
    srun.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    srun.chmod(0o755)
    done = subprocess.run(
        [TOOLS / script, *arguments],
        env=dict(PATH=f'{tmp_path}:{os.environ["PATH"]}', **environment),
        check=True,
        capture_output=True,
        text=True,
    )
    return done.stdout.splitlines()


@pytest.mark.parametrize(
    ('script', 'fourth', 'given'),
    [
        ('train', ['my work'], ['--work-dir', 'my work']),
        ('train', [], []),
        ('test', ['w.pth'], ['w.pth']),
        ('test', [], []),
    ],
)
def test_slurm_scripts_hand_everything_on(script, fourth, given, tmp_path):
    words = options_of_srun(
        tmp_path,
        f'slurm_{script}.sh',
        *('part', 'job', 'c.py', *fourth, '--tta'),
        GPUS='16',
        CPUS_PER_TASK='3',
        SRUN_ARGS='--time=1 --quiet',
        PY_ARGS='--x y',
    )
    assert words[:3] == ['-p', 'part', '--job-name=job']
    assert set(words[3 : words.index('python')]) == {
        '--gres=gpu:8',
        '--ntasks=16',
        '--ntasks-per-node=8',
        '--cpus-per-task=3',
        '--kill-on-bad-exit=1',
        '--time=1',
        '--quiet',
    }
    command = words[words.index('python') :]
    assert command[1:3] == ['-u', str(TOOLS / f'{script}.py')]
    assert command[3:] == [
        *('c.py', *given, '--tta'),
        *('--launcher', 'slurm', '--x', 'y'),
    ]


@pytest.mark.parametrize(
    ('environment', 'layout'),
    [
        ({}, '--ntasks=8 --gres=gpu:8 --ntasks-per-node=8'),
        (dict(GPUS='4'), '--ntasks=4 --gres=gpu:4 --ntasks-per-node=4'),
        (
            dict(GPUS='8', GPUS_PER_NODE='4'),
            '--ntasks=8 --gres=gpu:4 --ntasks-per-node=4',
        ),
        (dict(GPUS='6', GPUS_PER_NODE='0'), '--ntasks=6'),
        (
            dict(GPUS='6', GPUS_PER_NODE='0', TASKS_PER_NODE='2'),
            '--ntasks=6 --ntasks-per-node=2',
        ),
    ],
)
def test_slurm_scripts_lay_out_processes(environment, layout, tmp_path):
    words = options_of_srun(
        tmp_path, 'slurm_train.sh', 'part', 'job', 'c.py', **environment
    )
    assert {w for w in words if 'task' in w or 'gres' in w} == {
        '--cpus-per-task=5',
        *layout.split(),
    }


@pytest.mark.parametrize(('code', 'requeued'), [(75, True), (0, False), (1, False)])
def test_sbatch_script_requeues_what_was_preempted(code, requeued, tmp_path):
    for name, ends in (('srun', code), ('scontrol', 0)):
        script = tmp_path / name
        script.write_text(f'#!/bin/sh\necho {name} "$@"\nexit {ends}\n')
        script.chmod(0o755)
    done = subprocess.run(
        [TOOLS / 'sbatch_train.sh', 'c.py', '--work-dir', 'my work'],
        env=dict(
            PATH=f'{tmp_path}:{os.environ["PATH"]}',
            SLURM_JOB_ID='40123',
            SLURM_CPUS_PER_TASK='7',
        ),
        capture_output=True,
        text=True,
    )
    assert done.returncode == code, done.stderr
    step, *rest = done.stdout.splitlines()
    assert step.startswith('srun --kill-on-bad-exit=0 --wait=60 --cpus-per-task=7 ')
    assert 'train.py c.py --launcher slurm --resume auto --work-dir my work' in step
    assert rest == (['scontrol requeue 40123'] if requeued else [])
