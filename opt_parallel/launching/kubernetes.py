"""The manifests of a run on Kubernetes: an Indexed Job, and a headless Service by which its pods find the first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import yaml

from opt_parallel.config.units import quantity_of
from opt_parallel.launching.commands import PORT, threads, torchrun_environment, torchrun_options
from opt_parallel.launching.settings import Kubernetes

LABEL = "batch.kubernetes.io/job-name"  # which the Job controller gives to its pods


def manifests(launch: Kubernetes, overrides: Sequence[str]) -> list[dict[str, Any]]:
    """Service and Job, as plain values. Each pod of the Job is one machine's torchrun."""
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": launch.name, "namespace": launch.namespace},
        "spec": {
            "clusterIP": "None",  # headless: a name for each pod, <job>-<index>.<job>
            "selector": {LABEL: launch.name},
            "ports": [{"name": "rendezvous", "port": PORT}],
            "publishNotReadyAddresses": True,
        },
    }
    job = {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": launch.name, "namespace": launch.namespace},
        "spec": {
            "completionMode": "Indexed",
            "completions": launch.most,
            "parallelism": launch.most,
            "backoffLimit": launch.backoff,
            # a pod that its node was drained or taken from is replaced without being counted
            "podFailurePolicy": {"rules": [{"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget"}]}]},
            "template": {"spec": _pod(launch, overrides)},
        },
    }
    return [service, job]


def _pod(launch: Kubernetes, overrides: Sequence[str]) -> dict[str, Any]:
    resources = {"cpu": str(launch.cpus), "memory": quantity_of(launch.memory, "launch.memory=")}
    if launch.gpus:
        resources["nvidia.com/gpu"] = str(launch.gpus)
    variables = torchrun_environment(launch) | threads(launch.cpus, launch.processes)
    place = ["--rdzv-endpoint", f"{launch.name}-0.{launch.name}:{PORT}", "--rdzv-id", str(launch.name)]
    container: dict[str, Any] = {
        "name": "trainer",
        "image": launch.image,
        "command": ["torchrun"],
        "args": [*map(literal, [*torchrun_options(launch), *place, f"{launch.code}/train.py", *overrides])],
        "workingDir": launch.mount,
        "env": [{"name": name, "value": literal(value)} for name, value in variables.items()],
        "resources": {"requests": resources, "limits": dict(resources)},
        "volumeMounts": [
            {"name": "shared", "mountPath": launch.mount},
            {"name": "memory", "mountPath": "/dev/shm"},  # NCCL's, larger than a container's 64 MB
        ],
    }
    if launch.secret:
        container["envFrom"] = [{"secretRef": {"name": launch.secret}}]
    return {
        "subdomain": launch.name,
        "restartPolicy": "Never",  # a pod that failed stays, with its log; another takes its index
        "terminationGracePeriodSeconds": launch.grace,
        "containers": [container],
        "volumes": [
            {"name": "shared", "persistentVolumeClaim": {"claimName": launch.claim}},
            {"name": "memory", "emptyDir": {"medium": "Memory"}},
        ],
    }


def literal(word: str) -> str:
    """`word` as a container's argument: Kubernetes puts a variable for $(NAME), and one $ for $$."""
    return word.replace("$", "$$")


def to_yaml(documents: Sequence[dict[str, Any]]) -> str:
    """The manifests as one text for kubectl."""
    return yaml.safe_dump_all(documents, sort_keys=False, allow_unicode=True, width=120)
