#!/usr/bin/env bash
# Train on all GPUs of this machine, on several machines, or in several CPU processes: ./launch.sh --help
set -euo pipefail

usage() {
  cat <<'TEXT'
./launch.sh [--cpu N | --processes N] CONFIG [key.path=value ...] [options of train.py]

  CONFIG         a YAML file, the directory of a run to continue (runs/NAME), or a name from `mythos configs`

  --cpu N        N processes on the CPU; sets train.device=cpu
  --processes N  N processes on this machine instead of one a GPU

Several machines: run the same command on each, with these set. Under SLURM they come from its variables, with one
task a node; see scripts/slurm.sbatch.

  NNODES         number of machines (1)
  NODE_RANK      number of this machine, from 0
  MASTER_ADDR    name or address of machine 0, as the others reach it
  MASTER_PORT    free port of machine 0, open to the others (29500)
  JOIN_TIMEOUT   seconds for which machines wait for each other, at the start and after a failure (600)

Also read from the environment:

  MAX_RESTARTS      number of restarts after a failure (3); each continues from the newest checkpoint
  SHUTDOWN_TIMEOUT  seconds for the final save when torchrun itself gets SIGTERM (600; always 30 with torch 2.11)
  PYTHON            the interpreter (python)
  PYTORCH_ALLOC_CONF  settings of torch's allocator on GPUs (expandable_segments:True, against fragmentation); your own
                    value, also in PYTORCH_CUDA_ALLOC_CONF, is not changed

SIGTERM, SIGINT (Ctrl-C), SIGHUP and SIGUSR1 save and stop, with status 0. A second one, seconds later, stops at once,
with status 1 if the last steps are not saved yet.
TEXT
}

fail() {
  printf 'launch.sh: %s\n' "$*" >&2
  exit 1
}

# need_number NAME VALUE [SMALLEST]
need_number() {
  if ! [[ $2 =~ ^[0-9]{1,9}$ ]] || ((10#$2 < ${3:-0})); then
    fail "$1: got '$2'; allowed: a whole number from ${3:-0} on"
  fi
}

# --- the command line

processes='' cpu=''
while (($#)); do
  case $1 in
    --help | -h)
      usage
      exit 0
      ;;
    --cpu | --processes)
      [[ -z $processes ]] || fail "give --cpu or --processes once, not both"
      need_number "$1" "${2:-}" 1
      [[ $1 == --processes ]] || cpu=yes
      processes=$2
      shift 2
      ;;
    -*) fail "$1: not an option of launch.sh, which starts a process on every GPU. --processes 2 uses the first two GPUs, CUDA_VISIBLE_DEVICES=2,3 chooses others, --cpu 2 trains on the CPU; options of train.py follow the configuration" ;;
    *) break ;;
  esac
done
(($#)) && [[ $1 != -* && $1 != *=* ]] || fail "no configuration given; usage: ./launch.sh [--cpu N] CONFIG [key.path=value ...]"
[[ -z $cpu ]] || set -- "$@" train.device=cpu

here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
python=${PYTHON:-python}
command -v -- "$python" >/dev/null || fail "$python: not found; activate the environment that mythos is installed in, or set PYTHON"

count_gpus() {
  local devices
  if [[ -n ${CUDA_VISIBLE_DEVICES+set} ]]; then
    IFS=, read -ra devices <<<"$CUDA_VISIBLE_DEVICES"
    case ${devices[0]:-} in
      '' | -1 | NoDevFiles) echo 0 ;;
      *) echo "${#devices[@]}" ;;
    esac
  else
    { nvidia-smi -L 2>/dev/null || true; } | grep -c '^GPU ' || true
  fi
}

if [[ -z $processes ]]; then
  processes=$(count_gpus)
  ((processes)) || fail "no GPU in CUDA_VISIBLE_DEVICES or nvidia-smi -L. To train on the CPU: ./launch.sh --cpu 2 $1 ..."
fi

# --- how the machines meet (torchrun's rendezvous)

