"""Two processes train what one process trains on the whole batch."""

import pytest

import doubled_batch
from tiny import REPO
from toy import free_port

pytest.importorskip('mmseg')


@pytest.fixture(scope='module')
def outcome(tmp_path_factory):
    work = tmp_path_factory.mktemp('distributed')
    doubled_batch.write(work)
    tools = REPO / 'tools'
    doubled_batch.run_one(work)
    config, *options = doubled_batch.TWO
    doubled_batch.run(
        [tools / 'dist_train.sh', config, 2, *options], work, PORT=free_port()
    )
    return doubled_batch.outcome(work)


def test_both_ranks_hold_the_same_weights(outcome):
    doubled_batch.assert_same_weights(outcome)


def test_losses_are_those_of_one_process_with_both_batches(outcome):
    doubled_batch.assert_same_losses(outcome)
