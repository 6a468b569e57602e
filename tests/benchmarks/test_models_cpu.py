"""models_cpu.py: the peers are the published ones, rows are kept, tables are right."""

import json
import math
from dataclasses import asdict

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from mmvssm.engine import UsageError


@pytest.fixture
def models_cpu(load):
    before = torch.get_num_threads()
    yield load('models_cpu')
    torch.set_num_threads(before)


@pytest.fixture
def steps(load):
    return load('models_cpu_steps')


def count(model):
    return sum(p.numel() for p in model.parameters())


def test_peers_have_as_many_parameters_as_published(load):
    peers = load('model_peers')
    with torch.device('meta'):
        assert count(peers.ConvNeXt(1000)) == 28_589_128
        assert count(peers.DeiT(1000)) == 22_050_664
    pytest.importorskip('mmseg')
    assert count(peers.swin('swin_t', 1000)) == 28_288_354


def test_convnext_by_hand(load):
    """Against the maps channels-first, where layer norm is written out."""
    torch.manual_seed(0)
    model = load('model_peers').ConvNeXt(5, depths=(1, 1), dims=(4, 8)).double()
    for p in model.parameters():
        torch.nn.init.normal_(p)

    def norm(x, layer):
        mean, variance = x.mean(1, keepdim=True), x.var(1, keepdim=True, correction=0)
        x = (x - mean) / (variance + 1e-6).sqrt()
        return x * layer.weight.view(-1, 1, 1) + layer.bias.view(-1, 1, 1)

    def block(x, layer):
        depthwise, groups = layer.depthwise, x.shape[1]
        y = F.conv2d(x, depthwise.weight, depthwise.bias, padding=3, groups=groups)
        y = norm(y, layer.norm).movedim(1, -1)
        y = layer.shrink(F.gelu(layer.expand(y))) * layer.scale
        return x + y.movedim(-1, 1)

    images = torch.randn(2, 3, 16, 24, dtype=torch.float64)
    stem, norm1, block1, norm2, down, block2 = model.layers
    x = block(norm(F.conv2d(images, stem.weight, stem.bias, stride=4), norm1), block1)
    x = block(F.conv2d(norm(x, norm2), down.weight, down.bias, stride=2), block2)
    pooled = x.mean((2, 3), keepdim=True)
    want = model.head(norm(pooled, model.norm).flatten(1))
    torch.testing.assert_close(model(images), want)


def test_deit_by_hand(load):
    torch.manual_seed(0)
    model = load('model_peers').DeiT(5, (8, 12), channels=6, depth=1, heads=2, patch=4)
    images = torch.randn(2, 3, 8, 12)
    x = model.patches(images).flatten(2).mT
    x = torch.cat((model.token.repeat(2, 1, 1), x), 1) + model.positions
    (block,) = model.blocks
    q, k, v = block.attention.qkv(block.norm1(x)).chunk(3, -1)
    heads = []
    for part in (slice(0, 3), slice(3, 6)):
        weights = (q[..., part] @ k[..., part].mT / math.sqrt(3)).softmax(-1)
        heads.append(weights @ v[..., part])
    x = x + block.attention.proj(torch.cat(heads, -1))
    x = x + block.mlp(block.norm2(x))
    want = model.head(model.norm(x)[:, 0])
    torch.testing.assert_close(model(images), want)


def test_swin_computes_in_bfloat16(load, monkeypatch):
    pytest.importorskip('mmseg')
    peers = load('model_peers')
    monkeypatch.setitem(peers.MMSEG, 'swin_t', dict(depths=(2, 1, 1, 1)))
    model = peers.swin('swin_t', 5).bfloat16()
    out = model(torch.zeros(1, 3, 64, 64, dtype=torch.bfloat16))
    assert out.dtype == torch.bfloat16
    assert torch.get_default_dtype() == torch.float32


