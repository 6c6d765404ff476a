"""Access to the server: TLS, listening addresses, the operators' key, and requests beyond the limits."""

import json
import stat
import subprocess
import urllib.error
import urllib.request

import numpy as np
import pytest
from echo import write_echo
from supervised import ask, inputs_of, serving
from tritonclient import grpc
from tritonclient.utils import InferenceServerException

from export.config import Serving, write_configs
from llamarec_client.contract import MAX_HISTORY
from llamarec_client.errors import InvalidRequest, ServerUnavailable
from llamarec_client.recommender import RecommenderClient
from serving.server.control import CONTROL_FILE, KEY_HEADER, Control


@pytest.fixture(scope="module")
def echo(tmp_path_factory):
    repository = tmp_path_factory.mktemp("echo")
    write_configs(repository, Serving(pass_seconds=0.001))
    write_echo(repository)
    return repository


@pytest.fixture(scope="module")
def served(echo, tmp_path_factory):
    with serving(echo, tmp_path_factory.mktemp("served") / "log") as running:
        yield running


@pytest.fixture(scope="module")
def certificates(tmp_path_factory):
    """Create a certificate authority, and certificates for a server and a client that it signed."""
    folder = tmp_path_factory.mktemp("certificates")

    def openssl(*words):
        subprocess.run(["openssl", *words], cwd=folder, check=True, capture_output=True)

    key = ["-newkey", "rsa:2048", "-nodes"]
    openssl("req", "-x509", *key, "-keyout", "ca.key", "-out", "ca.crt", "-subj", "/CN=test authority", "-days", "1")
    (folder / "san").write_text("subjectAltName=IP:127.0.0.1")
    for name in ("server", "client"):
        openssl("req", *key, "-keyout", f"{name}.key", "-out", f"{name}.csr", "-subj", f"/CN={name}")
        signed = ["-CA", "ca.crt", "-CAkey", "ca.key", "-CAcreateserial", "-days", "1", "-extfile", "san"]
        openssl("x509", "-req", "-in", f"{name}.csr", "-out", f"{name}.crt", *signed)
    return folder


def tls_flags(folder):
    return [
        "--grpc-use-ssl=1",
        f"--grpc-server-cert={folder}/server.crt",
        f"--grpc-server-key={folder}/server.key",
        f"--grpc-root-cert={folder}/ca.crt",
    ]


def answers(url, **tls):
    """Return whether a request with these credentials is answered."""
    with grpc.InferenceServerClient(url, ssl=bool(tls), **tls) as client:
        try:
            client.infer("llamarec", inputs_of(["a"]), client_timeout=5)
        except InferenceServerException:
            return False
    return True


@pytest.mark.parametrize("mutual", [False, pytest.param(True, marks=pytest.mark.smoke)])
def test_tls(echo, certificates, tmp_path, mutual):
    """Plain text is refused, and mutual TLS also requires a client certificate that the authority signed.

    The supervisor's probes still work, so the service stays ready.
    """
    flags = [*tls_flags(certificates), *(["--grpc-use-ssl-mutual=1"] if mutual else [])]
    root = {"root_certificates": str(certificates / "ca.crt")}
    own = {"private_key": str(certificates / "client.key"), "certificate_chain": str(certificates / "client.crt")}
    with serving(echo, tmp_path / "log", *flags) as served:
        assert answers(served.url, **root, **own)
        assert answers(served.url, **root) == (not mutual)
        assert not answers(served.url)
        assert served.health()[0] == 200


def listening(port: int) -> set[str]:
    """Return the local addresses, in the kernel's hexadecimal form, that have a listener on the port."""
    lines = [line.split() for line in open("/proc/net/tcp").read().splitlines()[1:]]  # noqa: SIM115
    pairs = [line[1].split(":") for line in lines if line[3] == "0A"]
    return {address for address, number in pairs if int(number, 16) == port}


def test_http_is_reachable_from_this_machine_only(served):
    """HTTP listens on 127.0.0.1 only, whereas gRPC listens on all addresses or on IPv6's wildcard."""
    assert listening(int(served.http_url.split(":")[1])) == {"0100007F"}


RESTRICTED_CALLS = {
    "load a model": lambda client, headers: client.load_model("features", headers=headers),
    "list models": lambda client, headers: client.get_model_repository_index(headers=headers),
    "shared memory": lambda client, headers: client.get_system_shared_memory_status(headers=headers),
    "tracing": lambda client, headers: client.get_trace_settings(headers=headers),
    "logging": lambda client, headers: client.update_log_settings({"log_verbose_level": 1}, headers=headers),
}


@pytest.mark.parametrize("call", RESTRICTED_CALLS)
def test_operators_calls_want_the_key(served, call):
    """Calls for models, shared memory, traces and logging need the key; without it, or with a wrong one, they fail."""
    key = {f"triton-grpc-protocol-{KEY_HEADER}": Control.read(served.repository).key}
    with grpc.InferenceServerClient(served.url) as client:
        for headers in (None, {**key, next(iter(key)): "wrong"}):
            with pytest.raises(InferenceServerException, match="restricted"):
                RESTRICTED_CALLS[call](client, headers)
        RESTRICTED_CALLS[call](client, key)


@pytest.mark.parametrize("path", ["repository/index", "repository/models/features/unload", "logging"])
def test_the_same_over_http(served, path):
    request = urllib.request.Request(f"http://{served.http_url}/v2/{path}", data=b"{}", method="POST")
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request, timeout=5)
    assert refused.value.code == 403


def test_items_are_changed_with_the_operators_key_only(served):
    """The key of the control file gets a request as far as the store, of which this server has none."""
    with RecommenderClient(served.url) as client:
        with pytest.raises(InvalidRequest, match="items: KEY is not the admin key of this server"):
            client.hide_items(["50"], key="wrong")
        with pytest.raises(ServerUnavailable, match="items: the store of items is not named"):
            client.hide_items(["50"], key=Control.read(served.repository).key)


def test_the_key_is_for_this_user_only(served):
    """The key's file in the repository has mode 0600; neither a step's environment nor the log contains the key."""
    path = served.repository / CONTROL_FILE
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    key = json.loads(path.read_text())["key"]
    for step in ("ranker", "items"):
        with open(f"/proc/{served.stubs(step)[0]}/environ", "rb") as environment:
            assert key.encode() not in environment.read()
    answers_log = "\n".join(line for line in served.log_path.read_text().splitlines() if line.startswith("{"))
    assert key not in answers_log


def test_an_enormous_request_is_refused_by_the_first_step(echo, artifacts, repository, tmp_path):
    """Requests far beyond the limits, which another client may send, are refused by name; the next one is answered."""
    with serving(repository, tmp_path / "log") as served:
        with grpc.InferenceServerClient(served.url) as client:
            for history in (["x"] * (10 * MAX_HISTORY), ["x" * (8 << 20)]):
                with pytest.raises(InferenceServerException, match="features: HISTORY") as refused:
                    client.infer("llamarec", inputs_of(history))
                assert refused.value.status() == "StatusCode.INVALID_ARGUMENT"
            tensor = grpc.InferInput("HISTORY", [1, 1], "BYTES")
            tensor.set_data_from_numpy(np.array([[b"\xff\xfe"]], dtype=object))
            with pytest.raises(InferenceServerException, match=r"features: HISTORY.*UTF-8"):
                client.infer("llamarec", [tensor])
        assert len(ask(served.url, ["50"])) == 20
