#!/usr/bin/env bash
# A session of serving the demo's adapter, with nothing but what `make demo` or `make test` has set up. Some fifteen minutes on two cores.
#
#   demo/serve.sh FOLDER
#
# 1. The adapter is served. A worse copy of it is put, asked beside the users, found out, and rolled back.
# 2. The merged model is put as a canary for half of the users, on an engine of its own, while users ask.
# 3. The log of that becomes pairs of blocks, and decide judges them.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:?name a folder for what comes of it}
peftopt=${PEFTOPT:-.venv/bin/peftopt} python=${PYTHON:-.venv/bin/python} base=models/smollm2-135m-instruct port=${PORT:-8765}
mkdir -p "$out"
export HF_HUB_OFFLINE=1
admin="unix:$out/state/admin.sock"
say() { printf '\n$ %s\n' "$*" | tee -a "$out/transcript.txt"; }
run() { say "$@"; local code=0; "$@" 2>&1 | tee -a "$out/transcript.txt" || code=$?; echo "exit $code" | tee -a "$out/transcript.txt"; }

: > "$out/transcript.txt"
"$python" demo/worse.py "$out/worse" --scale 0.3
"$peftopt" merge --base "$base" --adapter demo/adapter --out "$out/merged" --certify full
grep '"short"' demo/data/eval.jsonl > "$out/prompts.jsonl"

say peftopt serve --engine eager --base "$base" --adapter triage=demo/adapter --log "$out/requests.jsonl"
"$peftopt" serve --engine eager --base "$base" --adapter triage=demo/adapter --adapters-from "$out" --state "$out/state" \
  --log "$out/requests.jsonl" --port "$port" > "$out/serve.txt" 2>&1 &
gateway=$!
trap 'kill $gateway 2>/dev/null || true; wait $gateway || true' EXIT
until curl -sf "localhost:$port/health/ready" > /dev/null; do kill -0 $gateway; sleep 1; done

run "$peftopt" adapters put triage="$out/worse" --prompts "$out/prompts.jsonl" --schema demo/data/schema.json --new-tokens 64 \
  --for 30m --then promote --admin "$admin"
run "$peftopt" adapters report triage --admin "$admin"
run "$peftopt" adapters put triage="$out/merged" --canary 50% --admin "$admin"
run "$peftopt" adapters list --admin "$admin"
: > "$out/requests.jsonl"    # the session to decide on begins here
kill -HUP $gateway
run "$peftopt" load "http://127.0.0.1:$port" --model triage --prompts "$out/prompts.jsonl" --concurrency 2 --requests "${REQUESTS:-150}" \
  --new-tokens 48 --quiet
run "$peftopt" adapters rollback triage --admin "$admin"
kill $gateway; wait $gateway || true; trap - EXIT

rm -f "$out/measurements.jsonl"
run "$peftopt" import "$out/requests.jsonl" --window 20 --variant live=adapter --variant canary=merged --workload chat \
  --out "$out/measurements.jsonl"
run "$peftopt" decide "$out" --recipe demo/serve.yaml
