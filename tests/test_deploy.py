"""The deployment files, as far as they can be checked without a container engine and a cluster."""

import configparser
import json
import re
import subprocess
import sys
from pathlib import Path

import kubernetes_validate
import pytest
import typer
import yaml
from chart import EVERYTHING_ON, render

from llamarec.cli import app
from llamarec.commands.refresh import REFUSED

ROOT = Path(__file__).resolve().parents[1]
DEPLOY = ROOT / "deploy"
DOCKERFILES = [ROOT / "Dockerfile", DEPLOY / "cpu.Dockerfile", DEPLOY / "gateway.Dockerfile"]
HEALTH_PORT, METRICS_PORT, GATEWAY_PORT = 8080, 8002, 8090
PROGRAMS = {
    "Dockerfile": (["serve", "--health-port", str(HEALTH_PORT)], f"{HEALTH_PORT}/ready"),
    "cpu.Dockerfile": (["serve", "--health-port", str(HEALTH_PORT)], f"{HEALTH_PORT}/ready"),
    "gateway.Dockerfile": (["gateway", "--host", "0.0.0.0"], f"{GATEWAY_PORT}/health/ready"),
}
"""What each image runs, and the address of its health check."""


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_hadolint_accepts_the_dockerfiles(path):
    """Both Dockerfiles pass hadolint's default rules at every severity."""
    program = Path(sys.executable).parent / "hadolint"
    run = subprocess.run([program, path], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_an_image_holds_what_it_runs(path):
    """Every COPY finds its sources in the build context, and the health check uses the port that the program opens."""
    text = path.read_text()
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    for line in re.findall(r"^COPY (.+)$", text, re.MULTILINE):
        for source in line.split()[:-1]:
            assert (ROOT / source).exists()
            assert source in allowed
    packages = {folder.parent.name for folder in ROOT.glob("*/__init__.py")} - {"benchmarks", "experiments"}
    assert packages | {"client"} <= set(re.findall(r"^COPY (\w+) \w+$", text, re.MULTILINE))
    assert re.search(r"pip install [^&]* \./client '\.\[(serve|gateway)", text), (
        "the client is a distribution of its own"
    )
    (entry,) = re.findall(r"^ENTRYPOINT (.+)$", text, re.MULTILINE)
    arguments, health = PROGRAMS[path.name]
    assert json.loads(entry) == ["llamarec", *arguments]
    assert f"http://127.0.0.1:{health}" in text
    assert re.search(r"^USER [1-9]\d*$", text, re.MULTILINE), "not as root"


def test_the_image_for_production_is_newer_than_the_fixes_of_http():
    """The base image is at least 25.07, the first tag with NVIDIA's fixes of August 2025."""
    (tag,) = re.findall(r"tritonserver:([\d.]+)-py3$", DOCKERFILES[0].read_text(), re.MULTILINE)
    assert tuple(map(int, tag.split("."))) >= (25, 7)


def test_compose_binds_to_loopback_and_mounts_what_exists():
    """Ports bind to loopback, images are pinned, mounted files exist, and Prometheus scrapes the service's ports."""
    compose = yaml.safe_load((DEPLOY / "compose.yml").read_text())
    services = compose["services"]
    assert set(services) == {"llamarec", "gateway", "redis", "prometheus", "grafana"}
    for name, service in services.items():
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))
        if "image" in service:
            assert re.search(r":v?\d+\.\d+\.\d+$", service["image"]), f"{name} is pinned"
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            assert source in compose["volumes"] or (DEPLOY / source).exists()
    for name, dockerfile in (("llamarec", DOCKERFILES[1]), ("gateway", DOCKERFILES[2])):
        build = services[name]["build"]
        assert (DEPLOY / build["context"] / build["dockerfile"]).resolve() == dockerfile
    assert services["gateway"]["profiles"] == ["gateway"], "not started by default"
    jobs = yaml.safe_load((DEPLOY / "prometheus.yml").read_text())["scrape_configs"]
    targets = {target for job in jobs for config in job["static_configs"] for target in config["targets"]}
    assert targets == {f"llamarec:{METRICS_PORT}", f"llamarec:{HEALTH_PORT}", f"gateway:{GATEWAY_PORT}"}


