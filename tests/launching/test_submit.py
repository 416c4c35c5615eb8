"""launch/submit.py: what each system would be given, and a user's mistakes, before anything is queued."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from command import ROOT, python
from composing import dry, mistake_of
from deepspeed.launcher.multinode_runner import PDSHRunner
from omegaconf import OmegaConf

from opt_parallel.config.compose import one_line_errors
from opt_parallel.config.run import ParallelConfig, Run
from opt_parallel.launching.commands import SIGNALS, through_pdsh
from opt_parallel.launching.kubernetes import manifests, to_yaml
from opt_parallel.launching.settings import Kubernetes, Slurm, System, seconds_of
from opt_parallel.launching.submit import check, composed, launch_from, rendered
from opt_parallel.launching.submit import submit as start
from opt_parallel.runtime.errors import UserError
from opt_parallel.storage.lock import only_writer

# values that a shell, sbatch, Kubernetes or pdsh would read otherwise
AWKWARD = [
    'run.name="it\'s a $HOME of `run`s"',
    'run.dir="/tmp/a run\'s folder"',
    "data.train=[{path: /data/a, weight: 0.7}, {path: '/data/b*', weight: 0.3}]",
    'data.template="{title}: $(body) \\\\ 100%h"',
]
RUN = ["model=opt-tiny", "parallel.tensor=2", *AWKWARD]
VARIOUS = {
    "torchrun": ["launch=torchrun", "launch.nodes=2", "launch.processes=2", "launch.endpoint=node1"],
    "slurm": ["launch=slurm", "launch.nodes=2", "launch.processes=2"],
    "deepspeed": ["launch=deepspeed", "launch.processes=2"],
    "accelerate": [
        "launch=accelerate", "launch.nodes=2", "launch.processes=2", "launch.address=node1",
        f"launch.config={ROOT}/launch/accelerate/cpu-many.yaml",
    ],
    "kubernetes": [
        "launch=kubernetes", "launch.nodes=2", "launch.processes=2", "launch.name=opt", "launch.image=opt:1",
        "launch.claim=runs",
    ],
}  # fmt: skip


def submit(*arguments: str) -> subprocess.CompletedProcess[str]:
    return python("launch/submit.py", *arguments)


def words_of(shell: str) -> list[str]:
    """The words that bash makes of a line."""
    show = f"{sys.executable} -c 'import json, sys; print(json.dumps(sys.argv[1:]))'"
    done = subprocess.run(["bash", "-c", f"{show} {shell}"], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def options_of(words: list[str]) -> dict[str, str]:
    """`{"--nnodes": "2", …}` of a launcher's words before the script."""
    before = words[: words.index("opt_parallel")]
    return {word: value for word, value in zip(before, [*before[1:], ""], strict=True) if word.startswith("--")}


@pytest.mark.parametrize("system", VARIOUS)
def test_what_is_started_has_train_s_own_words_untouched(system: str) -> None:
    shown = dry(*VARIOUS[system], *RUN)
    if system == "kubernetes":
        job = list(yaml.safe_load_all(shown))[1]
        words = [word.replace("$$", "$") for word in job["spec"]["template"]["spec"]["containers"][0]["args"]]
    elif system == "slurm":
        words = words_of(shown[shown.index("srun ") : shown.index("status=")])
    else:
        words = words_of(shown)
    assert words[-len(RUN) :] == RUN
    module = "--module" if system == "deepspeed" else "-m"
    assert words[-len(RUN) - 3 : -len(RUN)] == [module, "opt_parallel", "train"]


