"""Python processes that need not import what takes seconds.

A tool is tested in a process of its own, as its users run it, and most of such a
process's time goes into importing torch and OpenMMLab's packages. :func:`run` takes
the place of ``subprocess.run([sys.executable, ...])``: one process for each process
of pytest imports them once, and every run is a fork of it. What a fork inherits is
what was imported, no more: registries are filled, nothing is built.

A fork cannot do what Python, the C library or a package does by an environment
variable when it starts. :func:`run` starts a real process where such a variable is
another one, where there is a GPU to be seen, and where the system is not Linux. It is
not for tests whose subject is the process itself: its imports, its memory, its
launcher.
"""

import atexit
import ctypes
import gc
import importlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import threading
import types
from contextlib import suppress
from pathlib import Path

_REPO = Path(__file__).resolve().parents[1]
# What tools import sooner or later. What is not installed is left out.
_MODULES = (
    *('torch._dynamo', 'torch.distributed.fsdp', 'matplotlib.pyplot', 'tqdm'),
    *('mmengine.runner', 'mmengine._strategy', 'mmengine.visualization'),
    *('mmengine.infer', 'yapf.yapflib.yapf_api', 'cv2'),
    *('mmvssm.engine', 'mmvssm.datasets', 'mmvssm.analysis'),
    *('mmseg.apis', 'mmseg.datasets', 'mmseg.evaluation', 'mmseg.models'),
    *('mmdet.apis', 'mmdet.datasets', 'mmdet.evaluation', 'mmdet.models'),
    *('mmpretrain.apis', 'mmpretrain.datasets', 'mmpretrain.engine'),
)
_RUNNERS = (
    'mmengine._strategy.base',
    'mmengine.runner.runner',
    'yapf.yapflib.yapf_api',
)
# Who reads them does so when it starts or is imported.
_READ_AT_START = ('PYTHON', 'LD_', 'MALLOC_')


def run(command, *, cwd=None, env=None, timeout=None, merge=False):
    """Run Python, as ``subprocess.run`` would with its output captured as text.

    Args:
        command: What follows ``python`` on a command line: a script, or ``-c`` and
            code, or ``-m`` and a module; then arguments.
        cwd: The folder it runs in.
        env: All environment variables, by default those of this process.
        timeout: Seconds after which it is killed, with all that it started.
        merge: Whether what goes to stderr shall be in ``stdout``, in its order.
    """
    with tempfile.TemporaryDirectory() as folder:
        out, err = (Path(folder, name) for name in ('out', 'err'))
        process = start(command, out, out if merge else err, cwd=cwd, env=env)
        try:
            code = process.wait(timeout)
        except BaseException:
            kill(process)
            raise
        texts = out.read_text(), None if merge else err.read_text()
    return subprocess.CompletedProcess(command, code, *texts)


def start(command, stdout, stderr, *, cwd=None, env=None):
    """Start Python and do not wait for it.

    Its output goes to files, which may be the same one. Returns an object with
    ``pid``, which is that of its process group, too, and ``wait(timeout)``, both like
    those of ``subprocess.Popen``.
    """
    global _server
    env = dict(os.environ if env is None else env)
    command = [str(word) for word in command]
    paths = [os.path.abspath(path) for path in (stdout, stderr)]
    if not _may_fork(env):
        with open(paths[0], 'wb') as out, open(paths[1], 'ab') as err:
            return subprocess.Popen(
                [sys.executable, *command],
                cwd=cwd,
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT if paths[0] == paths[1] else err,
                start_new_session=True,
            )
    if _server is None:
        _server = _Server()
    order = dict(command=command, cwd=str(cwd or os.getcwd()), env=env, output=paths)
    return _Forked(_server, _server.ask(order))


def kill(process):
    """End a process that was started here, and all that it started."""
    if process.returncode is None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _may_fork(env):
    import torch

    if sys.platform != 'linux':
        return False
    if torch.cuda.is_available() and env.get('CUDA_VISIBLE_DEVICES') != '':
        return False
    return not any(
        env.get(name) != os.environ.get(name)
        for name in {*env, *os.environ} - {'PYTHONPATH'}
        if name.startswith(_READ_AT_START)
    )


class _Forked:
    """A fork of the server."""

    def __init__(self, server, pid):
        self.server, self.pid, self.returncode = server, pid, None
        self.asked = False

    def wait(self, timeout=None):
        if self.returncode is None:
            if not self.asked:
                self.server.send(dict(wait=self.pid))
                self.asked = True
            self.returncode = self.server.receive(timeout)
        return self.returncode


