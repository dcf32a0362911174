#!/usr/bin/env bash
# What a GPU has to show: 32 minutes on one H100 or H200, without a network, in pieces that can be started alone.
#
#   benchmarks/on_gpu.sh --download WHEELS [--python-version 3.12 ...]
#                       once, with a network: the packages that such machines may lack; what follows is for pip
#   benchmarks/on_gpu.sh OUT [--wheels WHEELS] [--tiny] [PIECE ...]
#
# PIECE          limit
# equality        6 min  flex, varlen, sdpa and compiled paths against eager, in float32 and bfloat16
# speed-384       6 min  tokens/s, memory and MFU of 8+8 layers of 384, rows of 1,024, 4,096 and 16,384, with a profile
# speed-768       8 min  the same of 12+12 layers of 768
# recipe-768      2 min  tokens/s and memory of configs/default.yaml at 12 layers of 768, in one row
# encoder-768     3 min  tokens/s, memory and MFU of an encoder of 153M parameters alone (MLM)
# learning        7 min  docs/learning.md at 100 times its compute, MLM beside it; needs datasets and the data
#
# Default: all of them. Each writes OUT/PIECE.json as it goes, so that what was measured stays if time runs out. --tiny
# runs all of it at a size for the CPU. Needed are torch, transformers, accelerate, numpy, scikit-learn, safetensors and
# pyarrow; what else is missing is installed from WHEELS (default: ./wheels) into OUT/packages.
set -euo pipefail

HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
PYTHON=${PYTHON:-python}
FOR_ALL=(rotary-embedding-torch einops)
FOR_LEARNING=(datasets dill multiprocess xxhash pandas python-dateutil six evaluate requests charset-normalizer idna urllib3
    certifi)

if [[ ${1:-} == --download ]]; then
    [[ $# -ge 2 && $2 != -* ]] || { echo "on_gpu.sh: error: name the folder: --download WHEELS" >&2; exit 2; }
    "$PYTHON" -m pip download --quiet --no-deps --only-binary :all: --dest "$2" "${@:3}" "${FOR_ALL[@]}" "${FOR_LEARNING[@]}"
    du -sh "$2"
    exit
fi

OUT= WHEELS=wheels TINY=() PIECES=()
while (($#)); do
    case $1 in
        --wheels) WHEELS=${2:?on_gpu.sh: error: name the folder: --wheels WHEELS}; shift ;;
        --tiny) TINY=(--tiny) ;;
        equality | speed-384 | speed-768 | recipe-768 | encoder-768 | learning) PIECES+=("$1") ;;
        -*) echo "on_gpu.sh: error: there is no flag $1; see the head of $0" >&2; exit 2 ;;
        *)
            [[ -z $OUT ]] || { echo "on_gpu.sh: error: there is no piece $1; see the head of $0" >&2; exit 2; }
            OUT=$1
            ;;
    esac
    shift
done
[[ -n $OUT ]] || { sed -n '2,/^set/{/^set/!s/^# \{0,1\}//p}' "$0"; exit 2; }
((${#PIECES[@]})) || PIECES=(equality speed-384 speed-768 recipe-768 encoder-768 learning)
mkdir -p "$OUT"
OUT=$(cd "$OUT" && pwd)

# The repository's root is the package: its name must be tjepa, whatever the folder is called
mkdir -p "$OUT/packages"
[[ -e $OUT/packages/tjepa ]] || ln -s "$(dirname "$HERE")" "$OUT/packages/tjepa"
export PYTHONPATH="$OUT/packages:$HERE${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1

install() { # the packages of a list, of which the module named first cannot be imported
    "$PYTHON" -c "import $1" 2>/dev/null && return
    shift
    "$PYTHON" -m pip install --quiet --no-index --no-deps --find-links "$WHEELS" --target "$OUT/packages" "$@"
}

status=0
for piece in "${PIECES[@]}"; do
    case $piece in
        equality | speed-384) limit=360 ;;
        speed-768) limit=480 ;;
        recipe-768) limit=120 ;;
        encoder-768) limit=180 ;;
        learning) limit=420 ;;
    esac
    echo "== $piece (at most $limit s)"
    if ! install rotary_embedding_torch "${FOR_ALL[@]}"; then
        echo "on_gpu.sh: error: rotary-embedding-torch is not installed and not in $WHEELS; fill it where there is a" \
            "network: benchmarks/on_gpu.sh --download $WHEELS" >&2
        exit 2
    fi
    if [[ $piece == learning ]] && ! install "datasets, evaluate" "${FOR_LEARNING[@]}"; then
        echo "skipped: datasets and evaluate are not installed and not in $WHEELS (benchmarks/on_gpu.sh --download $WHEELS)"
        continue
    fi
    timeout "$limit" "$PYTHON" "$HERE/on_gpu.py" "$piece" --output_dir "$OUT" "${TINY[@]}" || {
        status=$?
        echo "$piece ended with status $status$( ((status == 124)) && echo ": time ran out; what it measured is kept")"
    }
done
exit "$status"