def test_torchrun_on_one_machine_and_on_many() -> None:
    alone = options_of(words_of(dry("launch.processes=4", "launch.interface=eth0", "batch.global=12")))
    assert alone["--nproc-per-node"] == "4"
    assert "--standalone" in alone
    assert "--rdzv-endpoint" not in alone
    line = dry(
        "launch.nodes=1:2", "launch.processes=2", "launch.endpoint=node1", "launch.interface=eth0", "run.name=mine",
        "launch.rendezvous_timeout=60", "launch.restarts=5", "launch.shutdown_timeout=90",
    )  # fmt: skip
    many = options_of(words_of(line))
    assert many == {
        "--nnodes": "1:2", "--nproc-per-node": "2", "--max-restarts": "5", "--signals-to-handle": SIGNALS,
        "--shutdown-timeout": "90", "--rdzv-backend": "c10d", "--rdzv-conf": "join_timeout=60,read_timeout=60",
        "--rdzv-endpoint": "node1:29500", "--rdzv-id": "mine",
    }  # fmt: skip
    for variable in ("TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1", "GLOO_SOCKET_IFNAME=eth0", "NCCL_SOCKET_IFNAME=eth0"):
        assert variable in shlex.split(line)


def test_under_nohup_torchrun_leaves_sighup_alone() -> None:
    """It would take the signal for itself. A job's torchrun has no part in this shell's nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # all that nohup does
    try:
        for system, handled in (("torchrun", SIGNALS.replace("SIGHUP,", "")), ("slurm", SIGNALS)):
            assert f"--signals-to-handle {handled} " in dry(f"launch={system}", "launch.processes=2")
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.long
def test_torchrun_is_started_in_this_process_s_place(tmp_path: Path) -> None:
    """A real torchrun, whose script says a mistake of its own: everything on the way there works."""
    done = submit(
        "launch.processes=2", "launch.restarts=0", "model=opt-tiny", "batch.global=2", f"run.dir={tmp_path}",
        "data.train=absent.txt",
    )  # fmt: skip
    assert "absent.txt" in done.stderr
    assert done.returncode == 1  # torchrun's
    assert "opt_parallel FAILED" in done.stderr


def test_slurm_s_script_has_what_was_asked_for() -> None:
    shown = dry(
        *VARIOUS["slurm"], "launch.gpus_per_node=2", "launch.cpus_per_task=8", "launch.account=my project",
        "launch.partition=gpu", "launch.time=1-12:00:00", "launch.warning=300", "launch.venv=/shared/a venv",
        'launch.options=["--qos=long"]', *RUN,
    )  # fmt: skip
    header = [shlex.split(line)[1] for line in shown.splitlines() if line.startswith("#SBATCH")]
    assert {
        "--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=2", "--cpus-per-task=8", "--account=my project",
        "--partition=gpu", "--time=1-12:00:00", "--signal=USR1@300", "--requeue", "--qos=long",
        "--job-name=it's a $HOME of `run`s", "--output=/tmp/a run's folder/logs/slurm-%j.out",
    } <= set(header)  # fmt: skip
    assert "export PATH='/shared/a venv'/bin:" in shown
    assert "export OMP_NUM_THREADS=4" in shown  # 8 CPUs for 2 processes
    subprocess.run(["bash", "-n"], input=shown, text=True, check=True)


def test_slurm_s_script_leaves_the_state_of_a_run_that_trains_alone(tmp_path: Path) -> None:
    """Of a job that is sent a second time while the first one trains in the folder."""
    shown = dry(*VARIOUS["slurm"], *RUN, f"run.dir={tmp_path}")
    beginning = shown[shown.index("\nstate=") : shown.index("export ")]
    state = tmp_path / "state"
    state.write_text("running\n")
    with only_writer(tmp_path, "run.dir=here"):
        subprocess.run(["bash", "-c", beginning], check=True)
        assert state.exists()
    subprocess.run(["bash", "-c", beginning], check=True)
    assert not state.exists()


def test_a_file_of_one_s_own_sets_what_a_cluster_wants(tmp_path: Path) -> None:
    configs = shutil.copytree(ROOT / "configs", tmp_path / "configs")
    (configs / "launch" / "ours.yaml").write_text("defaults: [slurm, _self_]\npartition: gpu\ntime: '24:00:00'\n")
    launch, _ = composed(configs, ["launch=ours", "launch.nodes=4"], ["model=opt-tiny"])
    assert launch == Slurm(system=System.slurm, nodes="4", partition="gpu", time="24:00:00")


def test_slurm_s_container_takes_the_environment_s_place() -> None:
    shown = dry(*VARIOUS["slurm"], "launch.container=/images/opt.sif", "launch.gpus_per_node=2", *RUN)
    words = words_of(shown[shown.index("srun ") : shown.index("status=")])
    assert words[words.index("apptainer") :][:7] == [
        "apptainer", "exec", "--nv", "--bind", "/tmp/a run's folder", "/images/opt.sif", "torchrun",
    ]  # fmt: skip
    assert "export PATH" not in shown


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of a run, and its batch script with another PATH."""
    folder = tmp_path_factory.mktemp("job")
    return folder, re.sub(r"export PATH=.*", "", dry("launch=slurm", "model=opt-tiny", f"run.dir={folder}"))