class _Server:
    """The process that all others are forks of."""

    def __init__(self):
        self.log = tempfile.TemporaryFile('w+')  # noqa: SIM115  for all its life
        # Hidden from it, a GPU cannot be touched before a fork.
        env = {**os.environ, 'OMP_NUM_THREADS': '1', 'CUDA_VISIBLE_DEVICES': ''}
        env['MPLBACKEND'] = 'Agg'
        self.paths = env.pop('PYTHONPATH', '')
        self.process = subprocess.Popen(
            [sys.executable, __file__, self.paths],
            env=env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            bufsize=0,
        )
        atexit.register(self.stop)

    def ask(self, order):
        self.send(order)
        return self.receive()

    def send(self, order):
        self.process.stdin.write(json.dumps(order).encode() + b'\n')

    def receive(self, timeout=None):
        answers = self.process.stdout
        if not select.select([answers], [], [], timeout)[0]:
            raise subprocess.TimeoutExpired('a fork', timeout)
        line = answers.readline()
        if not line:
            self.log.seek(0)
            raise RuntimeError(f'no more processes: {self.log.read()}')
        return int(line)

    def stop(self):
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait()


_server = None


def hurry_runners(set_attribute):
    """Do without what mmengine does for every log and takes longest.

    It asks compilers for their versions, and lays the config's text out nicely.

    Args:
        set_attribute: ``setattr``, or that of a ``pytest.MonkeyPatch``.
    """
    base, runner, yapf = map(importlib.import_module, _RUNNERS)
    known = runner.collect_env()
    for module in (base, runner):
        set_attribute(module, 'collect_env', known.copy)
    set_attribute(yapf, 'FormatCode', lambda text, **options: (text, True))


# What follows runs in the server and in its forks.


def _import_all():
    for name in _MODULES:
        with suppress(ImportError):
            importlib.import_module(name)
    hurry_runners(setattr)
    # A fork of a process with threads may wait for one that it does not have.
    threads = os.listdir('/proc/self/task')
    assert len(threads) == 1, f'there are {len(threads)} threads'
    # Forks need not look through what they share.
    gc.collect()
    gc.freeze()


def _serve(requests, answers):
    """Answer every request; returns in forks only, what they are to run."""
    running = set()
    for line in requests:
        order = json.loads(line)
        if 'wait' in order:
            pid = order['wait']
            answer = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            running.discard(pid)
        else:
            answer = os.fork()
            if not answer:
                requests.close()
                os.close(answers)
                return order
            with suppress(OSError):  # The fork was faster.
                os.setpgid(answer, answer)
            running.add(answer)
        os.write(answers, b'%d\n' % answer)
    for pid in running:
        with suppress(OSError):
            os.killpg(pid, signal.SIGKILL)
    os._exit(0)


def _prepare(order, paths):
    """Make a fork what a new process would be."""
    import numpy
    import torch

    os.setpgid(0, 0)
    os.chdir(order['cwd'])
    os.environ.clear()
    os.environ.update(order['env'])
    out, err = order['output']
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND
    files = [os.open(os.devnull, os.O_RDONLY), os.open(out, flags)]
    files.append(files[1] if err == out else os.open(err, flags))
    for number, file in enumerate(files):
        os.dup2(file, number)
    for file in {*files}:
        os.close(file)
    threads = os.environ.get('OMP_NUM_THREADS') or len(os.sched_getaffinity(0))
    torch.set_num_threads(int(threads))
    # Or all forks would draw the same numbers. Python does so itself.
    numpy.random.seed()
    more = filter(None, os.environ.get('PYTHONPATH', '').split(os.pathsep))
    sys.path[:] = ['', *map(os.path.abspath, more), *paths]
    importlib.invalidate_caches()


def _run(words):
    """Run what a command line names."""
    first, *words = words
    if first == '-m':
        import runpy

        sys.argv, sys.path[0] = words, os.getcwd()
        runpy.run_module(words[0], run_name='__main__', alter_sys=True)
        return
    main = types.ModuleType('__main__')
    if first == '-c':
        code, *words = words
        sys.argv, name = ['-c', *words], '<string>'
    else:
        name = main.__file__ = os.path.abspath(first)
        sys.argv = [first, *words]
        sys.path[0] = os.path.dirname(os.path.realpath(first))
        code = Path(name).read_bytes()
    sys.modules['__main__'] = main
    exec(compile(code, name, 'exec'), main.__dict__)


def _end(error=None):
    """End as Python does, but leave to the system what takes longest: the memory."""
    code = 0 if error is None else 1
    if isinstance(error, SystemExit):
        code = 0 if error.code is None else error.code
        if not isinstance(code, int):
            print(code, file=sys.stderr)
            code = 1
    elif error is not None:
        # Without the frames of this file.
        trace = error.__traceback__
        while trace and trace.tb_frame.f_code.co_filename == __file__:
            trace = trace.tb_next
        sys.excepthook(type(error), error, trace)
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    ctypes.CDLL(None).fflush(None)
    if isinstance(error, KeyboardInterrupt):
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.raise_signal(signal.SIGINT)
    os._exit(code & 0xFF)


def _main():
    requests, answers = os.fdopen(os.dup(0)), os.dup(1)
    os.dup2(2, 1)  # What packages print when they are imported is no answer.
    paths = sys.path[1:]
    sys.path[:1] = [str(_REPO), *filter(None, sys.argv[1].split(os.pathsep))]
    _import_all()
    order = _serve(requests, answers)
    try:
        _prepare(order, paths)
        _run(order['command'])
    except BaseException as error:
        _end(error)
    _end()


if __name__ == '__main__':
    _main()
