"""launch/kubernetes/: manifests that Kubernetes and Kubeflow's operator take, and launch commands that hvdkit takes."""

import copy

import jsonschema
import kubernetes_validate
import pytest
import yaml

from hvdkit.launch import options
from hvdkit.train import flags as train_flags
from tests.conftest import ROOT

FOLDER = ROOT / "launch" / "kubernetes"
KUBERNETES = "1.31"
JOBS = ("cpu", "gpu", "elastic")

_REPLICAS = {
    "type": "object",
    "additionalProperties": False,
    "required": ["replicas", "template"],
    "properties": {
        "replicas": {"type": "integer", "minimum": 0},
        "restartPolicy": {"enum": ["Always", "OnFailure", "Never", "ExitCode"]},
        "template": {"type": "object"},  # Kubernetes' own PodTemplateSpec
    },
}
# What the operator's CRD has of a job's specification (MPIJob v2beta1, as of v0.6), written anew, and strict: no
# registry has the CRD, and the API server would drop a field that it does not know.
MPI_JOB = {
    "type": "object",
    "additionalProperties": False,
    "required": ["apiVersion", "kind", "metadata", "spec"],
    "properties": {
        "apiVersion": {"const": "kubeflow.org/v2beta1"},
        "kind": {"const": "MPIJob"},
        "metadata": {"type": "object", "required": ["name"]},
        "spec": {
            "type": "object",
            "additionalProperties": False,
            "required": ["mpiReplicaSpecs"],
            "properties": {
                "slotsPerWorker": {"type": "integer", "minimum": 1},
                "sshAuthMountPath": {"type": "string"},
                "launcherCreationPolicy": {"enum": ["AtStartup", "WaitForWorkersReady"]},
                "mpiImplementation": {"enum": ["OpenMPI", "Intel", "MPICH"]},
                "runLauncherAsWorker": {"type": "boolean"},
                "runPolicy": {
                    "type": "object",
                    "additionalProperties": False,
                    "properties": {
                        "cleanPodPolicy": {"enum": ["None", "Running", "All"]},
                        "ttlSecondsAfterFinished": {"type": "integer"},
                        "activeDeadlineSeconds": {"type": "integer"},
                        "backoffLimit": {"type": "integer", "minimum": 0},
                        "suspend": {"type": "boolean"},
                    },
                },
                "mpiReplicaSpecs": {
                    "type": "object",
                    "additionalProperties": False,
                    "required": ["Launcher", "Worker"],
                    "properties": {"Launcher": _REPLICAS, "Worker": _REPLICAS},
                },
            },
        },
    },
}


def read(name):
    return yaml.safe_load((FOLDER / f"{name}.yaml").read_text())


def check(job):
    """Refuses a job that the operator or Kubernetes would refuse, or whose fields they would drop."""
    jsonschema.validate(job, MPI_JOB)
    for replicas in job["spec"]["mpiReplicaSpecs"].values():
        # The operator sets restartPolicy; the rest is Kubernetes' own.
        template = {"apiVersion": "v1", "kind": "PodTemplate", "template": replicas["template"]}
        kubernetes_validate.validate(template, KUBERNETES, strict=True)


def pods(job):
    """The two pods' specifications."""
    replicas = job["spec"]["mpiReplicaSpecs"]
    return replicas["Launcher"]["template"]["spec"], replicas["Worker"]["template"]["spec"]


def test_all_manifests_are_looked_at():
    assert sorted(path.stem for path in FOLDER.iterdir()) == sorted([*JOBS, "workdir"])


def test_the_volume():
    kubernetes_validate.validate(read("workdir"), KUBERNETES, strict=True)


@pytest.mark.parametrize("name", JOBS)
def test_a_job_is_valid(name):
    check(read(name))


@pytest.mark.parametrize(
    ("where", "value"),
    [
        (("spec", "slotPerWorker"), 2),
        (("spec", "slotsPerWorker"), "2"),
        (("spec", "runPolicy", "cleanPodPolicy"), "Sometimes"),
        (("spec", "mpiReplicaSpecs", "Worker", "replica"), 2),
        (("spec", "mpiReplicaSpecs", "Worker", "template", "spec", "volume"), []),
        (("spec", "mpiReplicaSpecs", "Worker", "template", "spec", "securityContext", "runAsUser"), "hvdkit"),
        (("spec", "mpiReplicaSpecs", "Launcher", "template", "spec", "containers", 0, "arg"), []),
    ],
)
def test_a_misspelt_field_or_a_wrong_type_is_refused(where, value):
    job = copy.deepcopy(read("cpu"))
    place = job
    for step in where[:-1]:
        place = place[step]
    place[where[-1]] = value
    with pytest.raises((jsonschema.ValidationError, kubernetes_validate.ValidationError)):
        check(job)


@pytest.mark.parametrize("name", JOBS)
def test_nobody_is_root(name):
    for pod in pods(read(name)):
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["runAsUser"] == pod["securityContext"]["fsGroup"] == 10001
        for container in pod["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "capabilities": {"drop": ["ALL"]},
            }


@pytest.mark.parametrize("name", JOBS)
def test_workers_have_what_ranks_need(name):
    job = read(name)
    (worker,) = pods(job)[1]["containers"]
    mounts = {mount["mountPath"]: mount["name"] for mount in worker["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in pods(job)[1]["volumes"]}
    assert volumes[mounts["/dev/shm"]]["emptyDir"]["medium"] == "Memory"
    claim = volumes[mounts["/workdir"]]["persistentVolumeClaim"]["claimName"]
    assert claim == read("workdir")["metadata"]["name"]
    assert worker["readinessProbe"]["tcpSocket"]["port"] == worker["ports"][0]["name"]
    configuration = (ROOT / "launch" / "image" / "sshd_config").read_text()
    assert f"Port {worker['ports'][0]['containerPort']}\n" in configuration
    assert f"HostKey {job['spec']['sshAuthMountPath']}/id_rsa\n" in configuration
    if name == "gpu":
        assert worker["resources"]["limits"]["nvidia.com/gpu"] == job["spec"]["slotsPerWorker"]


@pytest.mark.parametrize("name", JOBS)
def test_the_launchers_command_is_understood(name):
    job = read(name)
    (launcher,) = pods(job)[0]["containers"]
    assert launcher["command"] == ["python", "-m", "hvdkit.launch"]
    arguments = options.parse(["launch", *launcher["args"]])
    assert arguments.command[:3] == ["python", "-m", "hvdkit.train"]
    flags = train_flags.parse(arguments.command[2:])
    assert flags.workdir == arguments.workdir
    assert arguments.workdir.startswith("/workdir/")
    if name == "elastic":
        assert arguments.slots == job["spec"]["slotsPerWorker"]
        assert arguments.min_np <= job["spec"]["mpiReplicaSpecs"]["Worker"]["replicas"] * arguments.slots
    else:
        assert arguments.hosts_from == "kubernetes"
