# Sourced by tools/test and tools/demo: after it, the current folder is the project, `.venv` holds tyir (editable) with its tools for
# development, and `$python` is its interpreter.  Needs Python 3.11 or newer, a C compiler and a package index that pip is set up for.
# Nothing outside the checkout is changed; the install is skipped while its stamp (pyproject.toml, Python version, place) holds.

project=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
cd -- "$project"
venv=$project/.venv
python=$venv/bin/python

export TOKENIZERS_PARALLELISM=false # tokenizers warns on every fork otherwise
export HF_HUB_OFFLINE=1             # models are folders on this machine: a missing file is an error, never a download
export PIP_DISABLE_PIP_VERSION_CHECK=1

fail() {
  printf 'error: %s\n' "$1" >&2
  exit 1
}

# The first interpreter that is new enough and can make a virtual environment.
find_python() {
  local name
  for name in python3 python3.11 python3.12 python3.13 python3.14 python; do
    if "$name" -c 'import sys, ensurepip, venv; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then
      printf '%s\n' "$name"
      return
    fi
  done
  name=$(python3 --version 2>/dev/null || echo "no python3")
  fail "tyir needs Python 3.11 or newer with its venv module, found $name (Debian, Ubuntu: apt install python3.11-venv)"
}

require_compiler() {
  local name
  for name in "${CXX:-}" "${CC:-}" g++ gcc clang++ clang cc; do
    if [[ -n $name ]] && command -v "${name%% *}" >/dev/null; then return; fi
  done
  fail "tyir links the programs it compiles with a C compiler and found none: install gcc or clang (Debian, Ubuntu: apt install gcc)"
}

# What the installed environment depends on; the place counts because the editable install points at it.
stamp_text() {
  "$python" - <<'PYTHON'
import hashlib, os, sys

with open("pyproject.toml", "rb") as file:
    print(hashlib.sha256(file.read()).hexdigest(), sys.version.split()[0], os.getcwd())
PYTHON
}

# The requirement of one package that compiling needs, as pyproject.toml spells it.
requirement() {
  "$python" - "$1" <<'PYTHON'
import sys, tomllib

with open("pyproject.toml", "rb") as file:
    extras = tomllib.load(file)["project"]["optional-dependencies"]
print(next(d for d in extras["compile"] if d.startswith(sys.argv[1])))
PYTHON
}

install() {
  local log=$venv/install.log
  printf 'Installing into %s (a few minutes the first time) ...\n' "${venv#"$project"/}" >&2
  # torch alone and first: pip then takes the build this machine's settings offer (usually the CPU one) and keeps it for the rest.
  if ! { "$python" -m pip install "$(requirement torch)" && "$python" -m pip install -e '.[dev]'; } >"$log" 2>&1; then
    tail -n 40 "$log" >&2
    fail "pip could not install tyir's dependencies; the whole log is in $log"
  fi
}

require_compiler
if ! "$python" -c 'import pip' >/dev/null 2>&1; then
  base=$(find_python)
  rm -rf -- "$venv"
  "$base" -m venv "$venv"
fi
if [[ $(cat "$venv/stamp" 2>/dev/null) != "$(stamp_text)" ]]; then
  install
  stamp_text >"$venv/stamp"
fi
