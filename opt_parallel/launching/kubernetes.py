"""Kubernetes manifests that train a run, or prepare its text. An Indexed Job starts the pods. The pods of a training
run find the first pod by a headless Service."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import yaml

from opt_parallel.config.units import quantity_of
from opt_parallel.launching.commands import PORT, TRAIN, threads, torchrun_environment, torchrun_options
from opt_parallel.launching.settings import Kubernetes

LABEL = "batch.kubernetes.io/job-name"  # the Job controller sets this label on its pods


def manifests(launch: Kubernetes, overrides: Sequence[str]) -> list[dict[str, Any]]:
    """The manifests as dictionaries: a Service and a Job whose pods run one torchrun each, or with `launch.prepare` a
    Job whose pods prepare the text together."""
    if launch.prepare:
        return [_job(launch, _pod(launch, ["opt-parallel"], ["prepare", *overrides], {}))]
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": launch.name, "namespace": launch.namespace},
        "spec": {
            "clusterIP": "None",  # a headless Service gives each pod the DNS name <job>-<index>.<job>
            "selector": {LABEL: launch.name},
            "ports": [{"name": "rendezvous", "port": PORT}],
            "publishNotReadyAddresses": True,
        },
    }
    rendezvous = ["--rdzv-endpoint", f"{launch.name}-0.{launch.name}:{PORT}", "--rdzv-id", str(launch.name)]
    arguments = [*torchrun_options(launch), *rendezvous, *TRAIN, *overrides]
    pod = _pod(launch, ["torchrun"], arguments, torchrun_environment(launch) | threads(launch.cpus, launch.processes))
    return [service, _job(launch, {"subdomain": launch.name, **pod})]


def _job(launch: Kubernetes, pod: dict[str, Any]) -> dict[str, Any]:
    """An Indexed Job of `launch.nodes` pods."""
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": launch.name, "namespace": launch.namespace},
        "spec": {
            "completionMode": "Indexed",
            "completions": launch.most,
            "parallelism": launch.most,
            "backoffLimit": launch.backoff,
            # Kubernetes replaces the pods of drained nodes without counting them as failed.
            "podFailurePolicy": {"rules": [{"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget"}]}]},
            "template": {"spec": pod},
        },
    }


def _pod(launch: Kubernetes, command: list[str], arguments: Sequence[str], variables: dict[str, str]) -> dict[str, Any]:
    """A pod that runs a command with these environment variables in the working folder of the run."""
    resources = {"cpu": str(launch.cpus), "memory": quantity_of(launch.memory, "launch.memory=")}
    if launch.gpus:
        resources["nvidia.com/gpu"] = str(launch.gpus)
    container: dict[str, Any] = {
        "name": "trainer",
        "image": launch.image,
        "command": command,
        "args": [*map(literal, arguments)],
        "workingDir": launch.mount,
        "env": [{"name": name, "value": literal(value)} for name, value in variables.items()],
        "resources": {"requests": resources, "limits": dict(resources)},
        "volumeMounts": [
            {"name": "shared", "mountPath": launch.mount},
            {"name": "memory", "mountPath": "/dev/shm"},  # NCCL needs more than the default 64 MB
        ],
    }
    if launch.secret:
        container["envFrom"] = [{"secretRef": {"name": launch.secret}}]
    return {
        "restartPolicy": "Never",  # a failed pod stays with its log, and a new pod gets its index
        "terminationGracePeriodSeconds": launch.grace,
        "containers": [container],
        "volumes": [
            {"name": "shared", "persistentVolumeClaim": {"claimName": launch.claim}},
            {"name": "memory", "emptyDir": {"medium": "Memory"}},
        ],
    }


def literal(argument: str) -> str:
    """An argument escaped for a container's command, in which Kubernetes replaces $(NAME) by a variable and $$ by $."""
    return argument.replace("$", "$$")


def to_yaml(documents: Sequence[dict[str, Any]]) -> str:
    """The manifests as one YAML text for kubectl."""
    return yaml.safe_dump_all(documents, sort_keys=False, allow_unicode=True, width=120)
