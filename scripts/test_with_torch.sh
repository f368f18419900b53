#!/usr/bin/env bash
# Run the tests with another version of torch, in a separate virtual environment: scripts/test_with_torch.sh --help
set -euo pipefail

usage() {
  cat <<'TEXT'
scripts/test_with_torch.sh VERSION [--environment DIR] [--python PYTHON] [--with REQUIREMENT]... [-- arguments of pytest]

  VERSION             version of torch: 2.11 (its newest release) or 2.11.0; also versions that pyproject.toml excludes
  --environment DIR   keep the virtual environment in DIR and reuse it; by default it is temporary
  --python PYTHON     interpreter (default: python3)
  --with REQUIREMENT  also install this, for example 'transformers==5.10.*'

Without arguments for pytest the whole suite runs. The last line shows versions and pytest's summary; the exit status is
pytest's. torch for CUDA needs about 6 GB. pip's settings apply: PIP_EXTRA_INDEX_URL can name an index of CPU builds.
TEXT
}

fail() {
  printf 'test_with_torch.sh: %s\n' "$*" >&2
  exit 2
}

# --- the command line

version='' environment='' python=python3 extra=()
while (($#)); do
  case $1 in
    --help | -h)
      usage
      exit 0
      ;;
    --environment | --python | --with)
      [[ -n ${2:-} ]] || fail "$1: no value given"
      case $1 in
        --environment) environment=$2 ;;
        --python) python=$2 ;;
        --with) extra+=("$2") ;;
      esac
      shift 2
      ;;
    --)
      shift
      break
      ;;
    *)
      [[ -z $version ]] || fail "got $1 after VERSION; put arguments of pytest behind --"
      version=$1
      shift
      ;;
  esac
done
[[ $version =~ ^[0-9]+\.[0-9]+(\.[0-9]+)?(\+[a-z0-9.]+)?$ ]] ||
  fail "VERSION: got '$version'; give a version of torch such as 2.11 or 2.11.0"
[[ $version =~ ^[0-9]+\.[0-9]+$ ]] && version+='.*'
command -v -- "$python" >/dev/null || fail "--python: $python is not found"

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
work=$(mktemp -d)
trap 'rm -rf -- "$work"' EXIT
environment=${environment:-$work/environment}

# --- the environment

unset PYTHONPATH PYTHONHOME VIRTUAL_ENV
export PYTHONNOUSERSITE=1
[[ -x $environment/bin/python ]] || "$python" -m venv "$environment"
environment=$(cd -- "$environment" && pwd)
export PATH=$environment/bin:$PATH # tests start python and torchrun by name

# The project's requirements without torch, whose version range may conflict with VERSION.
"$environment/bin/python" -c '
import re, sys, tomllib
with open(sys.argv[1], "rb") as file:
    project = tomllib.load(file)["project"]
lines = [*project["dependencies"], *project["optional-dependencies"]["test"]]
print("\n".join(line for line in lines if re.match(r"[\w.-]+", line)[0] != "torch"))
' "$root/pyproject.toml" >"$work/requirements.txt"
"$environment/bin/python" -m pip install "torch==$version" -r "$work/requirements.txt" ${extra[@]+"${extra[@]}"}
"$environment/bin/python" -m pip install --no-deps -e "$root"

# --- the tests

cd -- "$root"
status=0
"$environment/bin/python" -m pytest "$@" 2>&1 | tee "$work/log" || status=${PIPESTATUS[0]}
figures=$(grep -E '[0-9]+ (passed|failed|skipped|errors?|deselected)\b.* in [0-9.]+s' "$work/log" | tail -n 1 | tr -d =) || figures='no summary of pytest'
versions=$("$environment/bin/python" -c '
import platform
from importlib.metadata import version
packages = [f"{name} {version(name)}" for name in ("torch", "transformers")]
print(", ".join([*packages, f"Python {platform.python_version()}"]))
')
printf '\n%s: %s\n' "$versions" "$figures"
exit "$status"
