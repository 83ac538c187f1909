#!/bin/sh
# What a CUDA device has to show, within ten minutes: the tests marked gpu, and a table of training steps against peft,
# eager and compiled, in bfloat16, and with weights in NF4.
#
#   benchmarks/gpu.sh                              # the first CUDA device, a Llama shape of 1.2 B
#   benchmarks/gpu.sh --device cpu --size tiny     # tries the script itself where there is no such device
set -eu

device=cuda size=1.2 rounds=10
while [ $# -gt 0 ]; do
    case $1 in
        --device) device=$2 ;;
        --size) size=$2 ;;
        --rounds) rounds=$2 ;;
        *)
            echo "usage: benchmarks/gpu.sh [--device cuda|cpu] [--size tiny|0.2|0.5|1.2] [--rounds N]" >&2
            exit 2
            ;;
    esac
    shift 2
done

root=$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)
python=${PYTHON:-$root/.venv/bin/python}
cd "$root"

if ! "$python" -c "import torch; torch.empty(1, device='$device')" 2>/dev/null; then
    echo "benchmarks/gpu.sh: torch of $python cannot use the device '$device'; install a build of torch for it, or try" \
        "the script with --device cpu --size tiny" >&2
    exit 1
fi

qlora=
if [ "$device" != cpu ] && "$python" -c 'import bitsandbytes' 2>/dev/null; then
    qlora=--qlora
fi

# Where there is no such device the tests are skipped, which pytest counts as success.
timeout 240 "$python" -m pytest -q -m gpu tests/adapter_compiler tests/soundness
# shellcheck disable=SC2086
timeout 350 "$python" benchmarks/real_size.py --device "$device" --size "$size" --dtype bfloat16 --batch 4 --length 512 \
    --rounds "$rounds" --compiled --no-files $qlora
