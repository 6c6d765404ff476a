"""Serves one side of :mod:`benchmarks.framework`, with the code of the checkout that is the working directory.

    python -P benchmarks/framework_side.py REPOSITORY FOLDER constant|empty

It runs in checkouts of other versions too, so it takes nothing from ``benchmarks``. The models are written to FOLDER
with the checkout's own configurations and programs, and with links to the exported files of REPOSITORY. The address
of the server is printed; it stops at the end of standard input.
"""

import shutil
import sys
from pathlib import Path

from export.config import Serving, write_configs
from serving.contract import RELEASE_STEPS, STEPS, STORE_MODELS
from serving.server.local import LocalServer

CONSTANT_RANKER = '''
"""A ranker with all that belongs to a step, but without a model: it keeps the candidates' order."""

from llamarec_client.contract import ITEM_ID, RETRIEVER_RANK, SCORE
from serving.contract import CANDIDATE_ID, CANDIDATE_RANK, CANDIDATE_SCORE
from serving.steps.worker import Worker


class Constant:
    def answer(self, request):
        columns = (request[spec] for spec in (CANDIDATE_ID, CANDIDATE_SCORE, CANDIDATE_RANK))
        return dict(zip((ITEM_ID, SCORE, RETRIEVER_RANK), columns))

    def facts(self, request, answer, parameters):
        return {}


class TritonPythonModel:
    def initialize(self, args):
        self.worker = Worker.open("ranker", args, lambda folder: Constant())

    def execute(self, requests):
        return self.worker.execute(requests)

    def finalize(self):
        self.worker.finalize()
'''
EMPTY_STEP = '''
"""A step that reads its input and hands a thousand bytes on."""

import numpy as np
import triton_python_backend_utils as pb_utils

HANDED_ON = np.zeros((1, 1000), np.uint8)


class TritonPythonModel:
    def execute(self, requests):
        for request in requests:
            request.inputs()[0].as_numpy()
        return [pb_utils.InferenceResponse([pb_utils.Tensor("OUTPUT", HANDED_ON)]) for _ in requests]
'''
EMPTY_CONFIG = """
backend: "python"
max_batch_size: 64
input {{ name: "INPUT" data_type: {data_type} dims: -1 allow_ragged_batch: true }}
output {{ name: "OUTPUT" data_type: TYPE_UINT8 dims: -1 }}
instance_group {{ kind: KIND_CPU }}
dynamic_batching {{}}
"""


def write_constant(repository: Path, folder: Path, checkout: Path) -> None:
    """Write the checkout's models with a constant ranker."""
    write_configs(folder, Serving(pass_seconds=0.001))
    for name in STORE_MODELS:
        shutil.rmtree(folder / name, ignore_errors=True)
    # The stub ignores PYTHONPATH, and would take the installed packages.
    head = f"import sys\nsys.path[:0] = [{str(checkout / 'client')!r}, {str(checkout)!r}]\n"
    for step in RELEASE_STEPS:
        committed = checkout / "model_repository" / step / "1" / "model.py"
        text = CONSTANT_RANKER if step == "ranker" else committed.read_text(encoding="utf-8")
        (folder / step / "1" / "model.py").write_text(head + text, encoding="utf-8")
        exported = (repository / step / "1" / "artifact").resolve()
        if exported.exists():
            (folder / step / "1" / "artifact").symlink_to(exported)


def write_empty(folder: Path) -> None:
    """Write an ensemble of as many steps, which hand one tensor on and do nothing."""
    scheduled = ""
    for place, step in enumerate(STEPS):
        (folder / step / "1").mkdir(parents=True)
        (folder / step / "1" / "model.py").write_text(EMPTY_STEP, encoding="utf-8")
        config = EMPTY_CONFIG.format(data_type="TYPE_UINT8" if place else "TYPE_STRING")
        (folder / step / "config.pbtxt").write_text(f'name: "{step}"{config}', encoding="utf-8")
        names = ["HISTORY", *STEPS[:-1], "ITEM_ID"]
        scheduled += (
            f'step {{ model_name: "{step}" model_version: -1 input_map {{ key: "INPUT" value: "{names[place]}" }}'
            f' output_map {{ key: "OUTPUT" value: "{names[place + 1]}" }} }}\n'
        )
    (folder / "llamarec" / "1").mkdir(parents=True)
    (folder / "llamarec" / "config.pbtxt").write_text(
        'name: "llamarec" platform: "ensemble" max_batch_size: 64\n'
        'input { name: "HISTORY" data_type: TYPE_STRING dims: -1 }\n'
        'output { name: "ITEM_ID" data_type: TYPE_UINT8 dims: -1 }\n'
        f"ensemble_scheduling {{ {scheduled} }}\n",
        encoding="utf-8",
    )


def main() -> None:
    """Write the models and serve them."""
    repository, folder, kind = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    if kind == "empty":
        write_empty(folder)
    else:
        write_constant(repository, folder, Path.cwd())
    with LocalServer(folder) as server:
        print(server.url, flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    main()