@pytest.mark.parametrize("values", [{}, EVERYTHING_ON], ids=["defaults", "everything on"])
def test_kubernetes_accepts_the_chart(values):
    """Every manifest is valid under the strict schemas of the latest Kubernetes version."""
    manifests = render(values)
    kinds = [manifest["kind"] for manifest in manifests]
    own = ["ConfigMap", "Deployment", "HorizontalPodAutoscaler", "PodDisruptionBudget", "Service"]
    optional = ["Service", "StatefulSet", "Service", "Deployment", "CronJob"]  # of Redis, gateway and refresh
    assert sorted(kinds) == sorted(own + (optional if values else []))
    for manifest in manifests:
        kubernetes_validate.validate(manifest, kubernetes_validate.latest_version(), strict=True)


def test_the_charts_probes_ask_the_supervisor():
    """The pod is ready while every step answers, and live while the supervisor, which restarts steps, runs."""
    (deployment,) = (manifest for manifest in render({}) if manifest["kind"] == "Deployment")
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert (ports["health"], ports["metrics"]) == (HEALTH_PORT, METRICS_PORT)
    probes = {name: container[f"{name}Probe"]["httpGet"] for name in ("startup", "readiness", "liveness")}
    assert {probe["port"] for probe in probes.values()} == {"health"}
    assert {name: probe["path"] for name, probe in probes.items()} == {
        "startup": "/ready",
        "readiness": "/ready",
        "liveness": "/live",
    }


def test_the_charts_service_names_every_replica():
    """Without an address of its own, the service's name resolves to each ready replica, over which the client spreads
    its requests; a replica that is still loading must not be among them.
    """
    (service,) = (manifest for manifest in render({}) if manifest["kind"] == "Service")
    assert service["spec"]["clusterIP"] == "None"
    assert not service["spec"].get("publishNotReadyAddresses")
    assert ("grpc", 8001) in [(port["name"], port["port"]) for port in service["spec"]["ports"]]


def test_compose_and_chart_run_redis_so_that_nothing_is_lost():
    """Both with the same options, which docs/events.md asks for. The service of the recommender selects no Redis."""
    options = "redis-server --appendonly yes --appendfsync always --maxmemory-policy noeviction"
    services = yaml.safe_load((DEPLOY / "compose.yml").read_text())["services"]
    assert " ".join(services["redis"]["command"]) == options
    assert services["llamarec"]["environment"] == {"LLAMAREC_STORE": "redis://redis:6379/0"}
    manifests = render({"redis": EVERYTHING_ON["redis"]})
    (redis,) = (manifest for manifest in manifests if manifest["kind"] == "StatefulSet")
    (container,) = redis["spec"]["template"]["spec"]["containers"]
    assert " ".join(container["args"]) == options
    (deployment,) = (manifest for manifest in manifests if manifest["kind"] == "Deployment")
    (server,) = deployment["spec"]["template"]["spec"]["containers"]
    assert {"name": "LLAMAREC_STORE", "value": "redis://shop-redis:6379/0"} in server["env"]
    selectors = {m["metadata"]["name"]: m["spec"]["selector"] for m in manifests if m["kind"] == "Service"}
    labels = redis["spec"]["template"]["metadata"]["labels"]
    assert {name for name, wanted in selectors.items() if wanted.items() <= labels.items()} == {"shop-redis"}


