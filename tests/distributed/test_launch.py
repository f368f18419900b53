"""launch.sh and scripts/slurm.sbatch: what they start, what they say, and one real run."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from mythos.distributed.run_lock import RunLock
from tests.distributed.pool import free_port
from tests.runs import write_settings

ROOT = Path(__file__).resolve().parents[2]
CONFIG = str(ROOT / "configs" / "debug.yaml")

STAND_IN = f"""#!{sys.executable}
import json, os, sys
if sys.argv[1] == "-c":  # the check of the configuration
    os.execv({sys.executable!r}, [{sys.executable!r}, *sys.argv[1:]]) if "CHECK" in os.environ else sys.exit()
names = (
    "OMP_NUM_THREADS", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "MYTHOS_STATUS_FILE", "PYTORCH_ALLOC_CONF",
    "PYTORCH_CUDA_ALLOC_CONF",
)
with open(os.environ["RECORD"], "w") as file:
    json.dump({{"arguments": sys.argv[1:], "environment": {{name: os.environ.get(name) for name in names}}}}, file)
if "ERROR" in os.environ:
    with open(os.environ["MYTHOS_STATUS_FILE"], "w") as file:
        file.write(os.environ["ERROR"])
sys.exit(int(os.environ.get("STATUS", "0")))
"""


class Launch:
    """Runs launch.sh with an interpreter that writes down what torchrun would have been given."""

    def __init__(self, directory: Path) -> None:
        self.bin = directory / "bin"
        self.bin.mkdir()
        self.record = directory / "record.json"
        self.program("python", STAND_IN)
        self.program("nvidia-smi", "#!/bin/sh\nexit 9\n")
        self.directory = directory

    def program(self, name: str, text: str) -> None:
        path = self.bin / name
        path.write_text(text)
        path.chmod(0o755)

    def __call__(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        own = {"PATH": f"{self.bin}:/usr/bin:/bin", "HOME": str(self.directory), "TMPDIR": str(self.directory)}
        own |= {"RECORD": str(self.record)} | environment
        command = [str(ROOT / "launch.sh"), *arguments]
        return subprocess.run(command, env=own, cwd=self.directory, capture_output=True, text=True, timeout=60)

    def started(self, *arguments: str, **environment: str) -> tuple[dict[str, str | None], list[str], dict[str, str]]:
        """torchrun's options, what follows the script, and the environment, of a launch that succeeds."""
        result = self(*arguments, **environment)
        assert result.returncode == 0 and re.fullmatch(r"starting\b.*\n", result.stderr)
        record = json.loads(self.record.read_text())
        module, rest = record["arguments"][:2], record["arguments"][2:]
        assert module == ["-m", "torch.distributed.run"]
        script = rest.index(str(ROOT / "train.py"))
        options: dict[str, str | None] = {}
        for word in rest[:script]:
            if word.startswith("--"):
                options[name := word] = None
            else:
                options[name] = word
        return options, rest[script + 1 :], record["environment"]

    def refused(self, *arguments: str, **environment: str) -> str:
        """What is said by a launch that fails before it starts anything."""
        result = self(*arguments, **environment)
        assert (result.returncode, result.stdout) == (1, "")
        assert not self.record.exists()
        return result.stderr


@pytest.fixture
def launch(tmp_path: Path) -> Launch:
    return Launch(tmp_path)


@pytest.fixture
def listening() -> Iterator[int]:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        yield server.getsockname()[1]


# --- one machine


@pytest.mark.parametrize(("devices", "count"), [("0,1,2", 3), ("3", 1), ("GPU-a1,GPU-b2", 2)])
def test_a_process_for_each_visible_gpu(launch, devices, count):
    options, _, _ = launch.started(CONFIG, CUDA_VISIBLE_DEVICES=devices)
    assert options["--nproc-per-node"] == str(count)
    assert "--standalone" in options and "--nnodes" not in options


def test_a_process_for_each_gpu_of_the_machine(launch):
    gpus = "\n".join(f"GPU {n}: NVIDIA H200 (UUID: GPU-{n})\n  MIG 1g.18gb Device 0: (UUID: MIG-{n})" for n in range(4))
    launch.program("nvidia-smi", f"#!/bin/sh\n[ $1 = -L ] && echo '{gpus}'\n")
    assert launch.started(CONFIG)[0]["--nproc-per-node"] == "4"
    assert launch.started("--processes", "3", CONFIG)[0]["--nproc-per-node"] == "3"


