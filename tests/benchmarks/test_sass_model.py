"""benchmarks/sass_model.py and sass.py, on kernels whose cost is known."""

import functools
import subprocess
import sys
from pathlib import Path

import pytest

from mmvssm.ops.cuda import kernels
from tiny import REPO

SOURCE = Path(__file__).with_name('stages.cu')
CONSTANTS = dict(POSITIONS=40, THREADS=128, CHANNELS=128, CHAINS=1, STAGES=2)
ARCHITECTURE = 'sm_90'


@functools.cache
def compiled(architecture, **constants):
    return kernels.compiler().compile(SOURCE, constants, architecture)


@pytest.fixture
def model(sass_model, tmp_path):
    """Compile a kernel of stages.cu and read it."""

    def model(entry, marks=True, whole=False, architecture=ARCHITECTURE, **constants):
        path = tmp_path / 'kernel.cubin'
        path.write_bytes(compiled(architecture, **CONSTANTS | constants))
        found = sass_model.Marks.of(SOURCE) if marks else sass_model.Marks()
        return sass_model.read(path, found, whole)[entry]

    return model


def ratio(one):
    return one.cycles('DRAM')[0] / one.cycles('L1')[0]


# Waits


@pytest.mark.parametrize(
    'stages, least, most', [(0, 3, 100), (1, 1.5, 3), (2, 1, 1.5), (3, 1, 1.5)]
)
@pytest.mark.parametrize('architecture', ['sm_80', 'sm_90'])
def test_loads_cost_what_they_are_waited_for(model, stages, least, most, architecture):
    if stages == 3 and architecture == 'sm_80':
        return  # it has no TMA
    found = model('scan', STAGES=stages, architecture=architecture)
    (one,) = found.passes
    assert least < ratio(one) < most or ratio(one) == least == 1
    assert found.resources.stack == 0 == found.calls
    # Every load at its place, one for the chunk, none.
    expected = {0: CONSTANTS['POSITIONS'], 1: 1, 2: 0}
    if stages in expected:
        assert one.cycles('DRAM')[1] == expected[stages]


def test_a_pass_in_numbers(model):
    (one,) = model('scan', POSITIONS=16).passes
    # 16 positions of 32 lanes: 4 bytes loaded and 4 stored for each.
    assert one.loaded == one.stored == 16 * 32 * 4
    assert one.bytes_by('LDS') == 16 * 32 * 4
    assert one.kinds['LDGSTS'] == 4 and one.kinds['STG'] == one.kinds['MUFU'] == 16
    assert len(one.instructions) == one.most
    busy = one.busy()
    assert busy['issue'] == len(one.instructions)
    assert busy['special'] == 16 * 8
    # The chain: an exponential and a product and sum, 16 times.
    assert one.cycles('L1')[0] > 16 * 24


def test_tensor_cores_wait_for_what_they_add_to(model):
    (chain,) = model('products').passes
    (four,) = model('products', CHAINS=4).passes
    # 24 products, one after the other, of about 24 cycles; then 8 cycles each.
    assert 24 * 20 < chain.cycles('L1')[0] < 24 * 36
    assert 24 * 8 <= four.cycles('L1')[0] < 24 * 12
    assert chain.kinds['HMMA'] == four.kinds['HMMA'] == 24
    assert chain.busy()['tensor'] == 24 * 8


def test_matrices_from_shared_memory(model):
    (one,) = model('matrices').passes
    assert one.kinds['LDSM'] == 4 and one.bytes_by('LDSM') == 4 * 32 * 16
    # Four loads, each at an address that the one before has loaded.
    assert 4 * 33 <= one.cycles('L1')[0] < 4 * 50


# The way through a loop


def test_marked_code_is_left_out(model):
    (marked,), (plain,) = model('marked').passes, model('marked', marks=False).passes
    # Loads of 16 bytes; the masked side has one of 4 a position, and a comparison.
    assert marked.kinds['LDG'] == 10 and plain.kinds['LDG'] >= 39
    assert marked.loaded == 40 * 32 * 4
    assert len(marked.instructions) < 70 < len(plain.instructions)
    assert marked.most == plain.most == len(plain.instructions)


