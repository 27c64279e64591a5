#!/usr/bin/env bash
# What needs a GPU, in at most 8 minutes on one: the suite's core and the audit's deterministic part on
# it, then times and memory in float32 and bfloat16. Tables and results go to a folder.
#
#     benchmarks/gpu.sh [FOLDER]                # default: gpu-results
#     DEVICE=cpu benchmarks/gpu.sh [FOLDER]     # the same commands at small sizes, to try them out
#
# Exit status 0 if everything ran and passed; a step that takes too long is stopped, and counts as failed.
set -u
cd "$(dirname "$0")/.."
folder=${1:-gpu-results}
device=${DEVICE:-cuda}
python=${PYTHON:-python}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-4} HYPOTHESIS_PROFILE=quick

core=(tests/test_sensitivity.py tests/test_rules.py tests/joint/test_flat.py tests/joint/test_guarantee.py
    tests/test_noise.py tests/test_noise_draws.py)
cases=(transformer resnet18-gn lora)
arms=(non-private joint-exact layerwise-weighted hooks)
rounds=(--rounds 20 --limit 8 --processes 1)
audited=()
if [ "$device" = cpu ]; then
    core=(tests/test_noise.py tests/test_noise_draws.py)
    cases=(lstm)
    arms=(non-private joint-exact)
    rounds=(--rounds 1 --limit 0 --processes 1)
    audited=(--case linear conv --searches 5)
fi

mkdir -p "$folder"
failed=0

# run NAME SECONDS COMMAND...: runs a command for so long at most, and keeps what it prints.
run() {
    local name=$1 seconds=$2
    shift 2
    echo "== $name"
    local start=$SECONDS status=0
    timeout "$seconds" "$@" > "$folder/$name.txt" 2> "$folder/$name.log" || status=$?
    tail -n 40 "$folder/$name.txt"
    if [ $status -ne 0 ]; then
        failed=1
        tail -n 20 "$folder/$name.log"
    fi
    echo "== $name: status $status after $((SECONDS - start)) seconds"
}

run tests 150 "$python" -m pytest -q -p no:cacheprovider --device "$device" "${core[@]}"
run audit 60 "$python" benchmarks/gpu_audit.py --device "$device" "${audited[@]}"
for precision in float32 bfloat16; do
    run "bench-$precision" 130 "$python" -m opacus_bpclip bench --device "$device" \
        --precision "$precision" --case "${cases[@]}" --arms "${arms[@]}" "${rounds[@]}" \
        --json "$folder/bench-$precision.json" --markdown "$folder/bench-$precision.md"
done
exit $failed
