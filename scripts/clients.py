"""Use a run and its export with other programs as their users do, and compare the results with our own.

python scripts/clients.py [--work DIR]

Trains the debug configuration for ten steps, resumes it for ten more, and exports the model. Then each of these runs
as a command of its own: lm_eval, a transformers pipeline, wandb sync, TensorBoard, and accelerate launch. Needs the
extras test and eval, no network, and about a minute on two cores. Prints a line per client; the exit status is 1 if any
fails.
"""

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]

MINUTES = 15
"""Limit of one command: it takes seconds, but may wait for the processors of a busy machine."""
STEPS = 10
"""Steps before the run is resumed, and again after."""
PROMPTS = ["The", "Return a new array of", "If the file", "A list is"]
"""Of different lengths, so that a batch needs padding."""
QUESTIONS = "a list of the items that are in the first file but not in the second one"
TASK = """
task: mine
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: query
doc_to_choice: choices
doc_to_target: gold
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""
PIPELINE = """
import json, sys
from transformers import pipeline
model, prompts = sys.argv[1], json.loads(sys.argv[2])
generator = pipeline("text-generation", model=model, trust_remote_code=True)
options = {"max_new_tokens": 16, "do_sample": False}
batch = [row[0]["generated_text"] for row in generator(prompts, batch_size=len(prompts), **options)]
alone = [generator(prompt, **options)[0]["generated_text"] for prompt in prompts]
json.dump({"batch": batch, "alone": alone}, sys.stdout)
"""
"""Without `import mythos`, as a program that knows nothing of it."""


class ClientError(Exception):
    """A client failed, or its result is not ours."""


def main(arguments: list[str] | None = None) -> int:
    """Run all clients; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, metavar="DIR", help="keep the files in DIR (default: temporary)")
    options = parser.parse_args(arguments)
    if options.work is not None:
        options.work.mkdir(parents=True, exist_ok=True)
        return run_clients(options.work.absolute())
    with tempfile.TemporaryDirectory() as folder:
        return run_clients(Path(folder))


def run_clients(folder: Path) -> int:
    """Train, export and run the clients, two at a time."""
    started = time.monotonic()
    clients: list[Callable[[Path], str]] = [lm_eval, pipeline, wandb_sync, tensorboard]
    failures = 0
    with ThreadPoolExecutor(2) as pool:
        trained = pool.submit(train_and_export, folder)
        accelerated = pool.submit(accelerate_launch, folder, trained)
        try:
            trained.result()
        except ClientError as error:
            print(f"failed  {error}", flush=True)
            return 1
        for future in [accelerated, *(pool.submit(client, folder) for client in clients)]:
            try:
                print(f"ok      {future.result()}", flush=True)
            except ClientError as error:
                failures += 1
                print(f"failed  {error}", flush=True)
    print(f"{1 + len(clients) - failures} passed, {failures} failed, in {time.monotonic() - started:.0f} s")
    return int(failures > 0)


def train_and_export(folder: Path) -> None:
    """A run of two processes one after the other, with W&B offline and TensorBoard, and its export."""
    trackers = ["log.wandb.mode=offline", "log.trackers=tensorboard"]
    for steps in (STEPS, 2 * STEPS):
        run([*python("train.py"), *training(folder / "run", steps), *trackers], folder)
    run([*python("-m", "mythos"), "export", str(folder / "run"), str(folder / "export")], folder)


def training(run_dir: Path, steps: int) -> list[str]:
    """Arguments of train.py. The schedule has the same length for every number of steps."""
    settings = {
        "run.dir": run_dir,
        "train.steps": steps,
        "optim.schedule_steps": 2 * STEPS,
        "train.dtype": "float32",
        "eval.every": 0,
        "eval.samples": 0,
        "checkpoint.every": 0,
    }
    return [str(ROOT / "configs" / "debug.yaml"), *(f"{key}={value}" for key, value in settings.items())]


def lm_eval(folder: Path) -> str:
    """lm-evaluation-harness on its own command line, against `mythos evaluate` without the harness."""
    words = QUESTIONS.split()
    lines = [
        {"query": " ".join(words[: n + 2]), "choices": [words[n + 2], words[-n - 1], f"{words[n]} {words[-n]}"]}
        | {"gold": n % 3}
        for n in range(1, 12)
    ]
    file, tasks, out = folder / "questions.jsonl", folder / "tasks", folder / "lm_eval"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    tasks.mkdir(exist_ok=True)
    (tasks / "mine.yaml").write_text(TASK.format(file=file))
    model = f"pretrained={folder / 'export'},trust_remote_code=True"
    harness = ["lm_eval", "--model", "hf", "--model_args", model, "--device", "cpu", "--batch_size", "4"]
    run([*harness, "--tasks", "mine", "--include_path", str(tasks), "--output_path", str(out)], folder)
    theirs = json.loads(next(out.rglob("results_*.json")).read_text())["results"]["mine"]
    evaluate = [*python("-m", "mythos"), "evaluate", str(folder / "export"), "--tasks", str(file), "--loops", "3"]
    run([*evaluate, "--out", str(folder / "evaluation")], folder)
    ours = {
        row["metric"]: row["value"]
        for row in json.loads(next((folder / "evaluation").glob("*.json")).read_text())["results"]
    }
    for metric in ("acc", "acc_norm"):
        check(abs(theirs[f"{metric},none"] - ours[metric]) < 1e-9, f"{metric}: lm_eval {theirs}, mythos {ours}")
    scores = f"acc {ours['acc']:.4f}, acc_norm {ours['acc_norm']:.4f}"
    return f"lm_eval {version('lm_eval')}, --model hf: {scores} on {len(lines)} questions, as mythos evaluate"