@pytest.mark.parametrize("name", ["HUP", "INT", "QUIT", "TERM", "USR1"])
def test_slurm_s_script_outlives_a_signal(name: str, job: tuple[Path, str], tmp_path: Path) -> None:
    """It requeues a run that stopped. Programs in place of Slurm's, of which srun sends the signal."""
    folder, script = job
    programs = {
        "srun": f"kill -{name} $PPID; echo stopped > {folder}/state; exit 1",
        "squeue": "echo RUNNING",
        "scontrol": "echo scontrol $*",
    }
    for program, line in programs.items():
        (tmp_path / program).write_text(f"#!/bin/sh\n{line}\n")
        (tmp_path / program).chmod(0o755)
    variables = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node1"}
    done = subprocess.run(["bash"], input=script, env=variables, capture_output=True, text=True, check=False)
    assert (done.stdout, done.returncode) == ("scontrol requeue 7\n", 1)


def test_deepspeed_s_words_come_through_pdsh(tmp_path: Path) -> None:
    hostfile = tmp_path / "hosts"
    hostfile.write_text("node1 slots=2\nnode2 slots=2\n")
    words = words_of(
        dry("launch=deepspeed", "launch.nodes=2", "launch.processes=2", f"launch.hostfile={hostfile}", *RUN)
    )
    options = options_of(words)
    assert (options["--hostfile"], options["--launcher"], options["--num_nodes"], options["--num_gpus"]) == (
        str(hostfile), "pdsh", "2", "2",
    )  # fmt: skip
    given = words[-len(RUN) :]
    assert given == [through_pdsh(word) for word in RUN]
    runner = PDSHRunner.__new__(PDSHRunner)  # what it makes of them, and the far shell then
    runner.args = type("Arguments", (), {"user_args": given})
    through = re.sub(
        "%(.)", lambda match: {"%": "%", "h": "node2"}[match[1]], " ".join(runner.parse_user_args())
    )  # pdsh
    assert words_of(through) == RUN


@pytest.mark.parametrize(
    "name", ["cpu-one", "gpu-many", *(pytest.param(name, marks=pytest.mark.long) for name in ("cpu-many", "gpu-one"))]
)
def test_accelerate_s_command_goes_with_its_file(name: str) -> None:
    config = ROOT / "launch" / "accelerate" / f"{name}.yaml"
    many = ["launch.nodes=2", "launch.rank=1", "launch.address=node1"] if name.endswith("many") else []
    arguments = ["launch=accelerate", f"launch.config={config}", "launch.processes=4", *many, "batch.global=8"]
    words = words_of(dry(*arguments))
    options = options_of(words)
    assert options["--config_file"] == str(config)
    assert words == words_of(dry(*[word.replace(str(config), config.name) for word in arguments]))
    assert options["--num_processes"] == ("8" if many else "4")
    assert options["--machine_rank"] == ("1" if many else "0")
    assert ("ACCELERATE_USE_CPU=true" in words) == name.startswith("cpu")
    assert "TORCH_ELASTIC_SHUTDOWN_TIMEOUT=600" in words


KUBERNETES = Kubernetes(
    system=System.kubernetes, name="opt-13b", image="registry.example/opt:1", claim="runs", nodes="2", processes=8,
    gpus=8, cpus=64, memory="512Gi", secret="tokens", namespace="research", interface="eth0",
)  # fmt: skip


def validated(documents: list[dict[str, Any]]) -> None:
    """Raise unless Kubernetes' own schema takes each document, without a field that it does not know."""
    for document in documents:
        kubernetes_validate.validate(document, "1.37", strict=True)


