"""Python programs that start in a tenth of a second: forks of a process that has imported torch and mythos.

A usual start takes three seconds of CPU time, nearly all of it for imports, and the end half a second. Tests whose
subject is neither use `WarmPopen` as they would use `subprocess.Popen`. The server is started at the first use, or for
all pytest processes together.
"""

import atexit
import contextlib
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
import secrets
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
SERVER, CHILDREN = "MYTHOS_TESTS_SERVER", "MYTHOS_TESTS_WARM_CHILDREN"
"""Environment variables: the name of the server's socket; set if a warm program starts its programs warm, too."""
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
        server = _server()
        request = {
            "arguments": [str(word) for word in words[1:]],
            "cwd": str(given["cwd"] or os.getcwd()),
            "env": dict(os.environ if given["env"] is None else given["env"]) | {SERVER: os.environ[SERVER]},
            "session": bool(given["start_new_session"]),
        }
        self.status, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        files = [
            own if passed == -1 else passed
            for own, passed in enumerate(given[name] for name in ("p2cread", "c2pwrite", "errwrite"))
        ]
        with theirs:
            socket.send_fds(server, [json.dumps(request).encode()], [*files, theirs.fileno()])
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
    """A connection to the server, which is started unless the environment names one."""
    start_server()
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    connection.connect("\0" + os.environ[SERVER])
    return connection


def start_server() -> None:
    """Start the server, which ends with this process, unless the environment names one."""
    if SERVER in os.environ:
        return
    name = f"mythos-tests-{os.getpid()}-{secrets.token_hex(8)}"
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind("\0" + name)
    listener.listen()
    ours, theirs = socket.socketpair()
    numbers = [listener.fileno(), theirs.fileno()]
    command = [sys.executable, "-m", "tests.warm", *map(str, numbers)]
    process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.DEVNULL, pass_fds=numbers, start_new_session=True)
    listener.close()
    theirs.close()

    def end() -> None:
        ours.close()
        process.wait()

    atexit.register(end)
    os.environ[SERVER] = name


def serve(listener: socket.socket, owner: socket.socket) -> dict[str, Any] | None:
    """Fork for every request. Returns the request in the fork, and None in the server when its owner has ended."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    selector = selectors.DefaultSelector()
    selector.register(listener, selectors.EVENT_READ)
    selector.register(owner, selectors.EVENT_READ)
    running: dict[int, tuple[int, socket.socket]] = {}  # process and whom to tell its status, by the pidfd
    while True:
        for key, _ in selector.select():
            if key.fd in running:
                pid, status = running.pop(key.fd)
                with contextlib.suppress(OSError):  # nobody may be left who wants to know
                    status.send(str(os.waitpid(pid, 0)[1]).encode())
                status.close()
                selector.unregister(key.fd)
                os.close(key.fd)
            elif key.fileobj is owner:
                return None
            elif key.fileobj is listener:
                selector.register(listener.accept()[0], selectors.EVENT_READ)
            else:
                content, files, _, _ = socket.recv_fds(key.fileobj, MOST_BYTES, 4)
                if not content:
                    selector.unregister(key.fileobj)
                    key.fileobj.close()
                    continue
                status = socket.socket(fileno=files[3])
                pid = os.fork()
                if pid == 0:
                    for number in [*selector.get_map()]:
                        os.close(number)
                    selector.close()
                    return _forked(json.loads(content), files[:3], status)
                for file in files[:3]:
                    os.close(file)
                end = os.pidfd_open(pid)
                running[end] = pid, status
                selector.register(end, selectors.EVENT_READ)


def _forked(request: dict[str, Any], files: list[int], status: socket.socket) -> dict[str, Any]:
    """Take the request's session and standard streams; returns the request."""
    if request["session"]:
        os.setsid()
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    status.send(str(os.getpid()).encode())
    status.close()
    return request


def reopen_streams(encoding: str | None) -> None:
    """Replace the server's standard streams, which learned what they are (a terminal, a file) when they were made."""
    sys.stdin = open(0, encoding=encoding, closefd=False)  # noqa: SIM115
    sys.stdout = open(1, "w", buffering=1 if os.isatty(1) else -1, encoding=encoding, closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, encoding=encoding, errors="backslashreplace", closefd=False)  # noqa: SIM115
    sys.__stdin__, sys.__stdout__, sys.__stderr__ = sys.stdin, sys.stdout, sys.stderr


def forget_hub(before: Mapping[str, str], after: Mapping[str, str]) -> None:
    """Let the hub's libraries be imported again if their settings change, which they read when they are imported.

    So are the classes that derive from theirs, in `mythos.hf`.
    """
    if any(before.get(name) != after.get(name) for name in before.keys() | after.keys() if name.startswith("HF_")):
        for name in list(sys.modules):
            if name.partition(".")[0] in ("huggingface_hub", "transformers") or f"{name}.".startswith("mythos.hf."):
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
    if CHILDREN in os.environ:
        subprocess.Popen = WarmPopen
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
    request = serve(*(socket.socket(fileno=int(number)) for number in sys.argv[1:3]))
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
