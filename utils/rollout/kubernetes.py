"""The same rollout for Kubernetes, as files: Gateway API weights by hand, or Argo Rollouts that asks our gate.

    httproute-<share>.yaml   one per step: kubectl apply moves the traffic, httproute-0.yaml is the way back
    argo-rollout.yaml        Rollout + AnalysisTemplate: each step waits for a Job that runs gate.py
    gate.py                  counts from Prometheus -> `rollout.py judge` -> exit 0 advance, 5 roll back; else it waits
    README.md                what has to be filled in

Written by this project, not run by it on a cluster: the files are checked for shape, gate.py against a fake Prometheus.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from config import RolloutSection
from utils.artifacts import files
from utils.exceptions import ArtefactError, Problem
from utils.rollout.policy import FULL_BP


def write(section: RolloutSection, directory: Path) -> list[Path]:
    """Fill a new or empty directory. Raises ArtefactError when something is there."""
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise ArtefactError(
            Problem("the output exists and is not empty", str(directory), "choose another --rollout.output")
        )
    files.make_directory(directory)
    shares = [round(share * FULL_BP) for share in section.steps]
    documents = {
        f"httproute-{share / 100:g}.yaml": [http_route(section.service, share)] for share in (0, *shares, FULL_BP)
    }
    documents["argo-rollout.yaml"] = [argo_rollout(section, shares), analysis_template(section)]
    for name, values in documents.items():
        files.write_text(directory / name, "---\n".join(yaml.safe_dump(value, sort_keys=False) for value in values))
    files.write_text(directory / "gate.py", _GATE)
    files.write_text(directory / "README.md", _README.format(service=section.service))
    return sorted(directory.iterdir())


def http_route(service: str, share_bp: int) -> dict[str, Any]:
    """Weights are proportional: their sum is 10000, so a share of 0.01% is 1. Only the completion endpoints match."""
    weights = ((f"{service}-production", FULL_BP - share_bp), (f"{service}-candidate", share_bp))
    matches = [
        {"path": {"type": "Exact", "value": path}, "method": "POST"}
        for path in ("/v1/chat/completions", "/v1/completions")
    ]
    return {
        "apiVersion": "gateway.networking.k8s.io/v1",
        "kind": "HTTPRoute",
        "metadata": {"name": service},
        "spec": {
            "parentRefs": [{"name": "gateway"}],
            "rules": [
                {
                    "matches": matches,
                    "backendRefs": [{"name": name, "port": 8000, "weight": weight} for name, weight in weights],
                },
                {
                    "matches": [{"path": {"type": "PathPrefix", "value": "/v1/models"}, "method": "GET"}],
                    "backendRefs": [{"name": f"{service}-production", "port": 8000}],
                },
            ],
        },
    }


def argo_rollout(section: RolloutSection, shares: list[int]) -> dict[str, Any]:
    """setWeight, then a blocking analysis; the gate's failure aborts to the stable version."""
    steps: list[dict[str, Any]] = []
    for number, share in enumerate(shares):
        steps.append({"setWeight": share})
        arguments = [{"name": "step", "value": str(number)}, {"name": "share-bp", "value": str(share)}]
        steps.append({"analysis": {"templates": [{"templateName": f"{section.service}-gate"}], "args": arguments}})
    canary = {
        "canaryService": f"{section.service}-candidate",
        "stableService": f"{section.service}-production",
        "trafficRouting": {
            "maxTrafficWeight": FULL_BP,
            "plugins": {"argoproj-labs/gatewayAPI": {"httpRoute": section.service, "namespace": "default"}},
        },
        "steps": steps,
    }
    container = {
        "name": "model",
        "image": "vllm/vllm-openai:PIN-A-VERSION",
        "args": ["--model", "/models/merged_model", "--served-model-name", section.model_name or "model"],
        "ports": [{"containerPort": 8000}],
        "readinessProbe": {"httpGet": {"path": "/health", "port": 8000}},
    }
    return {
        "apiVersion": "argoproj.io/v1alpha1",
        "kind": "Rollout",
        "metadata": {"name": section.service},
        "spec": {
            "replicas": 2,
            "selector": {"matchLabels": {"app": section.service}},
            "template": {"metadata": {"labels": {"app": section.service}}, "spec": {"containers": [container]}},
            "strategy": {"canary": canary},
        },
    }