@pytest.mark.parametrize("environment", [{}, {"CUDA_VISIBLE_DEVICES": ""}, {"CUDA_VISIBLE_DEVICES": "-1"}])
def test_no_gpu(launch, environment):
    assert "./launch.sh --cpu 2" in launch.refused(CONFIG, **environment)


def test_processes_on_the_cpu(launch):
    options, arguments, environment = launch.started("--cpu", "2", CONFIG, "train.steps=3")
    assert options["--nproc-per-node"] == "2"
    assert arguments == [CONFIG, "train.steps=3", "train.device=cpu"]
    assert environment["OMP_NUM_THREADS"] == str(max(1, len(os.sched_getaffinity(0)) // 2))
    assert launch.started("--cpu", "2", CONFIG, OMP_NUM_THREADS="5")[2]["OMP_NUM_THREADS"] == "5"
    assert launch.started("--cpu", "1000", CONFIG)[2]["OMP_NUM_THREADS"] == "1"


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, {"PYTORCH_ALLOC_CONF": "expandable_segments:True", "PYTORCH_CUDA_ALLOC_CONF": None}),
        (
            {"PYTORCH_ALLOC_CONF": "max_split_size_mb:128"},
            {"PYTORCH_ALLOC_CONF": "max_split_size_mb:128", "PYTORCH_CUDA_ALLOC_CONF": None},
        ),
        ({"PYTORCH_ALLOC_CONF": ""}, {"PYTORCH_ALLOC_CONF": "", "PYTORCH_CUDA_ALLOC_CONF": None}),
        # torch ignores this name where the other one is set.
        (
            {"PYTORCH_CUDA_ALLOC_CONF": "backend:cudaMallocAsync"},
            {"PYTORCH_ALLOC_CONF": None, "PYTORCH_CUDA_ALLOC_CONF": "backend:cudaMallocAsync"},
        ),
    ],
    ids=str,
)
def test_segments_of_gpu_memory_grow_unless_the_allocator_was_configured(launch, settings, expected):
    environment = launch.started("--processes", "2", CONFIG, **settings)[2]
    assert {name: environment[name] for name in expected} == expected


def test_arguments_arrive_as_they_are(launch):
    words = ["run.name=two words", "run.dir=a'b\"c$(touch made)`touch made`*", "--dry-run"]
    _, arguments, _ = launch.started("--cpu", "1", CONFIG, *words)
    assert arguments == [CONFIG, *words, "train.device=cpu"]
    assert not (launch.directory / "made").exists()


def test_options_of_torchrun(launch):
    options, _, environment = launch.started("--cpu", "1", CONFIG)
    assert (options["--max-restarts"], options["--shutdown-timeout"]) == ("3", "600")
    # Signals reach the processes by way of the script; torchrun must not end by those it is not to handle.
    assert options["--signals-to-handle"] == "SIGTERM,SIGQUIT"
    assert environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] == "1"
    options, _, _ = launch.started("--cpu", "1", CONFIG, MAX_RESTARTS="0", SHUTDOWN_TIMEOUT="50")
    assert (options["--max-restarts"], options["--shutdown-timeout"]) == ("0", "50")


def test_a_torchrun_without_an_option_for_the_wait(launch):
    launch.program("python", STAND_IN.replace("else sys.exit()", "else sys.exit(print('fixed'))"))
    options, _, _ = launch.started("--cpu", "1", CONFIG)
    assert "--shutdown-timeout" not in options and options["--signals-to-handle"] == "SIGTERM,SIGQUIT"
    result = launch("--cpu", "1", CONFIG, SHUTDOWN_TIMEOUT="50")
    assert "SHUTDOWN_TIMEOUT is ignored" in result.stderr and "--shutdown-timeout" not in launch.record.read_text()


@pytest.mark.parametrize("known", [True, False])
def test_the_options_of_the_installed_torchrun_are_read(launch, known):
    package = launch.directory / "torch"
    (package / "distributed").mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "distributed" / "run.py").write_text('parser.add_argument("--shutdown-timeout")' if known else "")
    options, _, _ = launch.started("--cpu", "1", CONFIG, CHECK="1", PYTHONPATH=str(launch.directory))
    assert ("--shutdown-timeout" in options) == known


def test_other_interpreter(launch):
    (launch.bin / "python").rename(launch.bin / "mine")
    assert "python: not found" in launch.refused("--cpu", "1", CONFIG)
    assert launch.started("--cpu", "1", CONFIG, PYTHON="mine")[0]["--nproc-per-node"] == "1"