def test_loops_inside(model):
    (once,), (five,) = model('nested', marks=False).passes, model('nested').passes
    assert once.kinds['MUFU'] == 1 + 2
    assert five.kinds['MUFU'] == 1 + 5 * 2
    assert five.most == len(five.instructions)
    assert once.untold == 1 and five.untold == 0


def test_loops_one_after_the_other(model):
    found = model('two')
    assert [x.kinds['MUFU'] for x in found.passes] == [CONSTANTS['POSITIONS']] * 2
    assert found.calls == 1
    assert found.resources.stack >= 16 * 4
    (whole,) = model('two', whole=True).passes
    assert whole.kinds['MUFU'] == 2 * CONSTANTS['POSITIONS'] + 1
    assert whole.kinds['EXIT'] == 1 and whole.untold == 3


BRANCHES = """
	.section	.text.k,"ax",@progbits
        /*0000*/                   UISETP.NE.AND UP0, UPT, UR4, URZ, UPT ;  /* 0x0 */
                                                   /* 0x000fe20000000000 */
        /*0010*/                   BRA.U UP0, `(.L_x_0) ;                   /* 0x0 */
                                                   /* 0x000fea0003800000 */
        /*0020*/                   FADD R0, R0, R1 ;                        /* 0x0 */
                                                   /* 0x000fe20000000000 */
.L_x_0:
        /*0030*/              @!P1 EXIT ;                                   /* 0x0 */
                                                   /* 0x000fea0003800000 */
        /*0040*/                   BRA `(.L_x_0) ;                          /* 0x0 */
                                                   /* 0x000fc0000383ffff */
"""


def test_branches(load):
    sass = load('sass')
    blocks = sass.parse(BRANCHES)['k']
    assert [len(block.instructions) for block in blocks[:4]] == [2, 1, 1, 1]
    assert [sorted(block.next) for block in blocks[:4]] == [[1, 2], [2], [3], [2]]
    (loop,) = sass.loops(blocks)
    assert (loop.header, loop.blocks, loop.latches) == (2, {2, 3}, {3})
    assert blocks[2].instructions[0].guard == '!P1'
    # What parted lanes do before a shuffle is on no way.
    parted = sass.parse(BRANCHES.replace('BRA.U UP0', 'BRA.DIV UR4'))['k']
    assert parted[0].instructions[-1].parted and parted[0].next == [1]
    table = BRANCHES.replace('BRA `(.L_x_0)', 'BRX R4 -0x50')
    with pytest.raises(ValueError, match='a jump by table: BRX R4 -0x50'):
        sass.parse(table)


def test_lines_behind_a_mark(sass_model, load):
    text = '\n'.join(
        [
            'void f() {',
            '  if (rarely(a(1) <',  # 2
            '             b)) {  // if (rarely(no)) {',
            '    g({0});',  # 4
            '  } else {',  # 5: the brace is on a line of the body
            '    h();',
            '  }',
            '  while (x && rarely(y))',
            '    wait();',  # 9
            '  if (often(y)) {',
            '    k();',
            '  }',
            '}',
        ]
    )
    found = load('sass').rare_places('a.cu', text)
    assert found == {('a.cu', line) for line in (4, 5, 9)}


# Instructions


def encoded(stall=1, result=7, read=7, waits=()):
    control = stall | 1 << 4 | result << 5 | read << 8
    return (control | sum(1 << 11 + x for x in waits)) << 41


@pytest.fixture
def issue(sass_model, load):
    """Issue instructions (opcode, operands, control) and tell when each one began."""

    def issue(*instructions, latency=700):
        warp, times = sass_model.Warp(latency), []
        for opcode, operands, control in instructions:
            i = load('sass').decode('', opcode, operands, encoded(**control))
            begin = warp.time
            warp.issue(i)
            times.append(warp.time - max(1, i.stall) if begin else 0)
        return times

    return issue


COPY = ('LDGSTS.E.BYPASS.128', '[R0], [R2.64]', {})
COMMIT = ('LDGDEPBAR', '', dict(result=0))