def test_a_step_trains_or_infers(steps):
    seen = {}

    class Model(torch.nn.Linear):
        def forward(self, images):
            seen.update(
                dtype=images.dtype,
                training=self.training,
                grad=torch.is_grad_enabled(),
                autocast=torch.is_autocast_enabled('cpu'),
            )
            return super().forward(images.flatten(1))

    for dtype in steps.DTYPES:
        for mode in steps.MODES:
            model = steps.in_dtype(Model(48, steps.CLASSES), dtype)
            model.weight.register_post_accumulate_grad_hook(
                lambda weight: seen.update(gradient=weight.grad.abs().sum() > 0)
            )
            seen.clear()
            case = steps.Case(4, 4, 2, 1, mode)
            steps.make_step(model, case, steps.Contender('any', dtype))()
            training = mode == 'training'
            assert seen.get('gradient', False) == training
            assert seen['training'] == seen['grad'] == training
            assert seen['autocast'] == (dtype == 'autocast')
            narrow = dtype == 'bfloat16'
            assert seen['dtype'] == (torch.bfloat16 if narrow else torch.float32)
            assert model.weight.grad is None


def test_difference_of_dtypes(steps, monkeypatch):
    monkeypatch.setitem(
        steps.PEERS,
        'tiny',
        lambda size: steps.model_peers.ConvNeXt(7, depths=(1, 1), dims=(8, 16)),
    )
    same = steps.difference('tiny', 'float32', (16, 16), count=5, batch=2)
    assert same['images'] == 5 and same['classes'] >= 1
    assert same['largest'] == 0 and same['same_class'] == 1
    for dtype in ('bfloat16', 'autocast'):
        other = steps.difference('tiny', dtype, (16, 16), count=5, batch=2)
        assert 0 < other['largest'] < 0.1
    monkeypatch.setattr(
        steps, 'in_dtype', lambda model, dtype: lambda x: math.nan * model(x)
    )
    broken = steps.difference('tiny', 'float32', (16, 16), count=2)
    assert math.isnan(broken['largest'])


def test_what_the_issue_asks_for_is_measured(models_cpu):
    args = models_cpu.parse_args(['--train', '--compile', '--threads', '1', '2'])
    cases = models_cpu.cases(args)
    assert len({case.name for case in cases}) == len(cases) == 3 * 2 * 2 * 2
    assert [(c.height, c.batch) for c in cases[::4]] == [
        (size, batch) for size in (224, 512, 1024) for batch in (1, 8)
    ]
    names = {contender.name for contender in models_cpu.contenders(args)}
    assert len(names) == 9 * 2
    assert {'vmamba_t_s1l8, float32, eager', 'swin_t, float32, compiled'} < names
    assert args.json.parent.name == 'models_cpu' and args.json.suffix == '.json'
    args = models_cpu.parse_args(['--quick', '--sizes', '32', '32x48'])
    assert args.json is None and args.sizes == [(32, 32), (32, 48)]


@pytest.mark.parametrize(
    'arguments', [['--sizes', '0'], ['--sizes', '1x2x3'], ['--batch', 'x']]
)
def test_what_is_no_number_is_refused(models_cpu, arguments, capsys):
    with pytest.raises(SystemExit) as end:
        models_cpu.parse_args(arguments)
    assert end.value.code == 2
    assert repr(arguments[1]) in capsys.readouterr().err


@pytest.mark.parametrize(
    ('arguments', 'text'),
    [
        (['--quick', '--models', 'vim_z'], "no model 'vim_z'"),
        (['--quick', '--against', 'nothing'], "no model 'nothing'"),
        (['--quick', '--show'], '--show needs --json FILE'),
        (['--show', '--json', 'missing.json'], 'missing.json has no rows'),
    ],
)
def test_wrong_use_is_one_sentence(models_cpu, arguments, text):
    with pytest.raises(UsageError, match=text):
        models_cpu.main(models_cpu.parse_args(arguments))


def fake(case, who, speeds, left_out=()):
    """A row as :func:`models_cpu.measure` gives it."""
    found = {
        contender.name: dict(
            images_per_second=speeds.get(contender.model, 1.0),
            peak_bytes=4e6 if contender.model == 'swin_t' else 3e6,
        )
        for contender in who
        if contender.name not in left_out
    }
    return dict(
        case=asdict(case), contenders=found, left_out=dict.fromkeys(left_out, 'slow')
    )


