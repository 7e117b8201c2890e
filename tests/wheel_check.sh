#!/usr/bin/env bash
# Build the wheel, install it into a new environment outside the repository, and run the demo from an empty directory:
# package data, default settings and the console script must all be in the wheel.
set -euo pipefail
python=${1:-python3}
repo=$(cd "$(dirname "$0")/.." && pwd)
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
"$repo/.venv/bin/python" -m build --wheel --outdir "$place/dist" "$repo" > "$place/build.log" 2>&1 || { cat "$place/build.log"; exit 1; }
echo "built $(basename "$place"/dist/*.whl)"
"$python" -m venv "$place/venv"
"$place/venv/bin/python" -m pip install --quiet --upgrade pip
"$place/venv/bin/python" -m pip install --quiet "$place"/dist/*.whl
mkdir "$place/empty" && cd "$place/empty"
export XDG_CACHE_HOME=$place/cache
# Without a network, where the system lets us take it away: nothing may be fetched at run time.
offline=$(unshare -rn true 2> /dev/null && echo "unshare -rn" || echo env)
"$place/venv/bin/sft-course" --help > /dev/null
$offline "$place/venv/bin/sft-course" demo | tee "$place/demo.log"
tail -n 1 "$place/demo.log" | grep -Eq '^from scratch 0\.[0-9]+ · frozen head 0\.[0-9]+ · fine-tuned [01]\.[0-9]+$'
for f in model.safetensors card.json history.csv report.html; do test -s "sft-demo/$f"; done
"$place/venv/bin/sft-course" notebooks course > /dev/null
for f in nbs/00_concepts.ipynb images settings.ini; do test -s "course/$f"; done
"$place/venv/bin/python" -c "import sft_course, os; assert os.path.realpath(sft_course.__file__).startswith(os.path.realpath('$place'))"
echo "wheel-check: passed"
