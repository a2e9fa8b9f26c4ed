#!/usr/bin/env bash
# Searches of 400 users, one after the other, until Ctrl-C; every 50 calls it says which pipelines answered.
#   examples/rollouts/traffic.sh [URL]
url=${1:-${SERVE_APP_URL:-http://127.0.0.1:8000}}
mapfile -t queries < <(sed -n 's/.*"text": \("[^"]*"\).*/\1/p' "$(dirname "$0")/../queries.jsonl")

declare -A pipelines
for ((call = 1; ; call++)); do
  body="{\"query\": ${queries[RANDOM % ${#queries[@]}]}, \"user\": \"user-$((RANDOM % 400))\"}"
  answer=$(curl -s -m 30 "$url/v1/search" -d "$body")
  [[ $answer =~ \"pipeline\":\"([^\"]+)\" ]] && pipeline=${BASH_REMATCH[1]} || pipeline=failed
  ((pipelines[$pipeline]++))
  if ((call % 50 == 0)); then
    summary=
    for pipeline in "${!pipelines[@]}"; do summary+="  $pipeline ${pipelines[$pipeline]}"; done
    echo "$(date +%T)$summary"
    pipelines=()
  fi
done
