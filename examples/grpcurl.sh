#!/usr/bin/env bash
# Request one recommendation with grpcurl: bash examples/grpcurl.sh 127.0.0.1:8001 50 181
# Triton does not support gRPC reflection, so the protocol is read from a file. Ids are sent as base64.
set -euo pipefail
url=$1
shift
here=$(cd "$(dirname "$0")" && pwd)
protocol=$(mktemp)
trap 'rm -f "$protocol"' EXIT
python "$here/protoset.py" "$protocol"
ids=$(for id in "$@"; do printf '"%s",' "$(printf %s "$id" | base64)"; done)
grpcurl -plaintext -protoset "$protocol" -max-time 30 -d @ "$url" inference.GRPCInferenceService/ModelInfer <<JSON
{"model_name": "llamarec",
 "inputs": [{"name": "HISTORY", "datatype": "BYTES", "shape": [1, $#], "contents": {"bytes_contents": [${ids%,}]}}]}
JSON