def test_groups_of_copies(issue):
    wait = ('DEPBAR.LE', 'SB0, 0x1', {})
    use = ('FADD', 'R0, R0, R1', {})
    # Of two groups one may be under way: the first copy began at 0.
    assert issue(COPY, COMMIT, COPY, COMMIT, wait, use)[4] == 700
    assert issue(COPY, COMMIT, wait, use)[2] < 20
    all_of_them = ('DEPBAR.LE', 'SB0, 0x0', {})
    begun = issue(COPY, COMMIT, COPY, COMMIT, all_of_them, use)
    assert begun[4] == begun[2] + 700
    by_mask = ('FADD', 'R0, R0, R1', dict(waits=[0]))
    begun = issue(COPY, COMMIT, COPY, COMMIT, by_mask)
    assert begun[4] == begun[2] + 700


def test_other_counters_of_a_wait(issue):
    begun = issue(
        ('LDS', 'R0, [R1]', dict(result=2)),
        ('LDG.E', 'R2, [R4.64]', dict(result=3)),
        ('DEPBAR.LE', 'SB0, 0x0, {3, 2}', {}),
    )
    assert begun[2] == begun[1] + 700


def test_barriers_in_shared_memory(issue):
    bulk = ('UTMALDG.2D', '[UR8], [UR4]', {})
    attempt = ('SYNCS.PHASECHK.TRANS64.TRYWAIT', 'P0, [R0], R1', {})
    other = ('SYNCS.PHASECHK.TRANS64.TRYWAIT', 'P0, [R5], R1', {})
    begun = issue(bulk, ('FADD', 'R0, R0, R1', dict(stall=9)), bulk, attempt, attempt)
    # Trying again is no other wait.
    assert begun[3] == 700 and begun[4] == 701
    begun = issue(bulk, ('FADD', 'R0, R0, R1', dict(stall=9)), bulk, attempt, other)
    assert begun[4] == begun[2] + 700
    # Copies of threads report by an instruction of their own.
    report = ('ARRIVES.LDGSTSBAR.64', '[UR4]', {})
    assert issue(COPY, report, attempt)[2] == 700


def test_what_other_ctas_wrote_comes_from_l2(issue):
    use = ('FADD', 'R0, R0, R1', dict(waits=[0]))
    strong = ('LDG.E.64.STRONG.GPU', 'R0, [R2.64]', dict(result=0))
    assert issue(strong, use)[1] == issue(strong, use, latency=38)[1] == 270


def test_width(load):
    def width(opcode):
        return load('sass').decode('', opcode, '', 0).width

    widths = {
        'LDG.E': 4,
        'LDG.E.64.CONSTANT': 8,
        'LDG.E.128': 16,
        'LDG.E.U16': 2,
        'STG.E.U8': 1,
        'LDGSTS.E.BYPASS.128': 16,
        'LDSM.16.M88.4': 16,
        'LDSM.16.MT88.2': 8,
        'LDSM.16.M88': 4,
    }
    assert {opcode: width(opcode) for opcode in widths} == widths


# Resources


@pytest.mark.parametrize(
    'registers, threads, shared, warps',
    [
        (32, 256, 0, 64),
        (128, 256, 0, 16),
        (129, 256, 0, 8),  # by 8 registers: 136, three warps of a quarter
        (168, 128, 0, 12),
        (255, 128, 0, 8),
        (32, 256, 100 * 1024, 16),
        (32, 1024, 0, 64),
        (64, 32, 0, 32),  # 32 CTAs
        (16, 256, 0, 64),
        (32, 256, 227 * 1024, 8),
    ],
)
def test_resident_warps(load, registers, threads, shared, warps):
    found = load('cubin').Resources(registers, 0, 0)
    assert found.resident_warps(threads, shared) == warps


# The command


def test_command(sass_model, tmp_path):
    defines = [f'-D{name}={value}' for name, value in CONSTANTS.items()]
    command = [sys.executable, str(REPO / 'benchmarks' / 'sass_model.py')]
    listing = tmp_path / 'kernel.sass'
    done = subprocess.run(
        [*command, '--cu', SOURCE, '--entry', 'scan', '--sass', listing, *defines],
        capture_output=True,
        text=True,
        env={'PYTHONPATH': str(REPO)},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith('scan: ')
    assert '0 bytes of stack' in done.stdout and 'LDGSTS:10' in done.stdout
    assert 'products' not in done.stdout
    assert 'LDGSTS' in listing.read_text()
    refused = subprocess.run(
        [*command, '--cu', SOURCE], capture_output=True, text=True, env={}
    )
    assert refused.returncode and 'is undefined' in refused.stderr
    assert 'Traceback' not in refused.stderr