def pipeline(folder: Path) -> str:
    """A transformers pipeline with a batch of prompts, against the same prompts one by one."""
    output = run([*python("-c", PIPELINE), str(folder / "export"), json.dumps(PROMPTS)], folder)
    texts = json.loads(output.splitlines()[-1])
    check(texts["batch"] == texts["alone"], f"a batch gives other texts than single prompts: {texts}")
    check(all(map(str.startswith, texts["batch"], PROMPTS)), f"texts do not continue the prompts: {texts}")
    return (
        f"transformers {version('transformers')}, pipeline: a batch of {len(PROMPTS)} gives the texts of single prompts"
    )


def wandb_sync(folder: Path) -> str:
    """`wandb sync --dry-run` on the two processes of one offline run."""
    folders = sorted((folder / "run" / "wandb").glob("offline-run-*"))
    run_id = (folder / "run" / "wandb_id").read_text()
    check(len(folders) == 2 and all(f.name.endswith(run_id) for f in folders), f"{folders} are not two of {run_id}")
    output = run(["wandb", "sync", "--dry-run", *map(str, folders)], folder)
    check("Would sync 2 run(s)" in output and output.count(f"{run_id}.wandb") == 2, f"wandb sync says: {output}")
    return f"wandb {version('wandb')}, offline: wandb sync --dry-run joins a run and its resume under one id"


def tensorboard(folder: Path) -> str:
    """Losses as TensorBoard reads them, against metrics.jsonl."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(next((folder / "run" / "tensorboard").iterdir())))
    events.Reload()
    theirs = {event.step: event.value for event in events.Scalars("loss")}
    ours = losses(folder / "run")
    check(theirs.keys() == ours.keys() and len(ours) == 2 * STEPS, f"TensorBoard has steps {sorted(theirs)}")
    check(all(abs(theirs[step] - ours[step]) < 1e-5 for step in ours), f"TensorBoard {theirs}, metrics {ours}")
    return f"TensorBoard {version('tensorboard')}: the loss of {len(theirs)} steps, each once, over the resume"


def accelerate_launch(folder: Path, trained: Future[None]) -> str:
    """Two processes under accelerate's launcher, against the run of one process, which may still train."""
    launch = ["accelerate", "launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0", str(ROOT / "train.py")]
    run([*launch, *training(folder / "accelerate", STEPS), "train.device=cpu"], folder)
    trained.result()
    ours = losses(folder / "run")
    theirs = losses(folder / "accelerate")
    check(list(theirs) == list(range(1, STEPS + 1)), f"accelerate trained steps {list(theirs)}")
    worst = max(abs(theirs[step] - ours[step]) for step in theirs)
    check(worst < 1e-3, f"losses differ by {worst}: accelerate {theirs}, one process {ours}")
    return (
        f"accelerate {version('accelerate')}, launch: 2 processes, losses of {STEPS} steps within 1e-3 of one process"
    )


def losses(run_dir: Path) -> dict[int, float]:
    """Loss by step of a run's metrics.jsonl."""
    records: list[dict[str, Any]] = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return {record["step"]: record["loss"] for record in records}


def python(*arguments: str) -> list[str]:
    """A command of this interpreter; train.py is the one of this checkout."""
    return [sys.executable, *(str(ROOT / word) if word == "train.py" else word for word in arguments)]


def run(command: list[str], folder: Path) -> str:
    """Run a command in `folder` and return what it prints.

    Raises ClientError with the end of its output if it fails or takes more than MINUTES.
    """
    environment = os.environ | {
        "HF_HOME": str(folder / "huggingface"),
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "WANDB_DIR": str(folder),
        "TOKENIZERS_PARALLELISM": "false",
    }
    environment.pop("WANDB_MODE", None)
    pipes: dict[str, Any] = {"stdin": subprocess.DEVNULL, "capture_output": True, "text": True}
    try:
        result = subprocess.run(command, cwd=folder, env=environment, timeout=60 * MINUTES, **pipes)
    except subprocess.TimeoutExpired as error:
        raise ClientError(f"{shlex.join(command)[:300]} did not end in {MINUTES} minutes") from error
    output = re.sub(r"\x1b\[[0-9;]*m", "", result.stderr + result.stdout)
    if result.returncode:
        raise ClientError(f"{shlex.join(command)[:300]} ended with status {result.returncode}:\n{output[-3000:]}")
    return output


def check(condition: bool, message: str) -> None:
    """Raise ClientError with the message unless the condition is true."""
    if not condition:
        raise ClientError(message)


if __name__ == "__main__":
    sys.exit(main())