def test_help(launch):
    result = launch("--help")
    assert result.returncode == 0
    for word in ("--cpu N", "--processes N", "NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT", "MAX_RESTARTS"):
        assert word in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no configuration given"),
        (["--cpu", "2"], "no configuration given"),
        (["--cpu", "2", "train.steps=3"], "no configuration given"),
        (["--cpu", CONFIG], f"--cpu: got '{CONFIG}'; allowed: a whole number from 1 on"),
        (["--processes", "0", CONFIG], "--processes: got '0'; allowed: a whole number from 1 on"),
        (["--cpu"], "--cpu: got ''"),
        (["--cpu", "2", "--processes", "2", CONFIG], "not both"),
        (["--cpu", "2", "none.yaml"], "error: none.yaml"),
        (
            ["--gpu", "2", CONFIG],
            "--gpu: not an option of launch.sh, which starts a process on every GPU. --processes 2",
        ),
        (["--dry-run", CONFIG], "--dry-run: not an option of launch.sh"),
    ],
)
def test_bad_command_line(launch, arguments, message):
    assert message in launch.refused(*arguments, CHECK="yes")


def test_unknown_options_of_training_are_reported_once(launch):
    result = launch("--cpu", "2", CONFIG, "--gpu", "2", CHECK="yes")
    assert result.returncode == 2 and not launch.record.exists()
    assert result.stderr.count("unrecognized arguments: --gpu 2") == 1


def test_a_run_directory_is_a_configuration(launch):
    for name in ("run", "empty"):
        (launch.directory / name).mkdir()
    (launch.directory / "run" / "config.yaml").write_text("train: {steps: 7}\n")
    assert "empty: a folder without config.yaml" in launch.refused("--cpu", "2", "empty", CHECK="yes")
    assert launch.started("--cpu", "2", "run", CHECK="yes")[1] == ["run", "train.device=cpu"]


def test_bad_configuration_is_reported_once(launch):
    said = launch.refused("--cpu", "2", CONFIG, "train.stepz=3", "--dry-run", CHECK="yes")
    assert said.count("error: ") == 1 and "did you mean steps" in said and "Traceback" not in said


def test_error_is_printed_below_the_rest(launch):
    result = launch("--cpu", "2", CONFIG, ERROR="error: no such corpus\n", STATUS="7")
    assert (result.returncode, result.stderr) == (7, "starting; processes: 2\nerror: no such corpus\n")
    assert launch("--cpu", "2", CONFIG, ERROR="error: no such corpus\n", STATUS="0").returncode == 1
    status_file = json.loads(launch.record.read_text())["environment"]["MYTHOS_STATUS_FILE"]
    assert not Path(status_file).parent.exists()


# --- several machines


def test_several_machines(launch, listening):
    port = str(free_port())
    meeting = {"NNODES": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    options, _, _ = launch.started("--cpu", "2", CONFIG, NODE_RANK="0", **meeting)
    assert "--standalone" not in options
    assert (options["--nnodes"], options["--rdzv-backend"]) == ("3", "c10d")
    assert options["--rdzv-endpoint"] == f"127.0.0.1:{port}"
    assert options["--rdzv-conf"] == "is_host=1,join_timeout=600"
    meeting["MASTER_PORT"] = str(listening)  # of machine 0, which the others wait for
    options, _, _ = launch.started("--cpu", "2", CONFIG, NODE_RANK="2", JOIN_TIMEOUT="90", **meeting)
    assert options["--rdzv-conf"] == "is_host=0,join_timeout=90"


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"NODE_RANK": "0"}, "NNODES is 2, but MASTER_ADDR is not set"),
        ({"MASTER_ADDR": "127.0.0.1"}, "NNODES is 2, but NODE_RANK is not set"),
        ({"MASTER_ADDR": "127.0.0.1", "NODE_RANK": "2"}, "NODE_RANK: got 2; allowed: 0 to 1"),
        ({"MASTER_ADDR": "127.0.0.1", "NODE_RANK": "one"}, "NODE_RANK: got 'one'"),
        ({"NNODES": "two"}, "NNODES: got 'two'"),
        ({"NNODES": "1", "MAX_RESTARTS": "-1"}, "MAX_RESTARTS: got '-1'"),
    ],
)
def test_bad_meeting(launch, environment, message):
    assert message in launch.refused("--cpu", "1", CONFIG, **{"NNODES": "2", **environment})


