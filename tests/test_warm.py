"""Warm processes behave as those of subprocess.Popen."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tests.warm import CHILDREN, WarmPopen

PROGRAM = """
import os, sys
print(sys.argv, os.getcwd(), os.environ.get("WORD"), "torch" in sys.modules, os.getsid(0) == os.getpid(), flush=True)
text = sys.stdin.read()
print(text.upper())
print("said", file=sys.stderr)
sys.exit(3)
"""


@pytest.mark.parametrize("popen", [subprocess.Popen, WarmPopen])
def test_a_program_has_its_arguments_streams_and_status(popen: type[subprocess.Popen[str]], tmp_path: Path) -> None:
    process = popen(
        [sys.executable, "-c", PROGRAM, "one", "two"],
        cwd=tmp_path,
        env={**os.environ, "WORD": "here"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.poll() is None
    out, errors = process.communicate("read\n", timeout=60)
    warm = popen is WarmPopen
    assert out == f"['-c', 'one', 'two'] {tmp_path} here {warm} True\nREAD\n\n" and errors == "said\n"
    assert process.returncode == process.wait() == 3


@pytest.mark.parametrize("popen", [subprocess.Popen, WarmPopen])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_script(popen: type[subprocess.Popen[str]], number: signal.Signals, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("import time; print(__name__, __file__, flush=True); time.sleep(60)")
    process = popen([sys.executable, str(script)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout and process.stdout.readline() == f"__main__ {script}\n"
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == -number
    assert ("KeyboardInterrupt" in errors) == (number is signal.SIGINT)


def test_output_is_unbuffered_if_asked() -> None:
    command = [sys.executable, "-u", "-c", "import time; print('here'); time.sleep(60)"]
    process = WarmPopen(command, stdout=subprocess.PIPE, text=True)
    watch = threading.Timer(20, process.kill)
    watch.start()
    assert process.stdout and process.stdout.readline() == "here\n"
    watch.cancel()
    process.kill()
    process.communicate()


def test_a_module_is_run() -> None:
    process = WarmPopen([sys.executable, "-m", "mythos", "--version"], stdout=subprocess.PIPE, text=True)
    assert process.communicate(timeout=60)[0].startswith("mythos ")
    assert process.returncode == 0


def test_other_programs_start_as_usual() -> None:
    for command, options in ((["sh", "-c", "exit 3"], {}), ([sys.executable, "-c", "exit(3)"], {"preexec_fn": int})):
        process = WarmPopen(command, **options)
        assert process.wait(60) == 3 and process.poll() == 3


@pytest.mark.parametrize(
    ("program", "status", "said"),
    [
        ("import sys; sys.exit('reason')", 1, "reason\n"),
        ("raise ValueError(7)", 1, "ValueError: 7\n"),
        ("import sys; sys.exit(258)", 2, ""),
        ("import atexit; atexit.register(print, 'handler', flush=True); raise SystemExit", 0, "handler\n"),
        (
            "import threading, time\ndef f():\n time.sleep(0.2); print('thread')\nthreading.Thread(target=f).start()",
            0,
            "thread\n",
        ),
        ("import sys; print('x' * 10); sys.stdout.close()", 0, "xxxxxxxxxx\n"),
    ],
)
@pytest.mark.parametrize("popen", [subprocess.Popen, WarmPopen])
def test_a_program_ends(popen: type[subprocess.Popen[str]], program: str, status: int, said: str) -> None:
    process = popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.communicate(timeout=60)[0].endswith(said)
    assert process.returncode == status


@pytest.mark.parametrize("popen", [subprocess.Popen, WarmPopen])
def test_output_that_cannot_be_written_is_reported(popen: type[subprocess.Popen[str]]) -> None:
    with open("/dev/full", "w") as full:
        process = popen([sys.executable, "-c", "print('x')"], stdout=full, stderr=subprocess.PIPE, text=True)
        assert "No space left" in process.communicate(timeout=60)[1]
    assert process.returncode


def test_a_program_sees_its_own_settings_of_the_hub() -> None:
    program = "from huggingface_hub import constants; print(constants.ENDPOINT)"
    for endpoint in ("http://one", "http://other"):
        process = WarmPopen(
            [sys.executable, "-c", program],
            env=os.environ | {"HF_ENDPOINT": endpoint},
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.communicate(timeout=60)[0] == f"{endpoint}\n"


def test_classes_derive_from_those_of_the_hubs_libraries_that_are_imported_again() -> None:
    """lm-evaluation-harness sets a variable of the hub when it is imported."""
    program = """from transformers import PreTrainedConfig
from mythos.hf import MythosConfig
print(issubclass(MythosConfig, PreTrainedConfig))"""
    process = WarmPopen(
        [sys.executable, "-c", program],
        env=os.environ | {"HF_XET_HIGH_PERFORMANCE": "another"},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.communicate(timeout=60)[0] == "True\n"


def test_a_warm_program_starts_others_warm_if_asked() -> None:
    program = """import subprocess, sys
inner = "import sys; print('torch' in sys.modules)"
print(subprocess.run([sys.executable, "-c", inner], capture_output=True, text=True).stdout, end="")"""
    for environment, expected in ({}, "False\n"), ({CHILDREN: "1"}, "True\n"):
        process = WarmPopen(
            [sys.executable, "-c", program], env=os.environ | environment, stdout=subprocess.PIPE, text=True
        )
        assert process.communicate(timeout=60)[0] == expected
