"""The fields of a RayJob that the KubeRay operator knows, as a JSON schema.

Written down from the operator's published API, github.com/ray-project/kuberay (Apache-2.0):
ray-operator/apis/ray/v1/rayjob_types.go (commit 0057210), raycluster_types.go, and
ray-operator/config/crd/bases/ray.io_rayjobs.yaml (commit 1184bc8) for the parts of a pod. Names, types and which are
required; pods have further fields, of which those that a manifest of ours may use are listed.
"""

from __future__ import annotations

from typing import Any

TEXT = {"type": "string"}
NUMBER = {"type": "integer"}
SWITCH = {"type": "boolean"}
WORDS = {"type": "object", "additionalProperties": TEXT}
ANYTHING: dict[str, Any] = {}
QUANTITIES = {
    "type": "object",
    "additionalProperties": {"type": "string", "pattern": r"^(\+|-)?(\d+(\.\d*)?|\.\d+)([KMGTPE]i|[numkMGTPE])?$"},
}


def record(*required: str, **fields: Any) -> dict[str, Any]:
    """An object with these fields and no others."""
    return {"type": "object", "properties": fields, "required": list(required), "additionalProperties": False}


def several(item: dict[str, Any]) -> dict[str, Any]:
    """A list."""
    return {"type": "array", "items": item}


ENV = record(
    "name",
    name=TEXT,
    value=TEXT,
    valueFrom=record(
        secretKeyRef=record("key", key=TEXT, name=TEXT, optional=SWITCH),
        configMapKeyRef=record("key", key=TEXT, name=TEXT, optional=SWITCH),
        fieldRef=record("fieldPath", fieldPath=TEXT, apiVersion=TEXT),
    ),
)
CONTAINER = record(
    "name",
    name=TEXT,
    image=TEXT,
    imagePullPolicy=TEXT,
    command=several(TEXT),
    args=several(TEXT),
    env=several(ENV),
    resources=record(limits=QUANTITIES, requests=QUANTITIES),
    volumeMounts=several(
        record("mountPath", "name", mountPath=TEXT, name=TEXT, readOnly=SWITCH, subPath=TEXT, mountPropagation=TEXT)
    ),
    securityContext=record(
        allowPrivilegeEscalation=SWITCH, privileged=SWITCH, readOnlyRootFilesystem=SWITCH, runAsUser=NUMBER
    ),
    lifecycle=record(preStop=record(exec=record(command=several(TEXT))), postStart=ANYTHING),
    workingDir=TEXT,
    ports=several(ANYTHING),
)
POD_TEMPLATE = record(
    metadata=record(labels=WORDS, annotations=WORDS, name=TEXT, namespace=TEXT),
    spec=record(
        "containers",
        containers=several(CONTAINER),
        volumes=several(
            record(
                "name",
                name=TEXT,
                persistentVolumeClaim=record("claimName", claimName=TEXT, readOnly=SWITCH),
                emptyDir=record(medium=TEXT, sizeLimit=QUANTITIES["additionalProperties"]),
            )
        ),
        terminationGracePeriodSeconds=NUMBER,
        serviceAccountName=TEXT,
        nodeSelector=WORDS,
        tolerations=several(ANYTHING),
    ),
)
HEAD = record(
    "rayStartParams",
    "template",
    rayStartParams=WORDS,
    template=POD_TEMPLATE,
    serviceType=TEXT,
    headService=ANYTHING,
    enableIngress=SWITCH,
)
WORKERS = record(
    *("groupName", "minReplicas", "maxReplicas", "rayStartParams", "template"),
    groupName=TEXT,
    replicas=NUMBER,
    minReplicas=NUMBER,
    maxReplicas=NUMBER,
    numOfHosts=NUMBER,
    rayStartParams=WORDS,
    template=POD_TEMPLATE,
    scaleStrategy=ANYTHING,
)
RAY_CLUSTER = record(
    "headGroupSpec",
    headGroupSpec=HEAD,
    workerGroupSpecs=several(WORKERS),
    rayVersion=TEXT,
    authOptions=record(mode={"enum": ["disabled", "token"]}, secretName=TEXT, enableK8sTokenAuth=SWITCH),
    enableInTreeAutoscaling=SWITCH,
    autoscalerOptions=ANYTHING,
    headServiceAnnotations=WORDS,
    suspend=SWITCH,
    managedBy=TEXT,
    gcsFaultToleranceOptions=ANYTHING,
)
RAY_JOB = record(
    "apiVersion",
    "kind",
    "metadata",
    "spec",
    apiVersion={"const": "ray.io/v1"},
    kind={"const": "RayJob"},
    metadata=record("name", name=TEXT, namespace=TEXT, labels=WORDS, annotations=WORDS),
    spec=record(
        activeDeadlineSeconds={"type": "integer", "minimum": 1},
        backoffLimit=NUMBER,
        rayClusterSpec=RAY_CLUSTER,
        submitterPodTemplate=POD_TEMPLATE,
        metadata=WORDS,
        clusterSelector=WORDS,
        submitterConfig=record(backoffLimit=NUMBER),
        managedBy=TEXT,
        deletionStrategy=ANYTHING,
        entrypoint=TEXT,
        runtimeEnvYAML=TEXT,
        jobId=TEXT,
        submissionMode={"enum": ["K8sJobMode", "HTTPMode", "InteractiveMode"]},
        entrypointResources=TEXT,
        entrypointNumCpus={"type": "number"},
        entrypointNumGpus={"type": "number"},
        ttlSecondsAfterFinished=NUMBER,
        shutdownAfterJobFinishes=SWITCH,
        suspend=SWITCH,
    ),
)
