"""One training at a time in a work dir."""

import atexit
import json
import math
import os
import socket
import sys
import threading
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import NamedTuple

from mmengine.config import Config
from mmengine.dist import init_dist, is_distributed, is_main_process

from mmvssm.engine.errors import UsageError

from .ranks import Ranks

LOCK = 'training.lock'
# A training on another machine is taken for dead when it has not renewed its lock for
# so long. A file server may show a renewal a minute late.
SECONDS_TO_EXPIRE = 120
_SECONDS_TO_RENEW = 30

# What this process holds, for exit paths that end it without clean-up.
_held: list['WorkDirLock'] = []


class Owner(NamedTuple):
    """Who trains in a work dir, as its lock says.

    Attributes:
        host: The machine's name.
        pid: The process's number there, of rank 0.
        start: When the process started, in the kernel's clock ticks since boot: another
            process may get its number later. None where the system does not say.
        machine: What tells machines and containers of one name apart, as their
            processes have numbers of their own: id of the boot and of the namespace.
        job: The Slurm job, '' for none.
        restarts: How often Slurm has requeued that job.
        since: When it began, seconds since 1970.
    """

    host: str
    pid: int
    start: int | None
    machine: str
    job: str
    restarts: int
    since: float

    @classmethod
    def here(cls) -> 'Owner':
        """This process."""
        pid, get = os.getpid(), os.environ.get
        job = get('SLURM_JOB_ID', '')
        return cls(
            host=socket.gethostname(),
            pid=pid,
            start=_start_of(pid),
            machine=_machine(),
            job=f'{get("SLURM_CLUSTER_NAME", "")}:{job}' if job else '',
            restarts=int(get('SLURM_RESTART_COUNT') or 0),
            since=time.time(),
        )

    def has_ended(self, here: 'Owner') -> bool | None:
        """Whether this owner is gone for certain; None where it cannot be known."""
        if (self.host, self.machine) == (here.host, here.machine):
            return not _runs(self.pid, self.start)
        if self.job and self.job == here.job and self.restarts < here.restarts:
            return True
        return None


