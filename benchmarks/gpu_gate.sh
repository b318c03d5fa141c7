#!/usr/bin/env bash
# Everything that a GPU has to show, in parts with a time limit each: builds the extension, runs the GPU tests, looks for
# bad memory accesses, and times the kernels.
#
#   benchmarks/gpu_gate.sh OUT_DIR        e.g. benchmarks/gpu_gate.sh results
#   ONLY="build tests" SKIP="sanitizer" benchmarks/gpu_gate.sh OUT_DIR
#
# Parts: facts build tests sanitizer speed. Each has a log (OUT_DIR/<part>.log) and a time limit; a part that fails does
# not stop the others. OUT_DIR/summary.txt says how each went, and a part that is "ok" there is not run again (delete
# the file to start anew). Exit status: 0 all ok, 1 a part failed, 2 nothing could be run.
#
# Downloads nothing: python3 must have torch with CUDA, triton, pytest, hypothesis, pybind11, cmake, ninja, setuptools.
# The package is installed into build/gate-site, not into the Python that runs this.
set -uo pipefail

if [ $# -ne 1 ]; then
    sed -n '2,/^set /{s/^# \{0,1\}//;/^set /d;p}' "$0" >&2
    exit 2
fi
mkdir -p "$1" && out=$(cd "$1" && pwd) || exit 2
cd "$(dirname "$0")/.." || exit 2
python=${PYTHON:-python3}
site=$PWD/build/gate-site
summary=$out/summary.txt
touch "$summary"
export PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1

if ! problem=$("$python" - <<'PYTHON' 2>&1 | tail -n 1
try:
    import torch
except ImportError as error:
    raise SystemExit(f"torch cannot be imported ({error})")
if not torch.cuda.is_available():
    raise SystemExit("torch sees no CUDA GPU here" + ("" if torch.version.cuda else " (and is a CPU build)"))
PYTHON
); then
    echo "gpu_gate: nothing can be run: $problem" | tee -a "$summary" >&2
    exit 2
fi

failed=0
part() { # part NAME SECONDS FUNCTION
    local name=$1 limit=$2 status start=$SECONDS
    if [ -n "${ONLY:-}" ] && [[ " $ONLY " != *" $name "* ]]; then return; fi
    if [[ " ${SKIP:-} " == *" $name "* ]]; then echo "$name: skipped as asked" | tee -a "$summary"; return; fi
    if grep -q "^$name: ok" "$summary"; then echo "$name: ok before, not run again"; return; fi
    # A fresh bash under `timeout`, so that the limit holds for whatever the part starts.
    timeout --kill-after=10 "$limit" bash -c "set -uo pipefail; $(declare -f "$3"); $3" >"$out/$name.log" 2>&1
    status=$?
    case $status in
        0) echo "$name: ok in $((SECONDS - start)) s" ;;
        77) echo "$name: skipped: $(tail -n 1 "$out/$name.log")" ;;
        124 | 137) echo "$name: FAILED: over its limit of $limit s ($name.log)" ;;
        *) echo "$name: FAILED with status $status: $(tail -n 1 "$out/$name.log") ($name.log)" ;;
    esac | tee -a "$summary"
    [ $status -eq 0 ] || [ $status -eq 77 ] || failed=1
}

facts() {
    nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.sm,clocks.mem --format=csv
    (command -v nvcc && nvcc --version) || echo "no nvcc on PATH"
    "$python" -c "
import platform, torch
print('python', platform.python_version(), '| torch', torch.__version__, '| CUDA', torch.version.cuda)
print(torch.cuda.get_device_properties(0))
try:
    import triton
    print('triton', triton.__version__)
except ImportError as error:
    print('no triton:', error)"
    git rev-parse HEAD 2>/dev/null || echo "no git here"
}

build() {
    rm -rf "$site"
    TRANSFUSE_CUDA=require "$python" -m pip install -v --no-build-isolation --no-deps --no-index --target "$site" . &&
        PYTHONPATH=$site "$python" -c "
from transfuse import _extension
assert _extension.load() is not None, _extension.why_not()
print(_extension.info())"
}

tests() {
    # Side by side: what takes long is Triton compiling on the CPU. The options of pyproject.toml need plugins that may be
    # missing here; the markers stay known.
    local common="-o addopts=-ra -p no:cacheprovider -q --durations=5" file shard pids=() names=() status=0 i
    local both="cuda or triton"
    while IFS=: read -r file shards; do
        while IFS= read -rd ';' shard; do
            local name=tests-$(basename "$file" .py)-${#names[@]}
            PYTHONPATH=$site "$python" -m pytest $common -m "not slow" -k "$shard" "$file" >"$out/$name.log" 2>&1 &
            pids+=($!) names+=("$name $shard")
        done <<<"$shards;"
    done <<LIST
tests/test_cuda_binding.py:not nothing
tests/test_extension.py:not nothing
tests/test_backends.py:not nothing
tests/test_cuda_on_cpu.py:not nothing
tests/test_triton_launch.py:not nothing
tests/test_kernels_on_gpu.py:cuda;triton and attention;triton and not attention
tests/test_norm.py:cuda;triton
tests/test_causal_softmax.py:cuda;triton
tests/test_causal_softmax_kernels.py:$both
tests/test_ffn.py:$both
tests/test_ffn_cuda.py:not nothing
tests/test_rotary.py:$both
tests/test_attention.py:cuda;triton and float32;triton and bfloat16;triton and float16 and not bfloat16;triton and not float
tests/test_attention_varlen.py:cuda;triton and float32;triton and not float32
tests/test_attention_decode.py:cuda;triton and float32;triton and not float32
tests/test_attention_weights.py:$both
tests/test_attention_splits.py:not nothing
tests/test_attention_gradients.py:cuda;triton
tests/test_cuda_shapes.py:not nothing
LIST
    for i in "${!pids[@]}"; do
        wait "${pids[$i]}"
        case $? in
            0 | 5) ;;  # 5: the shard selected nothing
            *) status=1 ;;
        esac
        echo "${names[$i]}: $(tail -n 1 "$out/${names[$i]%% *}.log")"
    done
    return $status
}

sanitizer() {
    command -v compute-sanitizer >/dev/null || { echo "compute-sanitizer was not found"; exit 77; }
    # Small cases of every CUDA kernel; racecheck looks at shared memory, initcheck at reads of what nobody wrote.
    local tool status=0
    for tool in memcheck racecheck initcheck; do
        PYTHONPATH=$site timeout 100 compute-sanitizer --tool $tool --error-exitcode 9 --target-processes all \
            "$python" -m pytest -o addopts=-ra -p no:cacheprovider -q -x tests/test_kernels_on_gpu.py \
            -k "cuda and goes_to_the_current_stream" >"$out/sanitizer-$tool.log" 2>&1 || status=1
        echo "$tool: $(tail -n 1 "$out/sanitizer-$tool.log")"
    done
    return $status
}

speed() {
    local op status=0
    for op in norm softmax decode varlen attention ffn; do  # the shortest first: what time cuts off is the longest
        PYTHONPATH=$site "$python" benchmarks/bench_gpu.py --op $op --seconds ${SPEED_SECONDS:-50} --json "$out/$op.json"
        [ $? -le 1 ] || status=1
    done
    return $status
}

export out python site
part facts 20 facts
part build 170 build
part tests 400 tests
part sanitizer 320 sanitizer
part speed 400 speed
echo "--- $summary"
exit $failed
