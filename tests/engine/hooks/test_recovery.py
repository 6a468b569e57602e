"""Trainings that are killed, told to stop, or run out of disk."""

import os
import signal
import socket

import pytest
import torch

import warm
from mmvssm.engine.checkpoints.files import newest_training_state
from tiny import REPO
from toy import (
    EPOCHS,
    EPOCHS_OF_ITERATIONS,
    environment,
    final_weights,
    free_port,
    same_bits,
    train_each,
    train_pair,
    train_ranks,
    wait,
    write_toy,
)

RESUME = ('--work-dir', 'out', '--resume', 'auto')
WHOLE = ('', '--work-dir', 'whole')
WORKERS = 'train_dataloader.update(num_workers=2, persistent_workers=True)\n'
ACCUMULATE = 'optim_wrapper.update(accumulative_counts=5)\n'
ITERS = 30


@pytest.mark.parametrize(
    ('more', 'stops'),
    [(WORKERS, (17, 23)), (ACCUMULATE, (20, 25))],
    ids=['workers', 'sums of gradients'],
)
def test_told_to_stop_twice_ends_with_the_same_bits(tmp_path, more, stops):
    write_toy(tmp_path, more, ITERS)
    events = ('SIGTERM@17', 'SIGUSR1@23', '')
    _, *parts = train_each(tmp_path, WHOLE, *[(event, *RESUME) for event in events])
    assert [code for code, _ in parts] == [75, 75, 0], parts[-1][1]
    for step, (_, log) in zip(stops, parts):
        assert f'stopped after iteration {step}' in log
    assert same_bits(final_weights(tmp_path), final_weights(tmp_path, 'whole'))
    # The weights moved up to the end.
    before = torch.load(tmp_path / 'out/iter_25.pth')['state_dict']
    assert not same_bits(final_weights(tmp_path), before)


@pytest.mark.parametrize('more', ['', EPOCHS], ids=['iterations', 'epochs'])
def test_config_without_a_seed_goes_on_with_that_of_the_checkpoint(more, tmp_path):
    write_toy(tmp_path, more + 'randomness = dict(seed=None)\n')
    ((code, log),) = train_each(tmp_path, WHOLE)
    assert code == 0, log
    path = tmp_path / 'whole' / ('epoch_4.pth' if more else 'iter_25.pth')
    options = ('--work-dir', 'out', '--resume', path)
    ((code, log),) = train_each(tmp_path, ('', *options))
    assert code == 0, log
    assert same_bits(final_weights(tmp_path), final_weights(tmp_path, 'whole'))


@pytest.mark.parametrize('workers', ['', WORKERS], ids=['alone', 'workers'])
def test_stopped_within_epochs_ends_with_the_same_bits(workers, tmp_path):
    write_toy(tmp_path, EPOCHS + workers)
    # The last of these ends an epoch that a validation follows.
    events = ('SIGTERM@4', 'SIGUSR1@15', 'SIGKILL@17', 'SIGTERM@24', '')
    _, *parts = train_each(tmp_path, WHOLE, *[(event, *RESUME) for event in events])
    assert [code for code, _ in parts] == [75, 75, -9, 75, 0], parts[-1][1]
    for log, epoch, step in zip(
        [log for _, log in parts[1:]], (0, 2, 2, 3), (4, 15, 15, 24)
    ):
        assert f'resumed epoch: {epoch}, iter: {step}' in log
    assert 'epoch_3_iter_24.pth; go on with --resume' in parts[3][1]
    assert parts[4][1].index('mean:') < parts[4][1].index('Epoch(train) [5][1/6]')
    assert same_bits(final_weights(tmp_path), final_weights(tmp_path, 'whole'))
    # The weights moved up to the end.
    before = torch.load(tmp_path / 'out/epoch_4.pth')['state_dict']
    assert not same_bits(final_weights(tmp_path), before)


@pytest.mark.parametrize(
    'workers',
    ['', WORKERS, WORKERS.replace('True', 'False')],
    ids=['alone', 'workers', 'new workers'],
)
def test_iterations_over_epochs_end_with_the_same_bits(workers, tmp_path):
    write_toy(tmp_path, EPOCHS_OF_ITERATIONS + workers)
    # Within the first epoch of six batches, and at the end of the third.
    events = ('SIGTERM@4', 'SIGUSR1@18', '')
    _, *parts = train_each(tmp_path, WHOLE, *[(event, *RESUME) for event in events])
    assert [code for code, _ in parts] == [75, 75, 0], parts[-1][1]
    assert 'resumed epoch: 0, iter: 18' in parts[-1][1]
    assert same_bits(final_weights(tmp_path), final_weights(tmp_path, 'whole'))


def test_told_to_stop_while_it_waits_for_data(tmp_path):
    write_toy(tmp_path, iters=7)
    first, second, third, whole = train_each(
        tmp_path, ('stuck@0', *RESUME), ('stuck@5', *RESUME), ('', *RESUME), WHOLE
    )
    for step, (code, log) in zip((0, 5), (first, second)):
        assert code == 75, log
        assert f'stopped after iteration {step}: SIGTERM' in log
    assert third[0] == 0, third[1]
    assert same_bits(final_weights(tmp_path), final_weights(tmp_path, 'whole'))