def test_rows_that_are_there_are_kept(models_cpu, monkeypatch, tmp_path, capsys):
    out = tmp_path / 'rows.json'
    measured = []

    def measure(case, who, effort, longest):
        if case.batch == 7:
            raise KeyboardInterrupt
        measured.append((case.batch, sorted({one.model for one in who})))
        return fake(case, who, {}, ['vim_t, float32, eager'])

    monkeypatch.setattr(models_cpu, 'measure', measure)

    def main(*arguments):
        measured.clear()
        options = ['--sizes', '32', '--threads', '1', '--json', str(out)]
        return models_cpu.main(models_cpu.parse_args([*options, *arguments]))

    assert main('--models', 'vim_t', 'deit_s', '--batch', '1', '7', '2') == 130
    assert measured == [(1, ['deit_s', 'vim_t'])]
    assert 'the same command goes on' in capsys.readouterr().out
    # What was left out counts as measured, and fewer models are no new row.
    assert main('--models', 'vim_t', 'deit_s', '--batch', '1', '2') == 0
    assert measured == [(2, ['deit_s', 'vim_t'])]
    assert main('--models', 'vim_t', '--batch', '1', '2') == 0
    assert not measured
    assert main('--models', 'vim_t', '--batch', '1', '--again') == 0
    assert measured == [(1, ['vim_t'])]
    assert main('--models', 'vim_t', 'deit_s', '--batch', '1') == 0
    assert measured == [(1, ['deit_s', 'vim_t'])]
    result = json.loads(out.read_text())
    assert [row['case']['batch'] for row in result['rows']] == [1, 2]
    assert [row['run'] for row in result['rows']] == [3, 1]
    # A run that measured nothing leaves no trace.
    assert len(result['runs']) == 4
    assert main('--show') == 0
    assert not measured

    with pytest.raises(UsageError, match='another machine or of --quick'):
        main('--quick')
    monkeypatch.setattr(models_cpu.machines, 'name', lambda: 'another')
    with pytest.raises(UsageError, match='not another; name another --json'):
        main('--models', 'vim_t')
    out.write_text('{}')
    with pytest.raises(UsageError, match='no result of this benchmark'):
        main('--models', 'vim_t')


@pytest.fixture
def result(load, models_cpu, steps):
    """Two sizes, with one model left out of a case."""
    args = models_cpu.parse_args(
        ['--models', 'vim_t', 'swin_t', 'deit_s', '--sizes', '32', '64', '--batch', '1']
        + ['--threads', '1', '--train', '--compile', '--dtypes', 'float32', 'bfloat16']
    )
    speeds = dict(vim_t=3.0, swin_t=2.0, deit_s=1.0)
    rows = []
    for case in models_cpu.cases(args):
        left_out = ['deit_s, float32, eager'] if case.height == 64 else []
        row = fake(case, models_cpu.contenders(args), speeds, left_out)
        row['contenders']['vim_t, bfloat16, eager']['images_per_second'] = 6.0
        rows.append(dict(row, name=case.name, run=0))
    found = dict(
        largest=0.5, largest_over_std=2.0, same_class=0.75, classes=3, images=4
    )
    rows.append(
        dict(
            name='difference',
            dtype='bfloat16',
            size=[32, 32],
            contenders=dict(vim_t=found),
            left_out={},
        )
    )
    facts = dict(load('machines').facts(), quick=False)
    sets = 'avx2 avx512_bf16 amx_bf16'
    facts['environment']['Machine']['instruction sets'] = sets
    return dict(runs=[facts], rows=rows)


def lines_below(text, title):
    """Cells of the table under a title, by the name of the line."""
    table = text.partition(f'{title}\n\n')[2].partition('\n\n')[0].splitlines()
    cells = [[cell.strip() for cell in line.strip('|').split('|')] for line in table]
    return {name: values for name, *values in cells}


def test_tables(load, result):
    text = load('models_cpu_report').summary(result, 'swin_t')
    title = 'inference, 1 thread, float32, eager: images a second (times swin_t)'
    assert lines_below(text, title) == {
        '': ['32x32, batch 1', '64x64, batch 1'],
        '-' * 8: ['-' * 16, '-' * 16],
        'vim_t': ['3 (1.50)', '3 (1.50)'],
        'swin_t': ['2 (1.00)', '2 (1.00)'],
        'deit_s': ['1 (0.50)', ''],
    }
    gains = lines_below(
        text,
        'training, 1 thread, bfloat16, eager: times its own speed in float32, eager',
    )
    assert gains['vim_t'] == ['2.00', '2.00'] and gains['deit_s'] == ['1.00', '']
    memory = 'peak memory of a step, MB (times swin_t)'
    found = lines_below(text, f'training, 1 thread, float32, compiled: {memory}')
    assert found['vim_t'] == ['3 (0.75)', '3 (0.75)']
    assert found['swin_t'] == ['4 (1.00)', '4 (1.00)']
    difference = lines_below(
        text,
        'Logits of bfloat16 beside those of float32, random weights, random images of '
        '32x32',
    )
    assert difference['vim_t'] == ['0.5', '2', '75 %', '3', '4']
    missing = '- inference, 64x64, batch 1, 1 thread: deit_s, float32, eager: slow'
    assert missing in text.splitlines()
    assert 'Instructions for bfloat16: avx512_bf16, amx_bf16.' in text
    result['runs'][0]['environment']['Machine']['instruction sets'] = 'avx2'
    text = load('models_cpu_report').summary(result, 'swin_t')
    assert 'Instructions for bfloat16: none.' in text
    # Without Swin the first model takes its place.
    assert '(times vim_t)' in load('models_cpu_report').summary(result, 'mlla_t')


