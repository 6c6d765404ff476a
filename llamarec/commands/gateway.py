"""`llamarec gateway`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llamarec.options import DEFAULT_ARTIFACTS, DEFAULT_REPOSITORY, DEFAULT_SERVER, Artifacts, Repository, addresses
from llamarec.tables import messages
from preprocessing.errors import InputError

if TYPE_CHECKING:
    from starlette.types import ASGIApp

    from llamarec.gateway.options import GatewayOptions


def gateway(
    servers: Annotated[
        str,
        typer.Option(
            help="HOST:PORT of the servers' gRPC endpoints, separated by commas, or `dns:///NAME:PORT` for all"
            " addresses of a name."
        ),
    ] = DEFAULT_SERVER,
    host: Annotated[str, typer.Option(help="Address to listen on. Any but loopback needs API keys.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.")] = 8090,
    api_keys: Annotated[
        Path | None,
        typer.Option(
            help="File with the SHA-256 of one API key in each line, as `printf %s KEY | sha256sum` prints it. Keys can"
            " also be in LLAMAREC_GATEWAY_KEYS, separated by commas."
        ),
    ] = None,
    no_keys: Annotated[
        bool, typer.Option("--no-keys", help="Listen without API keys, for example behind a proxy that asks for them.")
    ] = False,
    timeout: Annotated[
        float, typer.Option(help="Seconds until a request fails; X-Request-Timeout shortens it.")
    ] = 30.0,
    body_bytes: Annotated[int, typer.Option(help="Maximum size of a request's body.")] = 4 * 2**20,
    in_flight: Annotated[int, typer.Option(help="Maximum number of requests in flight; further ones get 429.")] = 256,
    drain_seconds: Annotated[int, typer.Option(help="Seconds to finish requests in flight after SIGTERM.")] = 20,
    certificate: Annotated[Path | None, typer.Option(help="PEM file with the gateway's certificate: HTTPS.")] = None,
    private_key: Annotated[Path | None, typer.Option(help="PEM file with the private key of --certificate.")] = None,
    server_ca: Annotated[
        Path | None,
        typer.Option(help="PEM file of the authority that signed the servers' certificates: gRPC over TLS."),
    ] = None,
    client_certificate: Annotated[
        Path | None, typer.Option(help="PEM file with the certificate that the gateway shows the servers (mutual TLS).")
    ] = None,
    client_key: Annotated[
        Path | None, typer.Option(help="PEM file with the private key of --client-certificate.")
    ] = None,
    page: Annotated[
        bool, typer.Option("--page", help="Also serve the demo's page, for this machine; needs both folders below.")
    ] = False,
    artifacts: Artifacts = DEFAULT_ARTIFACTS,
    repository: Repository = DEFAULT_REPOSITORY,
) -> None:
    """Offer the recommender as JSON over HTTP, also in the shape of Jina's and Cohere's rerank APIs.

    SIGTERM and SIGINT stop it in order.
    """
    try:
        from llamarec.gateway.keys import KEYS_VARIABLE, read_keys
        from llamarec.gateway.options import GatewayOptions
        from llamarec.gateway.server import run
    except ModuleNotFoundError as error:
        raise InputError(f"the gateway needs {error.name}: pip install 'llamarec[gateway]'") from None
    from llamarec_client import Tls

    options = GatewayOptions(
        servers=addresses(servers),
        host=host,
        port=port,
        timeout=timeout,
        body_bytes=body_bytes,
        in_flight=in_flight,
        drain_seconds=drain_seconds,
        certificate=certificate,
        private_key=private_key,
    )
    keys = read_keys(api_keys)
    if not keys and not options.on_loopback and not no_keys:
        raise InputError(
            f"--host {host} can be reached from other machines: give API keys with --api-keys or {KEYS_VARIABLE}, or"
            " --no-keys if something else checks who calls"
        )
    given = (server_ca, client_certificate, client_key)
    tls = Tls(*given) if any(given) else None
    shown = _page(options, bool(keys), artifacts, repository) if page else None
    run(options, keys, tls, lambda url: messages.print(f"gateway: {url}", highlight=False, soft_wrap=True), shown)


def _page(options: "GatewayOptions", needs_keys: bool, artifacts: Path, repository: Path) -> "ASGIApp":
    """Return the demo's page, which has no keys and shows one server.

    Raises:
        InputError: others could reach the page, there are several servers, or the folders do not fit each other.
    """
    if needs_keys or not options.on_loopback or len(options.servers) > 1:
        raise InputError("--page serves one server to this machine: leave out --host, API keys and further servers")
    from llamarec.page.app import DemoPage, create_app
    from preprocessing.data import load_data
    from serving.evaluation import check_exported_from

    data = load_data(artifacts)
    check_exported_from(repository, data)
    return create_app(DemoPage.open(options.servers[0], repository, data))