def analysis_template(section: RolloutSection) -> dict[str, Any]:
    """One Job per step. It ends by itself only with a verdict; its deadline is a failure, so no data means back."""
    environment = [
        {"name": "STEP", "value": "{{args.step}}"},
        {"name": "SHARE_BP", "value": "{{args.share-bp}}"},
        {"name": "PROMETHEUS", "value": "http://prometheus.monitoring:9090"},
        {"name": "UNITS_CANARY", "value": f'sum(http_requests_total{{service="{section.service}-candidate"}})'},
        {"name": "UNITS_PRODUCTION", "value": f'sum(http_requests_total{{service="{section.service}-production"}})'},
        {
            "name": "ERRORS_CANARY",
            "value": f'sum(http_requests_total{{service="{section.service}-candidate",code=~"5.."}})',
        },
        {
            "name": "ERRORS_PRODUCTION",
            "value": f'sum(http_requests_total{{service="{section.service}-production",code=~"5.."}})',
        },
    ]
    container = {
        "name": "gate",
        "image": "AN-IMAGE-OF-THIS-REPOSITORY",
        "command": ["python", "/gate/gate.py"],
        "env": environment,
        "volumeMounts": [{"name": "gate", "mountPath": "/gate"}],
    }
    pod = {
        "restartPolicy": "Never",
        "containers": [container],
        "volumes": [{"name": "gate", "configMap": {"name": f"{section.service}-gate"}}],
    }
    job = {"activeDeadlineSeconds": round(60 * section.step_minutes), "backoffLimit": 0, "template": {"spec": pod}}
    metric = {"name": "gate", "failureLimit": 0, "consecutiveErrorLimit": 0, "provider": {"job": {"spec": job}}}
    return {
        "apiVersion": "argoproj.io/v1alpha1",
        "kind": "AnalysisTemplate",
        "metadata": {"name": f"{section.service}-gate"},
        "spec": {"args": [{"name": "step"}, {"name": "share-bp"}], "metrics": [metric]},
    }


_GATE = '''"""Counts from Prometheus, judged by this project's gate. Exit 0: advance. 5: roll back. No data: it waits.

Counters are read as differences to this Job's start. A query without a result is no zero: the gate is not asked then.
"""

import json
import os
import subprocess
import sys
import time
import urllib.parse
import urllib.request

NAMES = ("UNITS", "ERRORS")
SCRIPT = os.environ.get("ROLLOUT_SCRIPT", "scripts/rollout.py")


def value(query):
    url = os.environ["PROMETHEUS"] + "/api/v1/query?" + urllib.parse.urlencode({"query": query})
    with urllib.request.urlopen(url, timeout=10) as answer:
        found = json.load(answer)["data"]["result"]
    return int(float(found[0]["value"][1])) if found else None


def counters():
    return {(name, arm): value(os.environ[f"{name}_{arm}"]) for name in NAMES for arm in ("CANARY", "PRODUCTION")}


def settled(now):
    """A counter of errors that does not exist yet is 0 only where requests were counted."""
    return {
        key: 0 if count is None and key[0] == "ERRORS" and now["UNITS", key[1]] is not None else count
        for key, count in now.items()
    }


def main():
    start = None
    while True:
        try:
            now = settled(counters())
        except (OSError, ValueError, KeyError) as error:
            print(f"no data: {error}", flush=True)
            now = {}
        if now and None not in now.values():
            start = start or now
            seen = {name: [now[name, arm] - start[name, arm] for arm in ("CANARY", "PRODUCTION")] for name in NAMES}
            if any(count < 0 for counts in seen.values() for count in counts):
                print("a counter went backwards: starting again", flush=True)
                start = now
            else:
                # the two are read one after the other
                seen["ERRORS"] = [min(pair) for pair in zip(seen["ERRORS"], seen["UNITS"])]
                rates = {os.environ["SHARE_BP"]: {"units": seen["UNITS"], "errors": seen["ERRORS"]}}
                asked = {"counts": {"rates": rates}, "step": int(os.environ["STEP"])}
                command = [sys.executable, SCRIPT, "judge", "--rollout.golden", "none"]
                answer = subprocess.run(command, input=json.dumps(asked), capture_output=True, text=True, check=True)
                verdict = json.loads(answer.stdout.strip().splitlines()[-1])
                print(verdict["action"], verdict["reason"], flush=True)
                if verdict["action"] != "hold":
                    sys.exit(0 if verdict["action"] == "advance" else 5)
        time.sleep(float(os.environ.get("EVERY", "10")))


if __name__ == "__main__":
    main()
'''
_README = """# {service} on Kubernetes

Fill in the two images, the Prometheus address and the four queries in `argo-rollout.yaml` (names of request counters
differ between gateways), the gateway in the routes, and the namespace.

By hand, with Gateway API: `kubectl apply -f httproute-1.yaml`, ask `python scripts/rollout.py judge` with your counts,
go on with the next file; `kubectl apply -f httproute-0.yaml` is the way back.

With Argo Rollouts and its Gateway API plugin:

    kubectl create configmap {service}-gate --from-file=gate.py
    kubectl apply -f httproute-0.yaml -f argo-rollout.yaml

Each step waits for a Job. `advance` ends it well, `rollback` fails it, and so does its deadline: without data the
candidate goes back. The gate keeps its error budget per step here, because each Job counts from its own start. Requests
are counted one by one: with sticky sessions use counters of sessions, or false alarms are many times as frequent.
Nothing here sees answers: run `python scripts/rollout.py start` with both addresses beside it, or golden prompts of
your own, if their quality has to be judged too.
"""
