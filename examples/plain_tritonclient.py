"""Requests one recommendation with NVIDIA's tritonclient alone, without `llamarec-client`.

python examples/plain_tritonclient.py 127.0.0.1:8001 50 181
"""

import sys

import numpy as np
from tritonclient import grpc

url, *history = sys.argv[1:]

# STRING tensors are object arrays of bytes. The first dimension is the batch; a request holds one user.
ids = np.empty((1, len(history)), dtype=np.object_)
ids[0] = [item.encode() for item in history]
tensor = grpc.InferInput("HISTORY", list(ids.shape), "BYTES")
tensor.set_data_from_numpy(ids)

with grpc.InferenceServerClient(url) as client:
    result = client.infer("llamarec", [tensor], client_timeout=30)
for item, score in zip(result.as_numpy("ITEM_ID")[0], result.as_numpy("SCORE")[0], strict=True):
    print(item.decode(), f"{score:.4f}")