def test_port_in_use(launch, listening):
    meeting = {"NNODES": "2", "NODE_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(listening)}
    said = launch.refused("--cpu", "1", CONFIG, **meeting)
    assert f"127.0.0.1:{listening} is in use: set MASTER_PORT" in said


def test_unreachable_machine(launch):
    meeting = {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    said = launch.refused("--cpu", "1", CONFIG, JOIN_TIMEOUT="1", **meeting)
    assert f"machine 1 did not reach machine 0 at 127.0.0.1:{meeting['MASTER_PORT']} in 1 s" in said


def test_slurm(launch, listening):
    launch.program("scontrol", '#!/bin/sh\n[ "$*" = "show hostnames n[7-9]" ] && printf "127.0.0.1\\nn8\\nn9\\n"\n')
    job = {"SLURM_JOB_ID": "81", "SLURM_JOB_NUM_NODES": "3", "SLURM_JOB_NODELIST": "n[7-9]"}
    options, _, _ = launch.started("--cpu", "1", CONFIG, SLURM_NODEID="2", MASTER_PORT=str(listening), **job)
    assert (options["--nnodes"], options["--rdzv-id"]) == ("3", "81")
    assert options["--rdzv-endpoint"] == f"127.0.0.1:{listening}"
    assert options["--rdzv-conf"] == "is_host=0,join_timeout=600"
    # A step on one node of the job is a run on one machine, as is a job of one node; what the user says comes first.
    assert "--standalone" in launch.started("--cpu", "1", CONFIG, SLURM_STEP_NUM_NODES="1", **job)[0]
    assert "--standalone" in launch.started("--cpu", "1", CONFIG, **{**job, "SLURM_JOB_NUM_NODES": "1"})[0]
    assert "--standalone" in launch.started("--cpu", "1", CONFIG, NNODES="1", **job)[0]
    launch.record.unlink()
    assert "start it with srun" in launch.refused("--cpu", "1", CONFIG, **job)
    assert "--ntasks-per-node=1" in launch.refused("--cpu", "1", CONFIG, SLURM_NODEID="0", SLURM_LOCALID="1", **job)


# --- the batch script


@pytest.mark.parametrize(("signalled", "status"), [(True, 0), (False, 0), (False, 3), (True, 3)])
def test_batch_job_continues_after_its_time(tmp_path, signalled, status):
    programs = {
        "srun": f'echo "srun $*"; sleep {0.6 if signalled else 0.1}; exit {status}',
        "scancel": 'echo "scancel $*"',
        "scontrol": 'echo "scontrol $*"',
    }
    for name, body in programs.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_SUBMIT_DIR": str(ROOT), "SLURM_JOB_ID": "81"}
    command = ["bash", str(ROOT / "scripts" / "slurm.sbatch"), "a.yaml", "run.name=two words"]
    job = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        lines = [job.stdout.readline().strip()]
        if signalled:
            job.send_signal(signal.SIGUSR1)
        lines += job.communicate(timeout=10)[0].split("\n")[:-1]
    finally:
        job.kill()
    assert job.returncode == status
    expected = ["srun --kill-on-bad-exit=1 ./launch.sh a.yaml run.name=two words"]
    expected += ["scancel --signal=USR1 81"] if signalled else []
    expected += ["scontrol requeue 81"] if signalled and status == 0 else []
    assert lines == expected


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
@pytest.mark.parametrize("script", ["launch.sh", "scripts/slurm.sbatch"])
def test_shellcheck(script):
    result = subprocess.run(["shellcheck", str(ROOT / script)], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


# --- for real

TRAIN = """
import os, sys, time
from mythos.distributed.stop import StopRequests
from mythos.distributed.ranks import meet_world

attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
with StopRequests(None) as stop:
    world = meet_world("cpu", start_timeout=30, timeout=30)
    ranks, rank = world.ranks, world.rank
    print(f"attempt {attempt} rank {rank} of {ranks.size}: {sys.argv[1:]}\\n", end="", flush=True)
    while not ranks.any(stop.reason is not None)[0]:
        time.sleep(0.05)
        ranks.barrier()
        if attempt == 0 and rank == 1:
            os.kill(os.getpid(), 9)
    print(f"saved by rank {rank}\\n", end="", flush=True)
world.leave()
"""


def test_restart_and_stop(tmp_path, monkeypatch):
    """A killed process brings all back, and a signal to the script ends all with status 0."""
    shutil.copy(ROOT / "launch.sh", tmp_path)
    (tmp_path / "train.py").write_text(TRAIN)
    environment = {name: value for name, value in os.environ.items() if not re.match("SLURM_|NNODES|MASTER_", name)}
    environment |= {"PYTHON": sys.executable, "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)}
    command = ["./launch.sh", "--cpu", "2", CONFIG, "train.steps=3"]
    log = tmp_path / "log"
    with open(log, "w") as file:
        run = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=file, stderr=subprocess.STDOUT)
    try:
        wait_for(lambda: log.read_text().count("attempt 1") == 2, log)
        run.send_signal(signal.SIGTERM)
        wait_for(lambda: run.poll() is not None, log)
        assert run.returncode == 0, log.read_text()
    finally:
        for process in [*psutil.Process(run.pid).children(recursive=True), run] if run.poll() is None else []:
            process.kill()
    said = log.read_text()
    last = said.split("attempt 1")[-1]
    for rank in range(2):
        for attempt in range(2):
            expected = f"attempt {attempt} rank {rank} of 2: {[CONFIG, 'train.steps=3', 'train.device=cpu']}\n"
            assert said.count(expected) == 1
        assert said.count(f"saved by rank {rank}\n") == 1
    assert last.count("SIGTERM: stopping after this step") == 1
    assert "Traceback" not in last


SAVES = """
import sys, time
from mythos.distributed.stop import StopRequests
from mythos.distributed.ranks import meet_world

with StopRequests(None) as stop:
    world = meet_world("cpu", start_timeout=30, timeout=30)
    print("training\\n", end="", flush=True)
    while not world.ranks.any(stop.reason is not None)[0]:
        time.sleep(0.05)
    print("saving\\n", end="", flush=True)
    time.sleep(0 if "run.name=saved" in sys.argv else 60)
print("saved\\n", end="", flush=True)
time.sleep(60)  # as an upload of what a tracker has left
"""


@pytest.mark.parametrize(("word", "status"), [("saved", 0), ("saving", 1)])
def test_second_signal_ends_all_at_once(tmp_path, word, status):
    """With 0 where everything is saved, else with 1 and one message; torchrun prints nothing of its own."""
    shutil.copy(ROOT / "launch.sh", tmp_path)
    (tmp_path / "train.py").write_text(SAVES)
    environment = {name: value for name, value in os.environ.items() if not re.match("SLURM_|NNODES|MASTER_", name)}
    environment |= {"PYTHON": sys.executable, "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)}
    log = tmp_path / "log"
    with open(log, "w") as file:
        command = ["./launch.sh", "--cpu", "2", CONFIG, f"run.name={word}"]
        run = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=file, stderr=subprocess.STDOUT)
    try:
        wait_for(lambda: log.read_text().count("training\n") == 2, log)
        run.send_signal(signal.SIGTERM)
        wait_for(lambda: log.read_text().count(f"{word}\n") == 2, log)
        time.sleep(3.5)  # several signals within three seconds are one request
        run.send_signal(signal.SIGTERM)
        wait_for(lambda: run.poll() is not None, log, limit=20)
    finally:
        for process in [*psutil.Process(run.pid).children(recursive=True), run] if run.poll() is None else []:
            process.kill()
    said = log.read_text()
    assert run.returncode == status, said
    assert "Traceback" not in said and "exitcode" not in said
    errors = ["error: SIGTERM again: stopped at once, without saving the last steps"] if status else []
    assert [line for line in said.splitlines() if line.startswith("error: ")] == errors


def test_locked_run_directory_ends_with_one_message(tmp_path):
    config = write_settings(tmp_path, data__streams=2)
    environment = {name: value for name, value in os.environ.items() if not re.match("SLURM_|NNODES|MASTER_", name)}
    environment |= {"PYTHON": sys.executable, "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)}
    (tmp_path / "run").mkdir()
    with RunLock(tmp_path / "run"):
        command = [str(ROOT / "launch.sh"), "--cpu", "2", str(config)]
        run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert run.returncode == 1, run.stderr
    assert [line for line in run.stderr.splitlines() if "error" in line.lower()] == [
        f"error: {tmp_path / 'run'} is in use by process {os.getpid()} on {socket.gethostname()}, since "
        + re.search(r"since ([-\d]+ [:\d]+)\. ", run.stderr)[1]
        + ". Two jobs would overwrite each other: end that one, or give this run another run.name or run.dir"
    ]
    assert "Traceback" not in run.stderr


def wait_for(condition: Callable[[], Any], log: Path, limit: float = 60) -> None:
    deadline = time.monotonic() + limit
    while not condition():
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.05)