if [[ -z ${NNODES:-} && -n ${SLURM_JOB_NUM_NODES:-} ]]; then
  # A step may have fewer nodes than its job.
  NNODES=${SLURM_STEP_NUM_NODES:-$SLURM_JOB_NUM_NODES}
  if [[ $NNODES != 1 ]]; then
    [[ -n ${SLURM_NODEID:-} ]] || fail "a SLURM job of $NNODES nodes, but SLURM_NODEID is not set: start it with srun ./launch.sh ..."
    [[ ${SLURM_LOCALID:-0} == 0 ]] || fail "several SLURM tasks on this node: use --ntasks-per-node=1, launch.sh starts one process a GPU"
    NODE_RANK=$SLURM_NODEID
    if [[ -z ${MASTER_ADDR:-} ]]; then
      hosts=$(scontrol show hostnames "${SLURM_STEP_NODELIST:-$SLURM_JOB_NODELIST}")
      MASTER_ADDR=${hosts%%$'\n'*}
    fi
  fi
fi
nodes=${NNODES:-1} master=${MASTER_ADDR:-} port=${MASTER_PORT:-29500} join_timeout=${JOIN_TIMEOUT:-600}
restarts=${MAX_RESTARTS:-3} shutdown_timeout=${SHUTDOWN_TIMEOUT:-600}
need_number NNODES "$nodes" 1
need_number MASTER_PORT "$port" 1
need_number JOIN_TIMEOUT "$join_timeout" 1
need_number MAX_RESTARTS "$restarts"
need_number SHUTDOWN_TIMEOUT "$shutdown_timeout"

reachable() {
  # shellcheck disable=SC2016 # expanded by the inner bash
  timeout 5 bash -c 'exec 3<>"/dev/tcp/$1/$2"' _ "$master" "$port" 2>/dev/null
}

if ((nodes == 1)); then
  rendezvous=(--standalone)