_AVERAGED = """
custom_hooks += [dict(type='EMAHook', momentum=0.3)]
train_cfg.update(val_interval=7)
"""


def test_told_to_stop_in_a_validation_saves_what_it_follows(tmp_path):
    write_toy(tmp_path, _AVERAGED, iters=9)
    whole, stopped, resumed = train_each(
        tmp_path, WHOLE, ('val-SIGTERM@7', *RESUME), ('', *RESUME)
    )
    assert (whole[0], stopped[0], resumed[0]) == (0, 75, 0), stopped[1] + resumed[1]
    assert 'stopped after iteration 7: SIGTERM' in stopped[1]
    assert 'iter_7.pth; go on with --resume' in stopped[1]
    assert 'mean:' not in stopped[1]
    assert resumed[1].index('mean:') < resumed[1].index('Iter(train) [8/9]')
    assert same_bits(final_weights(tmp_path), final_weights(tmp_path, 'whole'))


def test_tools_take_the_epoch_loop_that_can_go_on(tmp_path):
    write_toy(
        tmp_path, EPOCHS + "train_cfg['type'] = 'EpochBasedTrainLoop'\n", iters=30
    )
    # The tool takes the loop that can.
    _, *parts = train_each(tmp_path, WHOLE, ('SIGTERM@9', *RESUME), ('', *RESUME))
    assert [code for code, _ in parts] == [75, 0], parts[-1][1]
    assert 'epoch_1_iter_9.pth' in parts[0][1]
    assert 'repeats an epoch' not in parts[0][1]
    assert same_bits(final_weights(tmp_path), final_weights(tmp_path, 'whole'))


def test_epoch_of_another_length_is_repeated(tmp_path):
    write_toy(tmp_path, EPOCHS)
    (stopped,) = train_each(tmp_path, ('SIGTERM@9', *RESUME))
    assert stopped[0] == 75
    options = ('--cfg-options', 'train_dataloader.batch_size=3')
    ((code, log),) = train_each(tmp_path, ('', *RESUME, *options))
    assert code == 0, log
    assert 'was stopped after 3 of 6 batches and has 4 now: it is repeated' in log
    assert 'Epoch(train) [2][1/4]' in log


@pytest.mark.parametrize('more', ['', EPOCHS], ids=['iterations', 'epochs'])
def test_last_validation_that_was_cut_off_is_done_on_resuming(more, tmp_path):
    write_toy(tmp_path, more)
    results = train_each(tmp_path, ('validation@30', *RESUME), ('', *RESUME))
    assert [code for code, _ in results] == [-9, 0]
    assert 'mean:' in results[1][1]
    assert '(train)' not in results[1][1]


def test_scale_of_gradients_goes_on_where_it_was(tmp_path):
    write_toy(tmp_path, "optim_wrapper.update(type='ToyAmpOptimWrapper')\n", ITERS)
    results = train_each(tmp_path, WHOLE, ('SIGKILL@18', *RESUME), ('', *RESUME))
    assert [code for code, _ in results] == [0, -9, 0], results[-1][1]
    assert same_bits(final_weights(tmp_path), final_weights(tmp_path, 'whole'))

    def scaler(file):
        return torch.load(tmp_path / file)['optimizer']['loss_scaler']

    assert scaler('out/iter_30.pth') == scaler('whole/iter_30.pth')
    # It grew, and its counter stood between two such steps.
    assert scaler('out/iter_25.pth')['_growth_tracker']
    assert scaler('out/iter_25.pth')['scale'] > 2.0**121


def test_validation_that_was_cut_off_is_done_on_resuming(tmp_path):
    write_toy(tmp_path, iters=20)
    # The third file moved into place is that of iteration 15, right before it.
    results = train_each(tmp_path, ('SIGUSR1@15', *RESUME), ('', *RESUME))
    assert [code for code, _ in results] == [75, 0]
    first, second = (log for _, log in results)
    assert 'mean:' not in first
    assert second.index('mean:') < second.index('Iter(train) [16/20]')


def test_damaged_checkpoints_are_passed_over_and_named(tmp_path):
    write_toy(tmp_path, iters=ITERS)
    whole, killed = train_each(tmp_path, WHOLE, ('SIGKILL@29', *RESUME))
    assert (whole[0], killed[0]) == (0, -9)
    newest, older = (tmp_path / f'out/iter_{step}.pth' for step in (25, 20))
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    ((code, log),) = train_each(tmp_path, ('', *RESUME))
    assert code == 0, log
    assert f'skipped: {newest} is damaged: check sum' in log
    assert 'resumed epoch: 0, iter: 20' in log
    assert same_bits(final_weights(tmp_path), final_weights(tmp_path, 'whole'))
    for path in (tmp_path / 'out').glob('iter_*.pth'):
        path.write_bytes(path.read_bytes()[:1000])
    option = ('--work-dir', 'named', '--resume', older.with_name('iter_30.pth'))
    results = train_each(tmp_path, ('', *RESUME), ('', *option))
    assert [code for code, _ in results] == [2, 2]
    assert 'can be read: iter_30.pth, iter_25.pth' in results[0][1]
    assert 'iter_30.pth (1000 bytes) is truncated' in results[1][1]


