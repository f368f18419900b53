"""What the other checks run on."""

import platform
import shutil
import subprocess
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import mythos
from mythos.gpu_check.result import Result, Setting, judged, not_run

OLDEST_SM = (8, 0)
TORCH = ((2, 11), (2, 14))
"""Oldest and newest that is tested."""
PYTHON = ((3, 11), (3, 13))
OLDEST_CUDNN = 91500
"""torch prefers cuDNN's attention on SM90 and SM100 from 9.15 on."""


def gpus(setting: Setting) -> Iterator[Result]:
    """Names, multiprocessors, memory and power limits."""
    if not setting.cuda:
        yield _no_gpu()
        return
    told, oldest = [], (99, 0)
    limits = nvidia_smi("power.limit").splitlines()
    for index in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(index)
        oldest = min(oldest, (found.major, found.minor))
        power = f", {limits[index].strip()}" if index < len(limits) else ""
        told.append(
            f"{found.name}, SM{found.major}{found.minor}, {found.multi_processor_count} multiprocessors, "
            f"{found.total_memory / 2**30:.1f} GiB{power}"
        )
    same = f"{len(told)} x {told[0]}" if len(set(told)) == 1 else "; ".join(told)
    yield judged(oldest >= OLDEST_SM, same)


def _no_gpu() -> Result:
    """Why there is none, where a driver says that there should be one."""
    names = nvidia_smi("name").replace("\n", ", ")
    if not names:
        return not_run("no GPU: every check runs on the CPU at tiny size")
    reason = "torch is built without CUDA"
    if torch.version.cuda:
        try:
            torch.cuda.init()
            reason = "torch finds no device"
        except RuntimeError as error:
            reason = str(error)
    return judged(False, f"nvidia-smi finds {names}, but torch {torch.__version__} cannot use it: {reason}")


def versions(setting: Setting) -> Iterator[Result]:
    """Versions of everything below mythos."""
    release = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    yield judged(TORCH[0] <= release <= TORCH[1], torch.__version__)

    if setting.cuda:
        cudnn = torch.backends.cudnn.version() or 0
        nccl = ".".join(map(str, torch.cuda.nccl.version())) if torch.distributed.is_nccl_available() else "none"
        driver = nvidia_smi("driver_version").partition("\n")[0] or "unknown (no nvidia-smi)"
        found = f"CUDA {torch.version.cuda}, cuDNN {cudnn}, NCCL {nccl}, driver {driver}"
        yield judged(cudnn >= OLDEST_CUDNN and nccl != "none", found)
    else:
        yield not_run(f"no GPU; torch is built for CUDA {torch.version.cuda or 'none'}")

    triton, compiler = package("triton"), shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    found = f"Triton {triton or 'missing'}, C compiler {compiler or 'missing'}"
    yield judged(bool(triton and compiler), found) if setting.cuda else not_run(f"no GPU; {found}")

    python = tuple(map(int, platform.python_version_tuple()[:2]))
    yield judged(
        PYTHON[0] <= python <= PYTHON[1],
        f"Python {platform.python_version()}, mythos {mythos.__version__}{commit()}, transformers "
        f"{package('transformers') or 'missing'}, {platform.platform()}, {torch.get_num_threads()} threads",
    )


def package(name: str) -> str:
    """An installed package's version; empty if it is missing."""
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def commit() -> str:
    """The checkout's commit, in brackets; empty where there is none."""
    folder = Path(mythos.__file__).parents[1]
    found = output(["git", "-C", str(folder), "describe", "--always", "--dirty"]) if (folder / ".git").exists() else ""
    return f" ({found})" if found else ""


def nvidia_smi(field: str) -> str:
    """A field of every GPU, a line each; empty where there is no nvidia-smi."""
    return output(["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader"])


def output(command: list[str]) -> str:
    """What a program prints; empty where it is missing, fails or does not end."""
    try:
        ran = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return ran.stdout.strip() if ran.returncode == 0 else ""