def test_picture(load, result, tmp_path):
    pytest.importorskip('matplotlib')
    plot = load('models_cpu_plot').plot
    path = plot(result, 'swin_t', tmp_path / 'new' / 'picture.png')
    assert Image.open(path).width > 1000


def test_probe(load, steps, monkeypatch):
    probing = load('models_cpu_probe')
    probing.start(['vim_t'])
    case, vim = steps.Case(32, 32, 1, 1, 'training'), steps.Contender('vim_t')
    found = probing.probe(vim, case, longest=600)
    assert found['parameters'] == count(steps.build('vim_t', (32, 32)))
    with pytest.raises(probing.Unfit, match='over 0 s a step'):
        probing.probe(vim, case, longest=0)
    wrong = steps.Contender('vim_z')
    with pytest.raises(probing.Unfit, match="unknown model 'vim_z'"):
        probing.probe(wrong, case, longest=600)
    if not load('process_memory').possible():
        pytest.skip('reads the counters of Linux')
    # Weights and gradients, but for the smallest ones, and hardly any activations.
    assert 1.8 < found['peak_bytes'] / (4 * found['parameters']) < 2.5
    monkeypatch.setattr(probing.process_memory, 'available', lambda: 50_000_000)
    # A library that finds no memory may crash instead of saying so.
    short = 'needs more than 0.0 GB of memory|most likely for want of memory'
    with pytest.raises(probing.Unfit, match=short):
        probing.probe(vim, case, longest=600)


def test_quick_run(models_cpu, steps, monkeypatch, tmp_path):
    monkeypatch.setattr(
        models_cpu.models_cpu_probe,
        'probe',
        lambda contender, case, longest: dict(parameters=1, peak_bytes=2),
    )
    monkeypatch.setitem(
        models_cpu.PEERS,
        'small',
        lambda size: steps.model_peers.ConvNeXt(1000, depths=(1, 1), dims=(8, 16)),
    )
    out = tmp_path / 'q.json'
    options = ['--quick', '--train', '--models', 'small', 'vim_t', '--sizes', '32']
    options += ['--dtypes', 'float32', 'bfloat16', '--against', 'vim_t']
    options += ['--json', str(out)]
    assert models_cpu.main(models_cpu.parse_args(options)) == 0
    result = json.loads(out.read_text())
    assert [row['name'] for row in result['rows']] == [
        'inference, 32x32, batch 1, 1 thread',
        'training, 32x32, batch 1, 1 thread',
        'difference of bfloat16, 32x32',
    ]
    for row in result['rows'][:2]:
        assert not row['left_out'] and len(row['contenders']) == 4
        for found in row['contenders'].values():
            assert found['images_per_second'] == pytest.approx(1 / found['median'])
            assert found['calls'] >= 2 and found['peak_bytes'] == 2
    assert set(result['rows'][2]['contenders']) == {'small', 'vim_t'}


def test_what_fails_is_left_out(models_cpu, steps, monkeypatch):
    def probe(contender, case, longest):
        if contender.model == 'large':
            raise models_cpu.models_cpu_probe.Unfit('needs more than 1 GB')
        return dict(parameters=1)

    monkeypatch.setattr(models_cpu.models_cpu_probe, 'probe', probe)
    who = [steps.Contender('large'), steps.Contender('unknown')]
    case = steps.Case(32, 32, 1, 1, 'inference')
    row = models_cpu.measure(case, who, models_cpu.QUICK_EFFORT, 1)
    assert not row['contenders']
    assert row['left_out']['large, float32, eager'] == 'needs more than 1 GB'
    assert 'unknown model' in row['left_out']['unknown, float32, eager']