def test_training_goes_on_while_the_disk_is_full(tmp_path):
    write_toy(tmp_path, iters=ITERS)
    whole, short, over = train_each(
        tmp_path, WHOLE, ('full2@14', *RESUME), ('full@24', '--work-dir', 'over')
    )
    assert (whole[0], short[0]) == (0, 0), short[1]
    assert 'training goes on WITHOUT a new checkpoint: cannot write' in short[1]
    assert f'Kept: {tmp_path}/out/iter_10.pth' in short[1]
    assert same_bits(final_weights(tmp_path), final_weights(tmp_path, 'whole'))
    # Where it never got better, that is an error, and the older ones stay.
    assert over[0] == 2, over[1]
    assert 'its last checkpoint is lost' in over[1]
    assert sorted(p.name for p in (tmp_path / 'over').glob('iter_*')) == [
        'iter_15.pth',
        'iter_20.pth',
    ]
    assert newest_training_state(tmp_path / 'over', print).endswith('iter_20.pth')


def test_two_ranks_survive_a_kill_of_one_and_a_signal_to_one(tmp_path):
    write_toy(tmp_path, iters=ITERS)
    # Those that nothing befalls need no launcher.
    for code, log in train_pair(
        tmp_path, 'toy_config.py', '--work-dir', 'whole', **environment()
    ):
        assert code == 0, log
    # The other rank ends, too: the launcher comes back.
    code, _ = train_ranks(tmp_path, *RESUME, event='SIGKILL@13', TOY_RANK='1')
    assert code != 0
    code, log = train_ranks(tmp_path, *RESUME, event='SIGUSR1@22', TOY_RANK='1')
    assert code != 0
    assert 'resumed epoch: 0, iter: 10' in log
    assert 'stopped after iteration 22: another rank was told to' in log
    (code, log), (other, _) = train_pair(
        tmp_path, 'toy_config.py', *RESUME, **environment()
    )
    assert code == other == 0, log
    assert 'resumed epoch: 0, iter: 22' in log
    assert same_bits(final_weights(tmp_path), final_weights(tmp_path, 'whole'))


@pytest.mark.parametrize('name', ['SIGTERM', 'SIGUSR1'])
def test_told_to_stop_while_starting(name, tmp_path):
    # A module among its variables is nothing that every mmengine takes.
    write_toy(tmp_path, f"__import__('signal').raise_signal({signal.Signals[name]:d})")
    ((code, log),) = train_each(tmp_path, ('', *RESUME))
    assert (code, log) == (75, '')


def test_told_to_stop_while_it_waits_for_the_other_rank(tmp_path):
    write_toy(tmp_path)
    port = free_port()
    meeting = dict(MASTER_ADDR='127.0.0.1', MASTER_PORT=port, RANK='0', LOCAL_RANK='0')
    log = tmp_path / 'log.txt'
    process = warm.start(
        [REPO / 'tools/train.py', 'toy_config.py', '--launcher', 'pytorch'],
        *(log, log),
        cwd=tmp_path,
        env={**os.environ, **environment(), **meeting, 'WORLD_SIZE': '2'},
    )
    try:
        wait(lambda: answers(int(port)))
        os.kill(process.pid, signal.SIGTERM)
        assert process.wait(60) == 75, log.read_text()
    finally:
        warm.kill(process)


def answers(port):
    with socket.socket() as client:
        return client.connect_ex(('127.0.0.1', port)) == 0


def test_stops_before_the_time_of_the_job_is_up(tmp_path):
    write_toy(tmp_path, 'custom_hooks[1].update(minutes_before_end=5)', iters=8)
    os.environ['SLURM_JOB_END_TIME'] = '1000'
    try:
        ((code, log),) = train_each(tmp_path, ('', *RESUME))
    finally:
        del os.environ['SLURM_JOB_END_TIME']
    assert code == 75
    assert "stopped after iteration 1: the job's time is nearly up" in log


def test_resume_auto_first_starts_from_load_from(tmp_path):
    write_toy(tmp_path, iters=5)
    (first,) = train_each(tmp_path, WHOLE)
    assert first[0] == 0, first[1]
    write_toy(tmp_path, "load_from = 'whole/iter_5.pth'", iters=5)
    ((code, log),) = train_each(tmp_path, ('', *RESUME))
    assert code == 0, log
    assert 'Load checkpoint from mmvssm-safe:whole/iter_5.pth' in log
    assert 'Iter(train) [1/5]' in log
