#!/bin/sh
# Builds the wheel, installs it into a new environment, and uses it from a folder that is not the repository.
#
#   tools/check_wheel.sh          the new environment borrows the packages of .venv: proves what the wheel holds
#   tools/check_wheel.sh --full   installs every requirement afresh: proves what the wheel asks for (minutes)
set -eu
root=$(cd "$(dirname "$0")/.." && pwd)
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
say() { printf 'check_wheel: %s\n' "$*"; }

say "building"
# From a copy of what is tracked: setuptools also packs what an earlier build left behind.
mkdir "$place/source"
(cd "$root" && git ls-files -z | xargs -0 tar cf - --ignore-failed-read) | tar xf - -C "$place/source"
"$root/.venv/bin/python" -m build --wheel --no-isolation --outdir "$place/dist" "$place/source" >"$place/build.log" 2>&1 ||
    { cat "$place/build.log"; exit 1; }

say "installing into a new environment"
"$root/.venv/bin/python" -m venv "$place/env"
python="$place/env/bin/python"
add() { "$python" -m pip install --quiet --disable-pip-version-check --no-input "$@"; }
if [ "${1:-}" = --full ]; then
    # Constraints may not name extras: `ray[data]==…` becomes `ray==…`.
    sed 's/\[.*\]//' "$root/requirements/base.txt" >"$place/constraints.txt"
    add "$place"/dist/*.whl --constraint "$place/constraints.txt"
    "$root/.venv/bin/python" -m pip show --quiet fbgemm-gpu 2>/dev/null && flavour=gpu || flavour=cpu
    add --no-deps --requirement "$root/requirements/tables-$flavour.txt"
else
    add --no-deps "$place"/dist/*.whl
    packages=$("$root/.venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    # A plain path line: .pth files inside the borrowed folder (the editable install's) are not read.
    echo "$packages" >"$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/borrowed.pth"
fi

mkdir "$place/elsewhere" && cd "$place/elsewhere"
say "where it is imported from"
found=$("$python" -c 'import metatrain; print(metatrain.__file__)')
echo "$found"
case "$found" in "$place/env/"*) ;; *) say "error: not the wheel's"; exit 1 ;; esac

PATH="$place/env/bin:$PATH"
say "metatrain --help" && metatrain --help
say "metatrain doctor" && metatrain doctor
cat >recipe.yaml <<'YAML'
run: {name: wheel}
prepare:
  source: synthetic
  synthetic: {users: 200, items: 100, events_per_user: 20}
data: {dataset: data/synthetic, tasks_per_step: 32, lanes: 4}
train: {epochs: 1, workers: 1, validate_every: 1}
YAML
for command in prepare train evaluate; do
    say "metatrain $command recipe.yaml" && metatrain "$command" recipe.yaml
done
say "all passed"
