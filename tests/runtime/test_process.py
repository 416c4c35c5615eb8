"""A process's place by its launcher's variables."""

from __future__ import annotations

import os
import socket

import pytest

from opt_parallel.runtime.errors import UserError
from opt_parallel.runtime.process import RANK_VARIABLES, first_host, host, rank, set_ranks, tasks_per_node, world_size

# of task 3 of an `srun --ntasks 5 --nodes 3`, as Slurm 22.05 sets them
SLURM = {
    "SLURM_JOB_ID": "41", "SLURM_STEP_ID": "2", "SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "5", "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1", "SLURM_STEP_TASKS_PER_NODE": "2(x2),1", "SLURM_STEP_NODELIST": "gpu[007-008],login1",
}  # fmt: skip
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2", "MASTER_ADDR": "10.0.0.1",
}  # fmt: skip


@pytest.fixture(autouse=True)
def own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the variables that a library may have set in this process."""
    gone = (*RANK_VARIABLES, "MASTER_ADDR", "MASTER_PORT")
    monkeypatch.setattr(os, "environ", {name: value for name, value in os.environ.items() if name not in gone})


def place_with(variables: dict[str, str]) -> list[str | None]:
    os.environ.update(variables)
    set_ranks()
    return [os.environ.get(name) for name in (*RANK_VARIABLES, "MASTER_ADDR", "MASTER_PORT")]


def test_a_task_of_srun() -> None:
    assert place_with(SLURM) == ["3", "5", "1", "2", "gpu007", str(20_000 + 41 * 16 + 2)]


def test_a_variable_that_is_set_to_nothing_is_as_good_as_none() -> None:
    nothing = dict.fromkeys((*RANK_VARIABLES, "MASTER_ADDR", "SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_RANK"), "")
    assert place_with(nothing) == [None] * 6
    assert (rank(), world_size()) == (0, 1)


def test_a_world_size_without_a_rank_is_of_other_processes() -> None:
    os.environ["WORLD_SIZE"] = "8"
    assert world_size() == 1


@pytest.mark.parametrize(
    "variables",
    [{"RANK": "abc"}, {"RANK": "-1"}, {"LOCAL_RANK": "x"}, {"RANK": "0", "WORLD_SIZE": "2.5"},
     {"RANK": "2", "WORLD_SIZE": "2"}, {"RANK": "0", "WORLD_SIZE": "0"}],
)  # fmt: skip
def test_a_place_that_is_none_is_refused(variables: dict[str, str]) -> None:
    from opt_parallel.parallel.topology import check_rank_variables

    os.environ.update(variables)
    with pytest.raises(UserError, match=f"{list(variables)[-1]}={list(variables.values())[-1]}"):
        check_rank_variables()


def test_all_tasks_of_a_step_meet_at_one_place() -> None:
    met = {tuple(place_with({**SLURM, "SLURM_PROCID": str(rank)})[4:]) for rank in range(5)}
    assert len(met) == 1


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"SLURM_JOB_ID": "41", "SLURM_NTASKS": "8", "SLURM_PROCID": "0"},  # in a batch script, outside any step
        {**SLURM, "SLURM_STEP_NUM_TASKS": "1"},
    ],
)
def test_alone(variables: dict[str, str]) -> None:
    assert place_with(variables)[:4] == [None] * 4


def test_a_process_of_mpirun() -> None:
    assert place_with(OPEN_MPI) == ["3", "4", "1", "2", "10.0.0.1", "29500"]


def test_mpirun_within_a_job_of_slurm() -> None:
    """Its processes inherit the variables of the daemon that srun started on their node."""
    assert place_with({**SLURM, **OPEN_MPI})[:4] == ["3", "4", "1", "2"]
    assert os.environ["MASTER_PORT"] == "29500"


def test_a_launcher_that_says_it_itself_is_believed() -> None:
    """torchrun within srun."""
    told = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    assert place_with({**SLURM, **told})[:4] == list(told.values())


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node1", "node1"),
        ("node3,node7", "node3"),
        ("gpu[007-010,12],cpu1", "gpu007"),
        ("rack[2,4]-a,rack9", "rack2-a"),
        ("a-b-c[1-2]", "a-b-c1"),
    ],
)
def test_first_host(nodes: str, first: str) -> None:
    assert first_host(nodes) == first


def test_tasks_per_node() -> None:
    assert tasks_per_node("4") == [4]
    assert tasks_per_node("2(x3),1,8(x2)") == [2, 2, 2, 1, 8, 8]


def test_a_host_has_slurms_name_where_slurm_started_it() -> None:
    assert host() == socket.gethostname()
    os.environ["SLURMD_NODENAME"] = "node7"
    assert host() == "node7"
