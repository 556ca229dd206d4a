#!/bin/bash
# Checks and measures everything on one NVIDIA GPU, in 9 minutes at most, and writes what it finds into a folder:
#
#     scripts/gpu_check.sh [FOLDER]            FOLDER is $OUT, or gpu_check, where none is given
#     TINY=1 scripts/gpu_check.sh [FOLDER]     the same with sizes that a CPU takes in a few minutes
#
# Each part has a time limit and writes FOLDER/PART.txt; where one fails the next goes on. FOLDER/summary.txt says how
# each ended; what can't be run here, since a package or a GPU isn't there, is left out with its reason. PARTS="trained
# generate" runs these alone, and BUDGET=900 takes so many seconds for all. Status 0: all that was run went well; 1: some
# part didn't, or there was no time for it; 2: nothing could be started. PyTorch is measured where it is installed.

set -u
cd "$(dirname "$0")/.." || exit 2
python=${PYTHON:-.venv/bin/python}
folder=${1:-${OUT:-gpu_check}}
mkdir -p "$folder" && folder=$(cd "$folder" && pwd) || exit 2
summary=$folder/summary.txt
: >"$summary" || exit 2
export PYTHONPATH=$PWD

if [ "${TINY:-0}" = 0 ]; then
    config=gpt2_124m large=gpt2_1558m first=32x1024 small=8x1024 others="16x1024 64x1024" large_size=16x1024
    budget=${BUDGET:-540} patience=1 length=1024 batch=16 steps=200 again=20 timed=10 peers="torch.compile"
    attentions="pallas blocks" kernels="pallas xla"
else
    config=quickstart large=quickstart first=2x32 small=1x32 others=1x32 large_size=1x32
    budget=${BUDGET:-3600} patience=5 length=32 batch=2 steps=4 again=2 timed=1 peers="jax.grad"
    attentions=blocks kernels=xla # nothing else runs on a CPU
fi

failed=0
# part NAME SECONDS COMMAND...: runs a command for so many seconds at most and tells how it ended.
part() {
    local name=$1 seconds=$2 start=$SECONDS status words
    shift 2
    case " ${PARTS:-$name} " in *" $name "*) ;; *) return ;; esac
    seconds=$((seconds * patience))
    if ((seconds > budget - SECONDS)); then seconds=$((budget - SECONDS)); fi
    if ((seconds < 5)); then
        status="not begun: the $budget s are over" failed=1
    else
        timeout --kill-after=10 "$seconds" "$@" >"$folder/$name.txt" 2>&1
        status=$?
        words=$(grep -v '^ *$' "$folder/$name.txt" | tail -n 1 | cut -c 1-300)
        case $status in
            0) status=ok ;;
            2) status="left out: $words" ;;
            124 | 137) status="stopped after $seconds s: $words" failed=1 ;;
            *) status="failed with status $status: $words" failed=1 ;;
        esac
    fi
    printf '%-14s %4d s  %s\n' "$name" $((SECONDS - start)) "$status" | tee -a "$summary"
}

# bench NAME SECONDS CONFIG SIZE PEERS: one of the sizes beside others; it leaves out what doesn't fit or isn't there.
bench() {
    part "$1" "$2" "$python" -m benchmarks.bench --config "$3" --sizes "$4" --dtypes bfloat16 --steps "$timed" \
        --minutes 1.5 --who ours $5 --output "$folder/$1.json" --chart "$folder/$1.png"
}

# train NAME SECONDS OPTIONS...: trains a run of this name.
train() {
    local name=$1 seconds=$2
    shift 2
    part "$name" "$seconds" "$python" run.py --config "$config" --compute.dtype bfloat16 \
        --training.sequence-length "$length" --training.batch-size "$batch" --training.evaluate-every 50 \
        --training.evaluation-batches 2 --optimizer.warmup-steps 2 --sampling.tokens 8 --checkpoint.every-minutes 0 \
        --run.folder "$folder/runs" --run.name "$name" --run.overwrite --run.compilation-cache off "$@"
}

part machine 30 "$python" run.py --version
if command -v nvidia-smi >/dev/null; then nvidia-smi >>"$folder/machine.txt" 2>&1; fi

# Right
part compared 60 "$python" tests/kernels/compare_kernels.py
part gradients 90 "$python" run.py gradcheck --dtype bfloat16 --config quickstart

# Fast
bench "bench_$first" 120 "$config" "$first" "$peers"
# Attention in Pallas beside the blocks, in float32, which cuDNN's doesn't take
for attention in $attentions; do
    part "float32_$attention" 45 "$python" -m benchmarks.bench --config "$config" --sizes "$small" --dtypes float32 \
        --steps "$timed" --minutes 0.5 --who ours --compute.attention "$attention" \
        --output "$folder/float32_$attention.json" --chart "$folder/float32_$attention.png"
done
# Norms and the classifier's softmax in Pallas beside XLA's
for name in $kernels; do
    part "kernels_$name" 45 "$python" -m benchmarks.bench --config "$config" --sizes "$small" --dtypes bfloat16 \
        --steps "$timed" --minutes 0.5 --who ours --compute.kernels "$name" \
        --output "$folder/kernels_$name.json" --chart "$folder/kernels_$name.png"
done
part kernels 60 "$python" -m benchmarks.gpu_program.measured --config "$config" --size "$first" \
    --folder "$folder/trace" --output "$folder/kernels.json"
part bound 60 "$python" -m benchmarks.gpu_program --config "$config" --size "$first" --output "$folder/bound.json" \
    --picture "$folder/bound.png"

# Trains, to the same bits twice, and speaks
train trained 90 --training.steps "$steps"
part generate 30 "$python" run.py generate --run "$folder/runs/trained" --prompt "The " --samples 2 --tokens 20
train first 40 --training.steps "$again" --compute.deterministic
train second 40 --training.steps "$again" --compute.deterministic
part same 30 "$python" -m benchmarks.same_parameters "$folder/runs/first" "$folder/runs/second"

# Other sizes
for size in $others; do bench "bench_$size" 120 "$config" "$size" "$peers"; done
bench bench_large 180 "$large" "$large_size" "$peers"

echo "in all $SECONDS s; $summary and one file for each part"
exit "$failed"