def test_kubernetes_takes_the_manifests() -> None:
    documents = list(yaml.safe_load_all(to_yaml(manifests(KUBERNETES, RUN))))
    validated(documents)
    service, job = documents
    pod = job["spec"]["template"]["spec"]
    container = pod["containers"][0]
    assert service["spec"]["clusterIP"] == "None"
    assert pod["subdomain"] == service["metadata"]["name"] == job["metadata"]["name"] == "opt-13b"
    assert (job["spec"]["completionMode"], job["spec"]["completions"], job["spec"]["parallelism"]) == ("Indexed", 2, 2)
    assert container["resources"]["limits"] == {"cpu": "64", "memory": "512Gi", "nvidia.com/gpu": "8"}
    assert container["envFrom"] == [{"secretRef": {"name": "tokens"}}]
    assert "opt-13b-0.opt-13b:29500" in container["args"]
    assert container["workingDir"] == container["volumeMounts"][0]["mountPath"] == "/data"


def test_pods_prepare_text_together() -> None:
    settings = ["launch.name=opt", "launch.image=opt:1", "launch.claim=runs", "launch.nodes=3", "launch.cpus=8"]
    run = ["data.train=/data/text", "parallel.tensor=2"]  # one process of each pod: no tensor group is formed
    (job,) = yaml.safe_load_all(dry("launch=kubernetes", "launch.prepare=true", *settings, *run))
    validated([job])
    pod = job["spec"]["template"]["spec"]
    container = pod["containers"][0]
    assert (job["spec"]["completionMode"], job["spec"]["completions"], job["spec"]["parallelism"]) == ("Indexed", 3, 3)
    assert container["command"] == ["opt-parallel"]
    assert container["args"] == ["prepare", "data.train=/data/text", "parallel.tensor=2"]
    assert container["workingDir"] == container["volumeMounts"][0]["mountPath"] == "/data"
    assert "nvidia.com/gpu" not in container["resources"]["limits"]
    assert "subdomain" not in pod


@pytest.mark.parametrize("fault", ["completions", "key", "kind", "quantity"])
def test_a_broken_manifest_is_refused(fault: str) -> None:
    documents = manifests(KUBERNETES, RUN)
    if fault == "completions":
        documents[1]["spec"]["completions"] = "two"
    elif fault == "key":
        documents[1]["spec"]["template"]["spec"]["restart"] = "Never"
    elif fault == "kind":
        documents[1]["kind"] = "JobSet"
    else:
        documents[1]["spec"]["template"]["spec"]["containers"][0]["resources"]["limits"] = ["64"]
    with pytest.raises((kubernetes_validate.ValidationError, kubernetes_validate.utils.SchemaNotFoundError)):
        validated(documents)


def plain_run(tensor: int = 1) -> Run:
    return replace(Run(), batch={"global": 32, "micro": 1}, parallel=ParallelConfig(tensor=tensor))


