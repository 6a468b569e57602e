"""Slurm on this machine: one controller, two nodes, gone when the tests are.

Nothing outside a temporary folder is read or written, and nothing is installed:
.ci/install_slurm does that. MMVSSM_REQUIRE_SLURM=1, which .ci/run sets, turns the
absence of Slurm from a reason to skip into a failure.
"""

import ctypes
import getpass
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from toy import free_ports, wait

_DAEMONS = ('munged', 'slurmctld', 'slurmd')
_REQUIRED = os.environ.get('MMVSSM_REQUIRE_SLURM', '0') not in ('', '0')
# Jobs call this Python; users' paths may lack the folders of the daemons.
_PATH = ':'.join(
    (str(Path(sys.executable).parent), os.environ['PATH'], '/usr/sbin', '/sbin')
)
_NODES = ('n1', 'n2')

# Any number of CPUs may be claimed, as nothing binds a task to one. A job that
# was requeued waits until the credential of its former run has expired.
_CONFIG = """
ClusterName=mmvssm_test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=1,batch_sched_delay=0
SlurmdParameters=config_overrides
MpiDefault=none
ReturnToService=2
KillWait=30
{nodes}
PartitionName=test Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


class Cluster:
    """A running Slurm.

    Attributes:
        environment: Variables under which Slurm's commands find it.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.environment = dict(
            SLURM_CONF=str(folder / 'slurm.conf'),
            PATH=_PATH,
        )
        self._daemons = []

    def start(self) -> None:
        """Start the daemons and wait for both nodes."""
        key = self.folder / 'munge.key'
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        (self.folder / 'state').mkdir()
        host = socket.gethostname().split('.')[0]
        controller, *ports = free_ports(1 + len(_NODES))
        nodes = '\n'.join(
            f'NodeName={name} NodeHostname={host} '
            f'NodeAddr=127.0.0.1 Port={port} CPUs=64 State=UNKNOWN'
            for name, port in zip(_NODES, ports)
        )
        (self.folder / 'slurm.conf').write_text(
            _CONFIG.format(
                host=host,
                controller=controller,
                user=getpass.getuser(),
                folder=self.folder,
                nodes=nodes,
            )
        )
        self._launch(
            'munged',
            '--foreground',
            '--force',
            f'--key-file={key}',
            *(
                f'--{name}-file={self.folder}/munge.{name}'
                for name in ('log', 'pid', 'seed')
            ),
            f'--socket={self.folder}/munge.socket',
        )
        self._wait(lambda: (self.folder / 'munge.socket').exists())
        self._launch('slurmctld', '-D', '-c')
        for name in _NODES:
            self._launch('slurmd', '-D', '-N', name)
        self._wait(
            lambda: self.run('sinfo', '-h', '-o', '%t %D').split() == ['idle', '2']
        )

    def _launch(self, *command: str) -> None:
        with open(self.folder / f'daemon{len(self._daemons)}.txt', 'w') as log:
            self._daemons.append(
                subprocess.Popen(
                    command,
                    stdout=log,
                    stderr=log,
                    env={**os.environ, **self.environment},
                    preexec_fn=_end_with_parent,
                )
            )

    def _wait(self, ready: Callable[[], bool]) -> None:
        def ready_or_broken() -> bool:
            for daemon in self._daemons:
                if daemon.poll() is not None:
                    raise RuntimeError(f'{daemon.args} ended:\n{self.logs()}')
            try:
                return ready()
            except subprocess.CalledProcessError:
                return False  # The controller does not answer yet.

        try:
            wait(ready_or_broken, 60)
        except TimeoutError as error:
            raise RuntimeError(f'Slurm does not start:\n{self.logs()}') from error

    def run(self, *command: object, **variables: str) -> str:
        """What a command of Slurm's prints, with more variables than it has here."""
        done = subprocess.run(
            list(map(str, command)),
            check=True,
            capture_output=True,
            text=True,
            env={**os.environ, **variables, **self.environment},
            timeout=60,
        )
        return done.stdout

    def logs(self) -> str:
        """The last lines that every daemon wrote."""
        paths = [*self.folder.glob('daemon*.txt'), *self.folder.glob('*.log')]
        return '\n'.join(
            f'{path.name}: ' + '\n'.join(path.read_text().splitlines()[-15:])
            for path in paths
        )

    def stop(self) -> None:
        """End what was started here, and all that these processes started."""
        # The daemons would wait for tasks, which in turn outlive them.
        self._kill_others()
        for daemon in reversed(self._daemons):
            daemon.terminate()
        for daemon in self._daemons:
            try:
                daemon.wait(3)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        self._kill_others()

    def _kill_others(self) -> None:
        for pid in self.processes():
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass

    def processes(self) -> Iterator[int]:
        """What knows this cluster and is not a daemon started above."""
        mark = f'SLURM_CONF={self.environment["SLURM_CONF"]}'.encode()
        daemons = {daemon.pid for daemon in self._daemons}
        for entry in Path('/proc').glob('[0-9]*'):
            try:
                variables = (entry / 'environ').read_bytes().split(b'\0')
            except OSError:
                continue  # It has ended, or is of another user.
            if mark in variables and int(entry.name) not in daemons:
                yield int(entry.name)


def _end_with_parent() -> None:
    """Should the tests be killed, the daemons end, too."""
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)


def skip_unless_installed() -> None:
    """Skip, or fail where Slurm is required, unless its programs are there."""
    if all(shutil.which(name, path=_PATH) for name in _DAEMONS):
        return
    reason = 'Slurm is not installed (.ci/install_slurm does it, as root on Debian)'
    if _REQUIRED:
        pytest.fail(f'MMVSSM_REQUIRE_SLURM is set, but {reason}')
    pytest.skip(reason)


@contextmanager
def running_cluster() -> Iterator[Cluster]:
    """A :class:`Cluster` within the block; skips the test where there is none."""
    skip_unless_installed()
    # Paths of sockets must be short.
    with tempfile.TemporaryDirectory(prefix='slurm', dir='/tmp') as folder:
        cluster = Cluster(Path(folder))
        try:
            cluster.start()
            yield cluster
        finally:
            cluster.stop()
