#!/usr/bin/env bash
# Serve a MaxText Gemma 4 checkpoint over HTTP and send one request.
#
#   examples/serve.sh gs://bucket/run/checkpoints google/gemma-4-26B-A4B-it [vllm serve options]
#
# The checkpoint is a run or its checkpoint directory (newest committed step), a step, or an items directory.
# Another step:      --model-loader-extra-config '{"step": 1000}'
# Eight TPU chips:   --tensor-parallel-size 8
# Longest request:   --max-model-len 8192
set -euo pipefail
checkpoint=${1:?usage: serve.sh CHECKPOINT TOKENIZER [options]}
tokenizer=${2:?usage: serve.sh CHECKPOINT TOKENIZER [options]}
shift 2
port=${PORT:-8000}

vllm serve "$checkpoint" --load-format maxtext --tokenizer "$tokenizer" \
  --served-model-name gemma --port "$port" "$@" &
server=$!
trap 'kill "$server"' EXIT
until curl --silent --fail "http://127.0.0.1:$port/health" >/dev/null; do
  kill -0 "$server" || exit 1
  sleep 2
done
curl --silent "http://127.0.0.1:$port/v1/chat/completions" -H 'Content-Type: application/json' \
  -d '{"model": "gemma", "messages": [{"role": "user", "content": "What is a checkpoint?"}], "max_tokens": 64}'
