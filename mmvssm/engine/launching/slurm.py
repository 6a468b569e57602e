"""Where the tasks of a Slurm job, or of mpirun, find each other."""

import os
import socket
import subprocess
import time
import zlib

from torch.distributed import TCPStore

from mmvssm.engine.errors import UsageError

# Below the ports that Linux hands out by itself (32768 and up).
_FIRST_PORT = 15000
_PORTS_PER_JOB = 16
_JOBS = 1000
_SECONDS_TO_ANSWER = 2

# The one behind MASTER_PORT; torch.distributed finds it in the same process.
_store: TCPStore | None = None


def set_rendezvous(seconds: float = 1800) -> None:
    """Set ``MASTER_ADDR`` and ``MASTER_PORT``, the same in every task of a step.

    What is set already stays. The address is that of the first node. The ports
    to try follow from the job's number, so that jobs that share a node differ.
    Task 0 takes the first that is free and holds it; the others find it by
    asking on further such ports for their own job and step.

    Args:
        seconds: How long the tasks wait for each other.

    Raises:
        UsageError: The address cannot be found out, or the tasks do not find
            each other.
    """
    if 'MASTER_ADDR' not in os.environ:
        os.environ['MASTER_ADDR'] = _first_address()
    if 'MASTER_PORT' not in os.environ:
        task, tasks = (int(os.environ[k]) for k in ('SLURM_PROCID', 'SLURM_NTASKS'))
        job, step = (int(os.environ[k]) for k in ('SLURM_JOB_ID', 'SLURM_STEP_ID'))
        name = f'mmvssm {job}.{step}.{os.environ.get("SLURM_RESTART_COUNT", "0")}'
        port = _agree_on_port(name, job, task, tasks, seconds)
        os.environ['MASTER_PORT'] = str(port)


def set_mpi_rendezvous(seconds: float = 1800) -> None:
    """Do for the processes of one mpirun what :func:`set_rendezvous` does for Slurm's.

    The ports to try follow from the name that Open MPI gives to the run. Where it
    gives none, the port is the one that torch takes, 29500.

    Args:
        seconds: How long the processes wait for each other.

    Raises:
        UsageError: They run on several machines and ``MASTER_ADDR`` is not set, or do
            not find each other.
    """
    world = {
        key: os.environ.get(f'OMPI_COMM_WORLD_{key}')
        for key in ('RANK', 'SIZE', 'LOCAL_SIZE')
    }
    if 'MASTER_ADDR' not in os.environ:
        if world['LOCAL_SIZE'] != world['SIZE']:
            raise UsageError(
                'MASTER_ADDR is not set: export the address of the machine that rank 0 '
                'runs on (mpirun -x MASTER_ADDR=ADDRESS).'
            )
        os.environ['MASTER_ADDR'] = '127.0.0.1'
    if 'MASTER_PORT' in os.environ:
        return
    run = os.environ.get('PMIX_NAMESPACE')
    port = 29500
    if run:
        # Names of other runs may have blanks, which separate words of a question.
        name = f'mmvssm-mpi {run.replace(" ", "_")}'
        task, tasks = int(world['RANK'] or 0), int(world['SIZE'] or 1)
        port = _agree_on_port(name, zlib.crc32(run.encode()), task, tasks, seconds)
    os.environ['MASTER_PORT'] = str(port)


def _first_address() -> str:
    """The address of the node that task 0 runs on."""
    nodes = os.environ.get('SLURM_STEP_NODELIST') or os.environ['SLURM_NODELIST']
    name = _scontrol('show', 'hostnames', nodes).split()[0]
    try:
        socket.getaddrinfo(name, None)
    except OSError:
        # Slurm may call a node otherwise than the network does.
        node = _scontrol('--oneliner', 'show', 'node', name)
        fields = dict(word.split('=', 1) for word in node.split() if '=' in word)
        return fields.get('NodeAddr', name)
    return name


