"""A gRPC server in this process whose answers are scripted, for tests of what the client sends and raises."""

import threading
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from contextlib import contextmanager

import grpc
import numpy as np
from tritonclient.grpc import service_pb2, service_pb2_grpc

from llamarec_client.contract import DEGRADED

GOOD = None


class Scripted(service_pb2_grpc.GRPCInferenceServiceServicer):
    """Answers each request with the next line of a script, and repeats the last line; records the requested models."""

    def __init__(self) -> None:
        self.script: Callable[[str, int], object] = lambda model, place: GOOD
        self.asked: list[str] = []
        self.reasons: list[str] = []
        """For each request, the parameter that gives the reason of a fallback."""
        self.ids: list[str] = []
        """For each request, its id."""
        self.release = "r1"
        """Release that the configuration of every ensemble names."""
        self.lock = threading.Lock()

    def says(self, **lines: list) -> None:
        self.asked.clear()
        self.reasons.clear()
        self.ids.clear()
        self.script = lambda model, place: lines[model][min(place, len(lines[model]) - 1)]

    def ModelConfig(self, request, context):  # noqa: N802 - the protocol's name
        steps = [{"model_name": f"{step}_{self.release}"} for step in ("features", "retriever")]
        config = {"name": request.name, "ensemble_scheduling": {"step": steps}}
        return service_pb2.ModelConfigResponse(config=config)

    def ModelInfer(self, request, context):  # noqa: N802 - the protocol's name
        with self.lock:
            self.asked.append(request.model_name)
            self.ids.append(request.id)
            self.reasons.append(request.parameters[DEGRADED].string_param)
            line = self.script(request.model_name, self.asked.count(request.model_name) - 1)
        if isinstance(line, float):
            time.sleep(line)
        elif line is not GOOD:
            context.abort(*line)
        columns = (("ITEM_ID", "BYTES"), ("SCORE", "FP32"), ("RETRIEVER_RANK", "INT32"))
        outputs = [{"name": name, "datatype": datatype, "shape": [1, 1]} for name, datatype in columns]
        contents = [
            b"\1\0\0\0" + (request.raw_input_contents[0][-1:] or b"-"),
            np.float32(1).tobytes(),
            np.int32(1).tobytes(),
        ]
        return service_pb2.ModelInferResponse(id=request.id, outputs=outputs, raw_output_contents=contents)


@contextmanager
def serve(
    host: str = "127.0.0.1", port: int = 0, credentials: grpc.ServerCredentials | None = None
) -> Iterator[tuple[Scripted, str]]:
    """Yield the script of a running server, and the server's address."""
    scripted, server = Scripted(), grpc.server(futures.ThreadPoolExecutor(64))
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(scripted, server)
    address = f"{host}:{port}"
    port = server.add_secure_port(address, credentials) if credentials else server.add_insecure_port(address)
    server.start()
    try:
        yield scripted, f"{host}:{port}"
    finally:
        server.stop(0).wait()
