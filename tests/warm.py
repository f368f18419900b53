"""Python programs that start in a tenth of a second: forks of a process that has imported torch and mythos.

A usual start takes three seconds of CPU time, nearly all of it for imports, and the end half a second. Tests whose
subject is neither use `WarmPopen` as they would use `subprocess.Popen`. The server is started at the first use, one for
each pytest process.
"""

import atexit
import faulthandler
import fcntl
import importlib
import inspect
import io
import json
import multiprocessing.context
import multiprocessing.forkserver
import os
import random
import runpy
import selectors
import signal
import socket
import subprocess
import sys
import termios
import threading
import traceback
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PRELOADED = ("mythos.trainer", "mythos.cli.tokenize", "tests.first_use")
EXECUTE_CHILD = tuple(inspect.signature(subprocess.Popen._execute_child).parameters)[1:]
PIPES = ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")
MOST_BYTES = 2**17
"""Size of a request, most of which is the environment."""


def forkserver() -> multiprocessing.context.ForkServerContext:
    """A context whose processes are forked from one that has done nothing but import, which takes seconds.

    It runs when this returns, with the signals of this process: multiprocessing starts one for all its contexts.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*PRELOADED])
    multiprocessing.forkserver.ensure_running()
    return context


class WarmPopen(subprocess.Popen):
    """`subprocess.Popen`, warm for [sys.executable, ...] with -m MODULE, -c TEXT or a script.

    Other programs start as usual, as do all where there is no Linux.

    Settings that Python and libraries read when they are started or imported are those of the tests, not of `env`. A
    new session takes a terminal that is its standard input.
    """

    status: socket.socket | None = None
    """Tells a warm process's number, and then its exit status."""

    def _execute_child(self, *arguments: Any) -> None:
        given = dict(zip(EXECUTE_CHILD, arguments, strict=True))
        words = given["args"]
        usual = isinstance(words, str) or words[0] != sys.executable or given["preexec_fn"] or given["pass_fds"]
        if usual or sys.platform != "linux":
            super()._execute_child(*arguments)
            return
        request = {
            "arguments": [str(word) for word in words[1:]],
            "cwd": str(given["cwd"] or os.getcwd()),
            "env": dict(os.environ if given["env"] is None else given["env"]),
            "session": bool(given["start_new_session"]),
        }
        self.status, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        files = [
            own if passed == -1 else passed
            for own, passed in enumerate(given[name] for name in ("p2cread", "c2pwrite", "errwrite"))
        ]
        with theirs:
            socket.send_fds(_server(), [json.dumps(request).encode()], [*files, theirs.fileno()])
        self._close_pipe_fds(*(given[name] for name in PIPES))
        self.pid = int(self.status.recv(64))
        self._child_created = True

    def _try_wait(self, wait_flags: int) -> tuple[int, int]:
        """As os.waitpid, of a process that is the server's child."""
        if self.status is None:
            return super()._try_wait(wait_flags)
        self.status.setblocking(not wait_flags & os.WNOHANG)
        try:
            status = self.status.recv(64)
        except BlockingIOError:
            return 0, 0
        assert status, "the server of warm processes has ended"
        self.status.close()
        return self.pid, int(status)

    def _internal_poll(self, *arguments: Any, **options: Any) -> int | None:
        if self.status is None:
            return super()._internal_poll(*arguments, **options)
        if self.returncode is None and self._waitpid_lock.acquire(False):
            try:
                if self.returncode is None:
                    pid, status = self._try_wait(os.WNOHANG)
                    if pid:
                        self._handle_exitstatus(status)
            finally:
                self._waitpid_lock.release()
        return self.returncode


