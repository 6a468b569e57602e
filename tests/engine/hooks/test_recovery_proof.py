"""A small VMamba UperNet that is killed anywhere ends with the same bits.

``pytest -m long tests/engine/hooks/test_recovery_proof.py`` is the proof: 60
iterations, killed at 20 random points (``MMVSSM_TEST_KILLS``), each in another run;
stopped by SIGTERM at a fourth as many; and three times with one of two ranks killed.
The test that is not long has two kills and one SIGTERM in a training of 12 iterations.
"""

import os
import random

import pytest

from toy import final_weights, same_bits, train_each, train_ranks, write_vmamba

pytest.importorskip('mmseg')

KILLS = int(os.environ.get('MMVSSM_TEST_KILLS', 20))


def random_kill(seed, iters, interval):
    """At the start of an iteration, shortly after it, or within a save."""
    # Every save has four: the checkpoint, its folder, the pointer, the folder again.
    fsyncs = 4 * (iters // interval)
    rng = random.Random(seed)
    where = ('SIGKILL', 'later', 'fsync', 'replace', 'after-replace')
    # Both kinds where there are two only.
    what = where[seed % 2 * 2] if seed < 2 else rng.choice(where)
    last = {'fsync': fsyncs, 'replace': fsyncs // 2, 'after-replace': fsyncs // 2}
    return f'{what}@{rng.randint(1, last.get(what, iters - 1))}'


@pytest.mark.parametrize(
    ('kills', 'iters', 'interval'),
    [(2, 12, 4), pytest.param(KILLS, 60, 7, marks=pytest.mark.long)],
    ids=['short', 'long'],
)
def test_killed_and_resumed_ends_with_the_same_bits(kills, iters, interval, tmp_path):
    write_vmamba(tmp_path, iters=iters, interval=interval)
    events = {random_kill(seed, iters, interval): -9 for seed in range(kills)}
    assert len(events) == kills
    rng = random.Random(kills)
    for step in rng.sample(range(1, iters), max(1, kills // 4)):
        events[f'SIGTERM@{step}'] = 75
    runs = [('', '--work-dir', 'whole')]
    for event in events:
        options = ('--work-dir', event, '--resume', 'auto')
        runs += [(event, *options), ('', *options)]
    (code, log), *results = train_each(tmp_path, *runs)
    assert code == 0, log
    whole = final_weights(tmp_path, 'whole')
    firsts, seconds = results[::2], results[1::2]
    for (event, code), (stopped, log), resumed in zip(events.items(), firsts, seconds):
        assert stopped == code, f'{event}: {log}'
        assert resumed[0] == 0, f'{event}: {resumed[1]}'
        assert same_bits(final_weights(tmp_path, event), whole), event
        assert not list((tmp_path / event).glob('*.partial'))
        started = 'resumed epoch' in resumed[1]
        print(f'{event}: {"resumed" if started else "started anew"}, the same bits')


@pytest.mark.long
def test_one_of_two_ranks_is_killed(tmp_path):
    write_vmamba(tmp_path, iters=60, interval=7)
    code, log = train_ranks(tmp_path, '--work-dir', 'whole')
    assert code == 0, log
    whole = final_weights(tmp_path, 'whole')
    for rank, event in (('1', 'SIGKILL@23'), ('0', 'later@40'), ('0', 'fsync@13')):
        options = ('--work-dir', event, '--resume', 'auto')
        code, _ = train_ranks(tmp_path, *options, event=event, TOY_RANK=rank)
        assert code != 0
        code, log = train_ranks(tmp_path, *options)
        assert code == 0 and 'resumed epoch' in log, log
        assert same_bits(final_weights(tmp_path, event), whole), event