else
  [[ -n $master ]] || fail "NNODES is $nodes, but MASTER_ADDR is not set: set it to the name of machine 0, the same on all"
  [[ -n ${NODE_RANK:-} ]] || fail "NNODES is $nodes, but NODE_RANK is not set: set it to 0 on $master and to 1, 2, ... on the others"
  need_number NODE_RANK "$NODE_RANK"
  ((10#$NODE_RANK < nodes)) || fail "NODE_RANK: got $NODE_RANK; allowed: 0 to $((nodes - 1)), as NNODES is $nodes"
  # Use the "c10d" rendezvous. With "static", a failure restarts only the processes of its own machine, which then wait
  # for the others in vain, and a lost machine cannot rejoin.
  host=$((10#$NODE_RANK == 0))
  rendezvous=(--nnodes "$nodes" --rdzv-backend c10d --rdzv-endpoint "$master:$port" --rdzv-id "${SLURM_JOB_ID:-mythos}"
    --rdzv-conf "is_host=$host,join_timeout=$join_timeout")
fi

# --- checks that run once here: otherwise every process would print the same error

check='
import sys
from importlib.util import find_spec
from pathlib import Path
from mythos.cli.train import parser
from mythos.config.loading import load_config
from mythos.errors import MythosError
options = parser().parse_intermixed_args(sys.argv[1:])
try:
    load_config(options.config, options.overrides)
except MythosError as error:
    sys.exit(f"error: {error}")
# Search the source text for the option, because importing torch takes seconds.
torchrun = Path(find_spec("torch").origin).parent / "distributed" / "run.py"
if "--shutdown-timeout" not in torchrun.read_text():
    print("fixed")
'
shutdown_wait=$(PYTHONPATH=$here${PYTHONPATH:+:$PYTHONPATH} "$python" -c "$check" "$@")
shutdown_options=(--shutdown-timeout "$shutdown_timeout")
if [[ $shutdown_wait == fixed ]]; then # torch 2.11
  [[ -z ${SHUTDOWN_TIMEOUT:-} ]] || echo "launch.sh: SHUTDOWN_TIMEOUT is ignored: the torchrun of this torch always waits 30 s; newer ones have an option" >&2
  shutdown_options=()
fi

if ((nodes > 1 && host)); then
  ! reachable || fail "$master:$port is in use: set MASTER_PORT to a free port, the same on all machines, or end the job that holds it"
elif ((nodes > 1)); then
  SECONDS=0
  until reachable; do
    ((SECONDS < join_timeout)) || fail "machine $NODE_RANK did not reach machine 0 at $master:$port in $join_timeout s: check MASTER_ADDR and MASTER_PORT, that the port is open, and that launch.sh runs there with NODE_RANK=0"
    sleep 1
  done
fi

# --- torchrun

if [[ -z ${OMP_NUM_THREADS:-} ]]; then
  cores=$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)
  export OMP_NUM_THREADS=$((cores > processes ? cores / processes : 1))
fi
# Rows of different depth join the batch at different loops, so tensors have many sizes. Expandable segments let torch
# reuse the memory of one size for another. Leave a user's own setting alone, under either name of the variable: torch
# 2.11 to 2.14 would prefer PYTORCH_ALLOC_CONF.
if [[ -z ${PYTORCH_ALLOC_CONF+set}${PYTORCH_CUDA_ALLOC_CONF+set} ]]; then
  export PYTORCH_ALLOC_CONF=expandable_segments:True
fi
# Give every restart a new store. In the store shared with torchrun's agents, restarted processes find the addresses of
# their dead predecessors, and fail or hang (https://github.com/pytorch/pytorch/issues/135712).
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1

scratch=$(mktemp -d)
trap 'rm -rf -- "$scratch"' EXIT
# The processes share this file (mythos/distributed/launch_status.py). Its first word is `stop` after a signal asked to
# stop, or `error:` with a message after an error that a restart would not cure. While there is no file, training
# continues.
export MYTHOS_STATUS_FILE=$scratch/status
launch_status() {
  local word=''
  if [[ -e $MYTHOS_STATUS_FILE ]]; then read -r word _ <"$MYTHOS_STATUS_FILE" || true; fi
  echo "${word:-running}"
}
export MYTHOS_LAUNCHER=$$ # the processes stop if this shell dies

# Send the first signal to the training processes only: they save and exit with 0. torchrun would forward it too, but
# then exits with 1 and a traceback, while the torchruns of other machines wait for it. Repeated signals reach torchrun
# in the end: the second one with several machines, the third one with a single machine.
forward='
import sys
import psutil
torchrun, nodes = psutil.Process(int(sys.argv[1])), int(sys.argv[2])
# With several machines, torchrun may still wait for the others and have no process yet.
for process in torchrun.children() or [torchrun] * (nodes > 1):
    process.terminate()
'
torchrun='' first='' second='' signalled=''
# shellcheck disable=SC2329 # called by the trap
forward_signal() {
  # Ignore errors: a process may end just now. A process that starts later reads the status file.
  (trap '' INT HUP USR1 && exec "$python" -c "$forward" "$torchrun" "$nodes" 2>/dev/null) || true
}
# shellcheck disable=SC2329
stop() {
  signalled=yes
  if [[ -z $first ]]; then
    first=$SECONDS
    # Append: a process may write an error at this moment, which must not be lost.
    [[ $(launch_status) != running ]] || echo stop >>"$MYTHOS_STATUS_FILE"
    forward_signal
  elif ((SECONDS - first > 2)) && [[ $nodes == 1 && -z $second ]]; then
    # At the second signal the processes stop at once, with status 0 if everything is saved.
    second=yes
    forward_signal
  elif ((SECONDS - first > 2)); then
    kill -TERM "$torchrun" 2>/dev/null || true
  fi
}
trap stop TERM INT HUP USR1

if ((nodes > 1)); then
  echo "starting, once all $nodes machines have met at $master:$port (within $join_timeout s, JOIN_TIMEOUT); processes here: $processes" >&2
else
  echo "starting; processes: $processes" >&2
fi
(
  trap '' INT HUP USR1
  exec "$python" -m torch.distributed.run "${rendezvous[@]}" --nproc-per-node "$processes" --max-restarts "$restarts" \
    --signals-to-handle SIGTERM,SIGQUIT ${shutdown_options[@]+"${shutdown_options[@]}"} "$here/train.py" "$@"
) &
torchrun=$!

# A process that meets an error which a restart would not cure exits with 0, so that torchrun does not restart. The other
# processes may still wait for it in a collective: end them after 30 s. On a busy machine a process needs several seconds
# to start and to exit by itself, so do not end them sooner.
(
  while kill -0 "$torchrun" 2>/dev/null; do
    if [[ $(launch_status) == error: ]]; then
      sleep 30
      kill -TERM "$torchrun" 2>/dev/null || true
      break
    fi
    sleep 1
  done
) &
watcher=$!

while :; do
  signalled='' status=0
  wait "$torchrun" || status=$?
  [[ -n $signalled ]] || break # the trap ran and interrupted `wait`: torchrun is still running
done
kill "$watcher" 2>/dev/null || true
if [[ $(launch_status) == error: ]]; then
  cat -- "$MYTHOS_STATUS_FILE" >&2
  status=$((status ? status : 1))
fi
exit "$status"
