"""Lints and renders the chart with Helm 4, in the environment of the image: `python helm.py CHART < VALUES_JSON`.

helm-sdkpy has no dry run. So the chart is installed into a server that answers as an empty Kubernetes cluster does, and
that stores nothing; Helm returns the manifests that it sent.
"""

import asyncio
import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

KINDS = {
    "v1": ("ConfigMap", "Secret", "Service"),
    "apps/v1": ("Deployment", "StatefulSet"),
    "autoscaling/v2": ("HorizontalPodAutoscaler",),
    "batch/v1": ("CronJob",),
    "policy/v1": ("PodDisruptionBudget",),
}
"""Kinds that the cluster has, by version; a chart with another kind cannot be installed."""
KUBECONFIG = """apiVersion: v1
kind: Config
clusters: [{{name: empty, cluster: {{server: "{}"}}}}]
users: [{{name: nobody, user: {{}}}}]
contexts: [{{name: empty, context: {{cluster: empty, user: nobody}}}}]
current-context: empty
"""


class EmptyCluster(BaseHTTPRequestHandler):
    """Answers what Helm asks of a cluster without objects: versions, kinds, and whether an object exists."""

    def log_message(self, *arguments: object) -> None:
        """Keep the standard error for errors."""

    def answer(self, status: int, body: Any, kind: str = "application/json") -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        groups = [version for version in KINDS if "/" in version]
        named = {f"/apis/{version}": version for version in groups} | {"/api/v1": "v1"}
        if path == "/version":
            self.answer(200, {"major": "1", "minor": "33", "gitVersion": "v1.33.0"})
        elif path == "/api":
            self.answer(200, {"kind": "APIVersions", "versions": ["v1"]})
        elif path == "/apis":
            self.answer(200, {"kind": "APIGroupList", "apiVersion": "v1", "groups": list(map(group, groups))})
        elif path in named:
            resources = list(map(resource, KINDS[named[path]]))
            self.answer(200, {"kind": "APIResourceList", "groupVersion": named[path], "resources": resources})
        elif path.endswith("/secrets"):
            self.answer(200, {"kind": "SecretList", "apiVersion": "v1", "items": []})
        else:
            self.answer(404, {"kind": "Status", "apiVersion": "v1", "reason": "NotFound", "code": 404})

    def do_POST(self) -> None:
        """Return the object as if it had been created."""
        content = self.rfile.read(int(self.headers["Content-Length"]))
        self.answer(201, content, self.headers["Content-Type"])  # Helm's own record is no JSON

    do_PUT = do_POST  # noqa: N815 - the name is that of http.server


def group(version: str) -> dict[str, Any]:
    name, number = version.split("/")
    named = {"groupVersion": version, "version": number}
    return {"name": name, "versions": [named], "preferredVersion": named}


def resource(kind: str) -> dict[str, Any]:
    verbs = ["create", "get", "list", "patch", "update", "delete"]
    return {"name": f"{kind.lower()}s", "singularName": "", "namespaced": True, "kind": kind, "verbs": verbs}


async def lint_and_render(chart: str, values: dict[str, Any], address: str) -> dict[str, Any]:
    """Return the messages of the linter and the manifests."""
    import helm_sdkpy

    configuration = helm_sdkpy.Configuration(namespace="default", kubeconfig=KUBECONFIG.format(address))
    linted = await helm_sdkpy.Lint(configuration).run(chart)
    installed = await helm_sdkpy.Install(configuration).run("shop", chart, values=values, wait=False)
    return {"linted": linted, "manifest": installed["manifest"]}


def main() -> None:
    cluster = ThreadingHTTPServer(("127.0.0.1", 0), EmptyCluster)
    threading.Thread(target=cluster.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{cluster.server_port}"
    print(json.dumps(asyncio.run(lint_and_render(sys.argv[1], json.load(sys.stdin), address))))


if __name__ == "__main__":
    main()