class WorkDirLock:
    """The right to train in a folder: a file there that says who has it.

    A thread renews the file every 30 seconds, for machines that cannot see whether the
    process still runs.
    """

    def __init__(self, folder: str | Path):
        """Take the lock of a folder, which is made where it is missing.

        Raises:
            UsageError: Another training has it, or nothing can be written there.
        """
        self.path = Path(folder).absolute() / LOCK
        self.owner = Owner.here()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._take()
        except OSError as error:
            raise UsageError(
                f'cannot write to the work dir {folder} ({error}): give another '
                '--work-dir.'
            ) from error
        _held.append(self)
        self._ended = threading.Event()
        self._at_work = threading.Lock()
        threading.Thread(target=self._keep_renewing, daemon=True).start()

    def _take(self) -> None:
        while not self._create():
            try:
                owner, renewed = _read(self.path)
            except FileNotFoundError:
                continue  # It has just been released.
            ended = owner.has_ended(self.owner) if owner else None
            left = 0.0
            if ended is None:
                left = SECONDS_TO_EXPIRE - (self._time_of_disk() - renewed)
                ended = left <= 0
            if not ended:
                raise UsageError(_refusal(self.path.parent, owner, left))
            self._remove(owner)

    def _create(self) -> bool:
        """Make the file unless there is one: of several trainings one succeeds."""
        try:
            with open(self.path, 'x') as file:
                json.dump(self.owner._asdict(), file)
        except FileExistsError:
            return False
        return True

    def _time_of_disk(self) -> float:
        """What a file that is written now has: clocks of machines differ."""
        path = self._beside('clock')
        path.touch()
        try:
            return path.stat().st_mtime
        finally:
            path.unlink(missing_ok=True)

    def _remove(self, stale: Owner | None) -> None:
        """Remove a lock whose owner is gone."""
        aside = self._beside('stale')
        try:
            self.path.rename(aside)
            if _read(aside)[0] != stale:
                # Another training was faster and has taken the lock: put it back.
                os.link(aside, self.path)
        except OSError:
            pass  # There is none, or another one already.
        finally:
            aside.unlink(missing_ok=True)

    def _beside(self, kind: str) -> Path:
        """A file that no other process has."""
        own = f'{self.owner.host}.{self.owner.pid}.{kind}'
        return self.path.with_name(f'{self.path.name}.{own}')

    def _keep_renewing(self) -> None:
        while not self._ended.wait(_SECONDS_TO_RENEW):
            with self._at_work:
                if not self._ended.is_set():
                    self.renew()

    def renew(self) -> None:
        """Say that this training goes on; end it if another one has taken its lock."""
        try:
            owner, _ = _read(self.path)
            if owner in (None, self.owner):
                os.utime(self.path)
                return
        except FileNotFoundError:
            self._create()
            return
        except OSError:
            return  # The disk may come back.
        print(
            f'error: {_refusal(self.path.parent, owner)} It took this one for ended, '
            'as it had not renewed its lock for two minutes.',
            file=sys.stderr,
            flush=True,
        )
        # At once: nothing may be saved here any more.
        os._exit(2)

    def release(self) -> None:
        """Give the folder back; a second call does nothing."""
        if self not in _held or os.getpid() != self.owner.pid:
            return
        _held.remove(self)
        self._ended.set()
        try:
            with self._at_work:
                if _read(self.path)[0] == self.owner:
                    self.path.unlink()
        except OSError:
            pass  # It expires.

    def __enter__(self) -> 'WorkDirLock':
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def lock_work_dir(cfg: Config) -> AbstractContextManager:
    """Let no other training write to a config's work dir as long as this one runs.

    The lock of a process that has ended without giving it back stops nobody: on the
    same machine at once, on others when it has not been renewed for two minutes. A
    Slurm job that was requeued takes over its own lock.

    Args:
        cfg: After :func:`prepare_launch`, if there are several processes.

    Returns:
        The lock, which is given back at the end of the process or of a ``with``. Only
        rank 0 has it; there is none where the work dir is no local folder.

    Raises:
        UsageError: Another training is at work there. On all ranks.
    """
    launcher = cfg.get('launcher') or 'none'
    if launcher != 'none' and not is_distributed():
        # As the runner would do: nobody may wait there for a rank that ends here.
        init_dist(launcher, **((cfg.get('env_cfg') or {}).get('dist_cfg') or {}))
    lock, said = None, ''
    if is_main_process() and '://' not in cfg.work_dir:
        path = Path(cfg.work_dir).absolute() / LOCK
        try:
            lock = next((held for held in _held if held.path == path), None)
            lock = lock or WorkDirLock(cfg.work_dir)
        except UsageError as error:
            said = str(error)
    said = Ranks().gather(said)[0]
    if said:
        raise UsageError(said)
    return lock or nullcontext()


@atexit.register
def release_work_dirs() -> None:
    """Give back all that this process holds, as at its end."""
    for lock in [*_held]:
        lock.release()


def _read(path: Path) -> tuple[Owner | None, float]:
    """The owner, None where the file does not say; when it renewed, by the disk."""
    with open(path) as file:
        text = file.read()
        renewed = os.fstat(file.fileno()).st_mtime
    try:
        return Owner(**json.loads(text)), renewed
    except (TypeError, ValueError):
        return None, renewed  # It is being written, or was cut off.


def _refusal(folder: Path, owner: Owner | None, seconds: float = 0) -> str:
    who = ''
    if owner is not None:
        since = time.strftime('%Y-%m-%d %H:%M:%S %Z', time.localtime(owner.since))
        job = f' of job {owner.job.rpartition(":")[2]}' if owner.job else ''
        who = f' (process {owner.pid}{job} on {owner.host}, since {since})'
    text = f'{folder} is in use by another training{who}: give another --work-dir'
    if seconds > 0:
        text += (
            '; or, if that training has ended, start this one again in '
            f'{math.ceil(seconds)} seconds'
        )
    return f'{text}.'


def _runs(pid: int, start: int | None) -> bool:
    """Whether a process of this machine runs, and is the one that started then."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # It is of another user.
    found = _start_of(pid)
    return found is None or start is None or found == start


def _start_of(pid: int) -> int | None:
    """When a process started; -1 if it has ended and is only listed still.

    None where the system does not say.
    """
    try:
        text = Path(f'/proc/{pid}/stat').read_text()
    except OSError:
        return None
    # The name, in brackets, may have blanks and brackets.
    state, *fields = text.rpartition(')')[2].split()
    return -1 if state in 'ZX' else int(fields[18])


def _machine() -> str:
    try:
        boot = Path('/proc/sys/kernel/random/boot_id').read_text().strip()
        return f'{boot} {os.stat("/proc/self/ns/pid").st_ino}'
    except OSError:
        return ''