@cache
def _server() -> socket.socket:
    """A connection to the server."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    command = [sys.executable, "-m", "tests.warm", str(theirs.fileno())]
    process = subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()], start_new_session=True
    )
    theirs.close()

    def end() -> None:
        ours.close()
        process.wait()

    atexit.register(end)
    return ours


def serve(connection: socket.socket) -> dict[str, Any] | None:
    """Fork for every request. Returns the request in the fork, and None in the server when the tests have ended."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with selectors.DefaultSelector() as selector:
        selector.register(connection, selectors.EVENT_READ)
        while True:
            for key, _ in selector.select():
                if key.data is not None:
                    pid, status = key.data
                    status.send(str(os.waitpid(pid, 0)[1]).encode())
                    status.close()
                    selector.unregister(key.fd)
                    os.close(key.fd)
                    continue
                content, files, _, _ = socket.recv_fds(connection, MOST_BYTES, 4)
                if not content:
                    return None
                status = socket.socket(fileno=files[3])
                pid = os.fork()
                if pid == 0:
                    connection.close()
                    request = json.loads(content)
                    if request["session"]:
                        os.setsid()
                    for number, file in enumerate(files[:3]):
                        os.dup2(file, number)
                        os.close(file)
                    status.send(str(os.getpid()).encode())
                    status.close()
                    return request
                for file in files[:3]:
                    os.close(file)
                selector.register(os.pidfd_open(pid), selectors.EVENT_READ, (pid, status))


def reopen_streams(encoding: str | None) -> None:
    """Replace the server's standard streams, which learned what they are (a terminal, a file) when they were made."""
    sys.stdin = open(0, encoding=encoding, closefd=False)  # noqa: SIM115
    sys.stdout = open(1, "w", buffering=1 if os.isatty(1) else -1, encoding=encoding, closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, encoding=encoding, errors="backslashreplace", closefd=False)  # noqa: SIM115
    sys.__stdin__, sys.__stdout__, sys.__stderr__ = sys.stdin, sys.stdout, sys.stderr


def forget_hub(before: Mapping[str, str], after: Mapping[str, str]) -> None:
    """Let the hub's libraries be imported again if their settings change, which they read when they are imported."""
    if any(before.get(name) != after.get(name) for name in before.keys() | after.keys() if name.startswith("HF_")):
        for name in [name for name in sys.modules if name.partition(".")[0] in ("huggingface_hub", "transformers")]:
            del sys.modules[name]


def become(request: dict[str, Any]) -> None:
    """Run the requested program in this process."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if os.isatty(0) and request["session"]:
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # Ctrl-C then sends SIGINT
    reopen_streams(request["env"].get("PYTHONIOENCODING"))
    if "PYTHONFAULTHANDLER" in request["env"]:
        faulthandler.enable()
    os.chdir(request["cwd"])
    forget_hub(os.environ, request["env"])
    os.environ.clear()
    os.environ.update(request["env"])
    random.seed()
    words = request["arguments"]
    if words[0] == "-u":
        sys.stdout = io.TextIOWrapper(open(1, "wb", buffering=0, closefd=False), write_through=True)  # noqa: SIM115
        words = words[1:]
    sys.path[:1] = [request["cwd"], *filter(None, request["env"].get("PYTHONPATH", "").split(os.pathsep))]
    if words[0] == "-m":
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    elif words[0] == "-c":
        sys.argv = ["-c", *words[2:]]
        exec(compile(words[1], "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv = words
        sys.path[0] = str(Path(words[0]).resolve().parent)
        runpy.run_path(words[0], run_name="__main__")


def end(status: int) -> None:
    """End as Python does, but leave the memory to the system: freeing a million objects takes half a second.

    If output cannot be written, Python ends by itself, and says so.
    """
    threading._shutdown()
    atexit._run_exitfuncs()
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except (OSError, ValueError):  # it cannot be written, or is closed
        sys.exit(status)
    os._exit(status & 255)


if __name__ == "__main__":
    for name in PRELOADED:
        importlib.import_module(name)
    request = serve(socket.socket(fileno=int(sys.argv[1])))
    if request is not None:
        try:
            become(request)
            end(0)
        except SystemExit as leave:
            if leave.code is not None and not isinstance(leave.code, int):
                raise
            end(leave.code or 0)
        except KeyboardInterrupt:  # Python ends by the signal
            traceback.print_exc()
            sys.stdout.flush()
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)