def _scontrol(*words: str) -> str:
    try:
        done = subprocess.run(
            ['scontrol', *words], check=True, capture_output=True, text=True
        )
    except (OSError, subprocess.CalledProcessError) as error:
        reason = getattr(error, 'stderr', None) or error
        raise UsageError(
            f'cannot ask Slurm for the address of the first node ({reason}): '
            'export MASTER_ADDR, the address of the node that task 0 runs on.'
        ) from error
    return done.stdout


def _agree_on_port(
    name: str, number: int, task: int, tasks: int, seconds: float
) -> int:
    """The port of task 0's store, the same for all tasks.

    Args:
        name: By which tasks of the same step know each other.
        number: Of the job; the ports to try follow from it.
        task: Which of them this is, from 0.
        tasks: How many there are.
        seconds: How long they wait for each other.
    """
    first = _FIRST_PORT + number % _JOBS * _PORTS_PER_JOB
    middle = first + _PORTS_PER_JOB // 2
    doors = range(first, middle)
    if task:
        return _ask_for_port(doors, f'{name} {task}', seconds)
    port = _open_store(range(middle, first + _PORTS_PER_JOB))
    _tell_port(doors, name, port, tasks - 1, seconds)
    return port


def _open_store(ports: range) -> int:
    """Open a store on the first free port; torch.distributed will share it."""
    global _store
    for port in ports:
        try:
            _store = TCPStore(
                'localhost',
                port,
                is_master=True,
                wait_for_workers=False,
                multi_tenant=True,
            )
        except RuntimeError:  # Others have the port.
            continue
        return port
    raise UsageError(_all_taken(ports))


def _all_taken(ports: range) -> str:
    return (
        f'the ports {ports[0]} to {ports[-1]} are all in use on the first node: '
        'export MASTER_PORT, one that is free there.'
    )


def _tell_port(doors: range, name: str, port: int, others: int, seconds: float) -> None:
    """Tell all other tasks the store's port on the first free one of ``doors``."""
    for door in doors:
        try:
            server = socket.create_server(('', door))
        except OSError:
            continue
        with server:
            _answer(server, name, port, others, seconds)
        return
    raise UsageError(_all_taken(doors))


def _answer(
    server: socket.socket, name: str, port: int, others: int, seconds: float
) -> None:
    told = set()
    end = time.monotonic() + seconds
    while len(told) < others:
        server.settimeout(max(end - time.monotonic(), 0.001))
        try:
            connection, _ = server.accept()
        except TimeoutError as error:
            raise UsageError(
                f'only {len(told)} of {others} other tasks came in {seconds:g} '
                'seconds. If they run and cannot reach this node, export MASTER_ADDR '
                'and MASTER_PORT, an address and a port of it that they do.'
            ) from error
        with connection:
            connection.settimeout(_SECONDS_TO_ANSWER)
            # Others may come here too: another job's task, a scan of the ports.
            try:
                asked, _, task = connection.recv(100).decode().rpartition(' ')
                if asked == name:
                    connection.sendall(f'{name} {port}'.encode())
                    told.add(task)
            except (OSError, UnicodeDecodeError):
                continue


def _ask_for_port(doors: range, question: str, seconds: float) -> int:
    """Knock until task 0 says on one of ``doors`` which port its store has."""
    address = os.environ['MASTER_ADDR']
    name = question.rpartition(' ')[0]
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        for door in doors:
            answered, _, port = _ask(address, door, question).rpartition(' ')
            if answered == name:
                return int(port)
        time.sleep(0.1)
    raise UsageError(
        f'task 0 did not answer on {address}, ports {doors[0]} to {doors[-1]}, in '
        f'{seconds:g} seconds: export MASTER_ADDR, an address of the first node that '
        'the other nodes reach, or MASTER_PORT, a port that they do.'
    )


def _ask(address: str, door: int, question: str) -> str:
    """What is answered there; nothing where nobody does."""
    try:
        with socket.create_connection((address, door), _SECONDS_TO_ANSWER) as peer:
            peer.sendall(question.encode())
            return peer.recv(100).decode()
    except (OSError, UnicodeDecodeError):
        return ''