def test_the_charts_gateway_finds_the_servers_and_drains():
    """It asks the headless service by name, its probes are those of its port, and a pod has the time to drain. The
    recommender's service does not select it.
    """
    manifests = render({"gateway": EVERYTHING_ON["gateway"]})
    (pod,) = (
        manifest["spec"]["template"]
        for manifest in manifests
        if manifest["kind"] == "Deployment" and manifest["metadata"]["name"] == "shop-gateway"
    )
    (container,) = pod["spec"]["containers"]
    assert container["ports"] == [{"name": "http", "containerPort": GATEWAY_PORT}]
    assert container["args"] == ["--servers=dns:///shop:8001", "--drain-seconds=20"]
    assert container["env"][0]["valueFrom"] == {"secretKeyRef": {"name": "keys", "key": "keys"}}
    probes = {container[f"{name}Probe"]["httpGet"]["path"] for name in ("readiness", "liveness")}
    assert probes == {"/health/ready", "/health/live"}
    waited = int(container["lifecycle"]["preStop"]["exec"]["command"][1])
    assert waited + 20 < pod["spec"]["terminationGracePeriodSeconds"]
    selectors = {m["metadata"]["name"]: m["spec"]["selector"] for m in manifests if m["kind"] == "Service"}
    labels = pod["metadata"]["labels"]
    assert {name for name, wanted in selectors.items() if wanted.items() <= labels.items()} == {"shop-gateway"}


def refresh_arguments(words: list[str]) -> dict:
    """Return the parameters of `llamarec refresh` for these arguments; an unknown option is an error."""
    command = typer.main.get_command(app).commands["refresh"]
    return command.make_context("refresh", list(words)).params


def test_the_charts_job_refreshes_from_the_store_and_promotes_on_all_servers():
    """Its arguments are those of the command, its volumes hold releases and artifacts, and servers listen for it.

    It is off by default, and the recommender's service does not select its pods.
    """
    assert "CronJob" not in {manifest["kind"] for manifest in render({})}
    manifests = render(EVERYTHING_ON)
    (job,) = (manifest for manifest in manifests if manifest["kind"] == "CronJob")
    assert job["spec"]["schedule"] == "30 3 * * *"
    assert job["spec"]["concurrencyPolicy"] == "Forbid"
    template = job["spec"]["jobTemplate"]["spec"]["template"]
    (container,) = template["spec"]["containers"]
    assert container["command"] == ["llamarec", "refresh"]
    given = refresh_arguments(container["args"])
    mounts = {mount["mountPath"] for mount in container["volumeMounts"] if not mount.get("readOnly")}
    assert {str(given["repository"]), str(given["artifacts"].parent)} == mounts
    assert (given["artifacts"].name, given["servers"], given["canary"]) == ("shop", "dns:///shop:8000", True)
    assert {"LLAMAREC_STORE", "LLAMAREC_ADMIN_KEY"} <= {variable["name"] for variable in container["env"]}
    (rule,) = job["spec"]["jobTemplate"]["spec"]["podFailurePolicy"]["rules"]
    assert REFUSED in rule["onExitCodes"]["values"]
    for name, on in (("refresh", True), ("tls", False)):
        (deployment,) = (one for one in render({name: EVERYTHING_ON[name]}) if one["kind"] == "Deployment")
        arguments = deployment["spec"]["template"]["spec"]["containers"][0]["args"]
        assert ("--http-address=0.0.0.0" in arguments) is on
    labels = template["metadata"]["labels"]
    selectors = [one["spec"]["selector"] for one in manifests if one["kind"] == "Service"]
    assert not [wanted for wanted in selectors if wanted.items() <= labels.items()]


def test_the_units_of_systemd_call_the_command():
    """The service of the page has arguments that the command takes, and a refusal is no failure of it."""
    text = (ROOT / "docs" / "refresh.md").read_text()
    units = []
    for block in re.findall(r"^```ini\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        unit = configparser.ConfigParser(interpolation=None)
        unit.optionxform = str
        unit.read_string(block)
        units.append(unit)
    service, timer = units
    program, *words = service["Service"]["ExecStart"].split()
    assert (Path(program).name, words[0]) == ("llamarec", "refresh")
    assert refresh_arguments(words[1:])["store"] == "sqlite:///histories.sqlite"
    assert service["Service"]["Type"] == "oneshot"
    assert service["Service"]["SuccessExitStatus"] == str(REFUSED)
    assert timer["Timer"]["OnCalendar"] == "*-*-* 03:30:00"
