"""Renders the Helm chart without Helm, for the tests of its manifests."""

import json
import re
from pathlib import Path

import jinja2
import yaml

CHART = Path(__file__).resolve().parents[2] / "deploy" / "chart"
EVERYTHING_ON = {
    "tls": {"secretName": "certificates", "mutual": True},
    "adminKeySecret": "key",
    "gpus": 1,
    "redis": {"enabled": True, "image": "redis:7.2.4", "memory": "1Gi", "storage": "2Gi"},
    "storeSecret": "store",
    "gateway": {"enabled": True, "image": "gateway:1.0.0", "replicas": 2, "keysSecret": "keys", "memory": "1Gi"},
    "refresh": {
        "enabled": True,
        "schedule": "30 3 * * *",
        "image": "registry.example/llamarec-train:0.1.0",
        "existingClaim": "artifacts",
        "artifacts": "shop",
        "resources": {"requests": {"cpu": "2"}, "limits": {"memory": "8Gi"}},
        "extraArguments": ["--canary"],
    },
    "extraArguments": ["--log-verbose=1"],
}
"""Values that enable every optional part of the chart."""


def render(values: dict) -> list[dict]:
    """Return the chart's manifests, rendered with Jinja.

    The templates use only a few constructs of Go, which are translated to Jinja; any other construct is an error.
    tests/container holds the result equal to Helm's own.
    """
    chart = yaml.safe_load((CHART / "values.yaml").read_text()) | values
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    environment.filters["toYaml"] = lambda value: yaml.safe_dump(value).strip()
    environment.filters["nindent"] = lambda text, width: "\n" + "\n".join(" " * width + x for x in text.splitlines())
    environment.filters["quote"] = json.dumps
    manifests = []
    for path in sorted((CHART / "templates").glob("*.yaml")):
        blocks: list[str] = []

        def translated(match: re.Match, blocks: list[str] = blocks) -> str:
            dash, code = match[1], re.sub(r"(?<![\w.])\.(?=[A-Z])", "", match[2].strip())
            word, _, rest = code.partition(" ")
            if word in ("if", "range"):
                blocks.append("if" if word == "if" else "for")
                return f"{{%{dash} {'if' if word == 'if' else 'for item in'} {rest} %}}"
            if word == "end":
                return f"{{%{dash} end{blocks.pop()} %}}"
            code = re.sub(r"^\. ", "item ", code)
            code = re.sub(r"^toYaml (\S+)", r"\1 | toYaml", code)
            code = re.sub(r"nindent (\d+)", r"nindent(\1)", code)
            return f"{{{{{dash} {code} }}}}"

        text = re.sub(r"\{\{(-?)(.*?)\}\}", translated, path.read_text())
        rendered = environment.from_string(text).render(Values=chart, Release={"Name": "shop"})
        manifests += list(yaml.safe_load_all(rendered))
    return manifests
