"""Hardware and versions."""

import platform
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import torch

import mythos
from mythos.gpu_check.result import Result, Setting, judged, not_run
from mythos.versions import installed_versions

OLDEST_SM = (8, 0)
TORCH = ((2, 11), (2, 14))
"""Oldest and newest tested version."""
PYTHON = ((3, 11), (3, 13))
OLDEST_CUDNN = 91500
"""From 9.15 on torch prefers cuDNN's attention on SM90 and SM100."""


def gpus(setting: Setting) -> Iterator[Result]:
    """Report names, multiprocessors, memory and power limits."""
    if not setting.cuda:
        yield _no_gpu()
        return
    descriptions, oldest = [], (99, 0)
    limits = nvidia_smi("power.limit").splitlines()
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        oldest = min(oldest, (gpu.major, gpu.minor))
        power = f", {limits[index].strip()}" if index < len(limits) else ""
        descriptions.append(
            f"{gpu.name}, SM{gpu.major}{gpu.minor}, {gpu.multi_processor_count} multiprocessors, "
            f"{gpu.total_memory / 2**30:.1f} GiB{power}"
        )
    alike = len(set(descriptions)) == 1
    text = f"{len(descriptions)} x {descriptions[0]}" if alike else "; ".join(descriptions)
    yield judged(oldest >= OLDEST_SM, text)


def _no_gpu() -> Result:
    """Not run without a GPU; off, with the reason, if the driver lists a GPU that torch cannot use."""
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
    """Report versions of torch, CUDA, Triton and Python."""
    release = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    yield judged(TORCH[0] <= release <= TORCH[1], torch.__version__)

    if setting.cuda:
        cudnn = torch.backends.cudnn.version() or 0
        nccl = ".".join(map(str, torch.cuda.nccl.version())) if torch.distributed.is_nccl_available() else "none"
        driver = nvidia_smi("driver_version").partition("\n")[0] or "unknown (no nvidia-smi)"
        nvidia = f"CUDA {torch.version.cuda}, cuDNN {cudnn}, NCCL {nccl}, driver {driver}"
        yield judged(cudnn >= OLDEST_CUDNN and nccl != "none", nvidia)
    else:
        yield not_run(f"no GPU; torch is built for CUDA {torch.version.cuda or 'none'}")

    installed = installed_versions(("triton", "transformers"))
    triton, compiler = installed.get("triton"), shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    compilers = f"Triton {triton or 'missing'}, C compiler {compiler or 'missing'}"
    yield judged(bool(triton and compiler), compilers) if setting.cuda else not_run(f"no GPU; {compilers}")

    python = tuple(map(int, platform.python_version_tuple()[:2]))
    yield judged(
        PYTHON[0] <= python <= PYTHON[1],
        f"Python {platform.python_version()}, mythos {mythos.__version__}{commit()}, transformers "
        f"{installed.get('transformers', 'missing')}, {platform.platform()}, {torch.get_num_threads()} threads",
    )


def commit() -> str:
    """The checkout's commit in brackets; empty outside a checkout."""
    folder = Path(mythos.__file__).parents[1]
    name = output(["git", "-C", str(folder), "describe", "--always", "--dirty"]) if (folder / ".git").exists() else ""
    return f" ({name})" if name else ""


def nvidia_smi(field: str) -> str:
    """A field of every GPU, one line each; empty without nvidia-smi."""
    return output(["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader"])


def output(command: list[str]) -> str:
    """The output of a program; empty if it is missing, fails or takes more than 20 s."""
    try:
        finished = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return finished.stdout.strip() if finished.returncode == 0 else ""