# settings of a system, and what is said of them; a key of the run is none of them
WRONG: list[tuple[str, dict[str, Any], str]] = [
    ("torchrun", {"nodes": "two"}, "launch.nodes=two is not a number of nodes"),
    ("torchrun", {"nodes": "2:1"}, "launch.nodes=2:1 is not a number of nodes"),
    ("torchrun", {"nodes": 2, "endpoint": ":1"}, "launch.endpoint=:1 is not an endpoint"),
    ("torchrun", {"nodes": 2}, "set launch.endpoint=HOST:29500"),
    ("torchrun", {"processes": 3}, "batch.global=32 is not a multiple"),
    ("torchrun", {"nodes": "3:4", "processes": 4, "endpoint": "a"}, "batch.global=32 is not a multiple"),
    ("slurm", {"nodes": "1:2"}, "launch=torchrun, which can continue with fewer"),
    ("slurm", {"time": "soon"}, "launch.time=soon is not a time limit"),
    ("slurm", {"time": "10"}, "launch.warning=600 leaves no time to train"),
    ("slurm", {"gpus_per_node": 4}, "each process uses one GPU"),
    ("slurm", {"container": "a", "venv": "b"}, "both set the environment"),
    ("slurm", {"options": ["rm"]}, "'rm' is not an option of sbatch"),
    ("slurm", {"options": ["--mem 4G"]}, "'--mem 4G' is not an option of sbatch"),
    ("deepspeed", {"nodes": 2}, "launch.hostfile=…"),
    ("deepspeed", {"nodes": 2, "hostfile": "absent"}, "launch.hostfile=absent does not exist"),
    ("accelerate", {}, "launch.config is not set"),
    ("accelerate", {"config": "absent"}, "launch.config=absent cannot be read"),
    ("accelerate", {"config": "gpu.yaml"}, "choose cpu-one.yaml, cpu-many.yaml,"),
    ("kubernetes", {}, "launch.name is not set"),
    ("kubernetes", {"name": "a.b", "image": "a", "claim": "b"}, "launch.name=a.b is not"),
    ("kubernetes", {"name": "a", "image": "a", "claim": "b", "grace": 60}, "kills a pod before"),
    ("kubernetes", {"name": "a", "image": "a", "claim": "b", "prepare": True, "gpus": 2, "processes": 2},
     "leave out launch.gpus=2 and launch.processes=2"),
]  # fmt: skip


@pytest.mark.parametrize(("system", "settings", "said"), WRONG)
def test_a_wrong_setting_is_said_in_one_line(system: str, settings: dict[str, Any], said: str) -> None:
    def work() -> None:
        launch = launch_from(OmegaConf.create({"launch": {"system": system, **settings}}))
        check(launch, plain_run())
        rendered(launch, plain_run().run, [])

    with pytest.raises(UserError) as caught:
        work()
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_tensor_group_stays_on_its_node() -> None:
    launch = launch_from(OmegaConf.create({"launch": {"system": "torchrun", "nodes": 2, "endpoint": "a"}}))
    with pytest.raises(UserError, match=r"parallel\.allow_cross_node=true"):
        check(launch, plain_run(tensor=2))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["launch=slum"], "launch=slum does not exist: choose accelerate, deepspeed, kubernetes, slurm, torchrun"),
        (["launch.nodez=2"], "did you mean launch.nodes?"),
        (["launch.processes=many"], "launch.processes: Value 'many'"),
        (["launch=slurm", "run.dir=runs/a%j"], "holds a %"),
        (["modle=opt-tiny"], "modle"),
        (["model=opt-tiny", "parallel.tensor=3"], "parallel.tensor=3"),
        (["optimizer.lr=-1"], "optimizer.lr=-1"),
        (["--multirun"], "--multirun is not an override"),
    ],
)
def test_a_mistake_is_said_in_one_line(arguments: list[str], said: str) -> None:
    def work() -> None:
        with one_line_errors():
            dry(*arguments)

    line = mistake_of(work)
    assert said in line
    assert "\n" not in line


def test_a_mistake_ends_with_status_2_and_nothing_else() -> None:
    done = submit("launch=slurm", "launch.nodes=2", "model=opt-tiny", "steps=none", "launch.dry_run=true")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: steps: ")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("system", ["slurm", "kubernetes", "deepspeed"])
def test_a_program_that_is_not_there_is_said(system: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hostfile = tmp_path / "hosts"
    hostfile.write_text("node1 slots=2\nnode2 slots=2\n")
    more = ["launch.nodes=2", f"launch.hostfile={hostfile}"] if system == "deepspeed" else []
    absent = {"slurm": "sbatch", "kubernetes": "kubectl", "deepspeed": "pdsh"}[system]
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(UserError, match=f"^{absent} is not installed"):
        start([*VARIOUS[system], *more, "model=opt-tiny", f"run.dir={tmp_path}"])


@pytest.mark.parametrize(
    ("time", "seconds"),
    [("90", 5400), ("1:30", 90), ("24:00:00", 86400), ("2-0", 172800), ("1-2:30", 95400), ("1-0:0:5", 86405)],
)
def test_slurm_s_times(time: str, seconds: int) -> None:
    assert seconds_of(time) == seconds
