"""Trainings as jobs of Slurm, on two nodes that are both this machine."""

import json
import re
import signal

import pytest

import doubled_batch
from tiny import REPO
from toy import environment, final_weights, same_bits, wait, write_toy

from .cluster import running_cluster

TOOLS = REPO / 'tools'
HELD = 7
# How a job that has reached iteration HELD comes to be told to stop.
TOLD = {
    'signal': ('scancel', '--signal=USR1'),
    'requeue': ('scontrol', 'requeue'),
    # Slurm sends the signal up to half a minute earlier than asked.
    'time limit': ('sbatch', '--time=1', '--signal=USR1@5'),
}


@pytest.fixture(scope='module')
def cluster():
    with running_cluster() as running:
        yield running


@pytest.fixture(scope='module')
def jobs(cluster, tmp_path_factory):
    """Jobs of two tasks that train the toy, all on the same two nodes at once.

    Returns those of TOLD, which have been told to stop or will be, and 'whole',
    which never is and trained while others held, and 'lost', which loses a task.
    """
    work = tmp_path_factory.mktemp('jobs')
    write_toy(work, iters=20)
    jobs = {'lost': Job(cluster, work, 'lost', 'lose@3')}
    for name, (command, *options) in TOLD.items():
        more = options if command == 'sbatch' else ()
        jobs[name] = Job(cluster, work, name, f'hold@{HELD}', *more)
    for name in TOLD:
        jobs[name].wait_until_held()
    jobs['whole'] = Job(cluster, work, 'whole')
    jobs['whole'].wait_for_end()
    for name, (command, *options) in TOLD.items():
        if command != 'sbatch':
            cluster.run(command, *options, jobs[name].id)
    return jobs


class Job:
    """A training submitted with tools/sbatch_train.sh."""

    def __init__(self, cluster, work, name, event='', *options):
        self.cluster, self.work, self.name = cluster, work, name
        self.folder = work / name
        words = cluster.run(
            *('sbatch', '--parsable', f'--chdir={REPO}', f'--output={work}/{name}.txt'),
            *('--nodes=2', '--ntasks-per-node=1', '--cpus-per-task=1', '--gres=none'),
            *options,
            *(TOOLS / 'sbatch_train.sh', work / 'toy_config.py'),
            *('--work-dir', self.folder),
            **environment(event),
        )
        self.id = words.strip()

    def wait_until_held(self):
        files = [self.folder / f'holds_{rank}' for rank in range(2)]
        wait(lambda: all(file.exists() for file in files) or self.ended())
        assert not self.ended(), self.log()

    def wait_for_end(self):
        wait(self.ended)

    def ended(self):
        going_on = ('PENDING', 'CONFIGURING', 'RUNNING', 'COMPLETING')
        return self.field('JobState') not in going_on

    def field(self, name):
        said = self.cluster.run('scontrol', '--oneliner', 'show', 'job', self.id)
        return re.search(rf'\b{name}=(\S+)', said)[1]

    def log(self):
        """What its tasks printed, and the tracebacks of unexpected errors."""
        files = [self.work / f'{self.name}.txt', *self.folder.glob('*/error*.txt')]
        return '\n'.join(file.read_text() for file in files)

    def port(self):
        """Where the tasks met, which both must name."""
        first, second = ((self.folder / f'port_{r}').read_text() for r in range(2))
        assert first == second
        return first


@pytest.fixture(scope='module')
def two_nodes(cluster, jobs, tmp_path_factory):
    """Train and test through the scripts, while jobs wait; the folder of it all."""
    pytest.importorskip('mmseg')
    work = tmp_path_factory.mktemp('two_nodes')
    doubled_batch.write(work)
    doubled_batch.run_one(work)
    run_script(cluster, work, TOOLS / 'slurm_train.sh', *doubled_batch.TWO)
    checkpoint = f'one/iter_{doubled_batch.STEPS}.pth'
    options = ('--work-dir', 'test')
    run_script(cluster, work, TOOLS / 'slurm_test.sh', 'tiny.py', checkpoint, *options)
    return work


def run_script(cluster, work, script, *arguments):
    doubled_batch.run(
        [script, 'test', script.name, *arguments],
        work,
        **cluster.environment,
        **dict(GPUS='2', GPUS_PER_NODE='0', TASKS_PER_NODE='1', CPUS_PER_TASK='1'),
    )


def test_two_nodes_train_what_one_process_trains(two_nodes):
    outcome = doubled_batch.outcome(two_nodes)
    doubled_batch.assert_same_weights(outcome)
    doubled_batch.assert_same_losses(outcome)


def test_two_nodes_evaluate_what_one_process_evaluates(two_nodes):
    (trained,) = two_nodes.glob('one/*/vis_data/scalars.json')
    last = json.loads(trained.read_text().splitlines()[-1])
    (tested,) = two_nodes.glob('test/*/*.json')
    metrics = json.loads(tested.read_text())
    for name in ('aAcc', 'mIoU', 'mAcc'):
        assert metrics[name] == last[name]


def test_step_that_loses_a_task_ends(cluster, tmp_path):
    """As with a GPU, where the other tasks would wait for the lost one."""
    for name in ('slurm_train.sh', 'slurm_run.sh'):
        (tmp_path / name).symlink_to(TOOLS / name)
    (tmp_path / 'train.py').write_text(
        'import os, signal, time\n'
        "if os.environ['SLURM_PROCID'] == '1':\n"
        f'    os.kill(os.getpid(), {signal.SIGKILL.value})\n'
        'time.sleep(100)\n'
        "open('survived', 'w')\n"
    )
    with pytest.raises(AssertionError, match='task 1: Killed'):
        run_script(cluster, tmp_path, tmp_path / 'slurm_train.sh', 'config.py')
    assert not (tmp_path / 'survived').exists()


@pytest.mark.parametrize('name', TOLD)
def test_job_told_to_stop_is_requeued_and_goes_on_by_itself(name, jobs):
    job = jobs[name]
    job.wait_for_end()
    log = job.log()
    assert job.field('JobState') == 'COMPLETED', log
    assert int(job.field('Restarts')) >= 1
    assert f'stopped after iteration {HELD}: ' in log
    assert f'resumed epoch: 0, iter: {HELD}' in log
    assert same_bits(final_weights(job.work, name), final_weights(job.work, 'whole'))


def test_job_that_loses_a_task_ends_and_stays_so(jobs):
    job = jobs['lost']
    job.wait_for_end()
    assert job.field('JobState') == 'FAILED', job.log()
    assert job.field('Restarts') == '0'
    assert not (job.folder / 'final.pt').exists()


def test_jobs_that_share_nodes_meet_on_ports_of_their_own(jobs):
    assert jobs['whole'].field('JobState') == 'COMPLETED', jobs['whole'].log()
    assert len({job.port() for job in jobs.values()}) == len(jobs)
