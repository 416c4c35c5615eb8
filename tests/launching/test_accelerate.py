"""The files of launch/accelerate/, in accelerate's own hands."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from accelerate.commands import launch
from command import ROOT, environment
from slurm_cluster import free_ports

FILES = ROOT / "launch" / "accelerate"


def understood(config: Path, *options: str) -> Any:
    """What `accelerate launch` makes of a file and its options, before it starts anything."""
    words = ["--config_file", str(config), *options, "train.py"]
    return launch._validate_launch_command(launch.launch_command_parser().parse_args(words))[0]


@pytest.mark.parametrize("name", ["cpu-one", "cpu-many", "gpu-one", "gpu-many"])
def test_accelerate_takes_the_file(name: str) -> None:
    many = name.endswith("many")
    args = understood(FILES / f"{name}.yaml", "--num_processes", "4", *(["--machine_rank", "1"] if many else []))
    assert args.multi_gpu  # its name for processes that torch starts
    assert (args.num_processes, args.num_machines) == (4, 2 if many else 1)
    assert args.mixed_precision == "no"
    if many:
        assert (args.machine_rank, args.main_process_ip, args.rdzv_backend) == (1, "node0", "static")


def test_accelerate_refuses_a_file_with_an_unknown_key(tmp_path: Path) -> None:
    broken = tmp_path / "broken.yaml"
    broken.write_text((FILES / "cpu-one.yaml").read_text() + "num_process: 2\n")
    with pytest.raises(ValueError, match="num_process"):
        understood(broken)


@pytest.mark.long
def test_two_machines_by_accelerate_are_one_world(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "from accelerate import Accelerator\nstate = Accelerator().state\n"
        "print(state.process_index, state.num_processes, state.device.type, flush=True)\n"
    )
    words = [
        sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(FILES / "cpu-many.yaml"),
        "--num_processes", "2", "--main_process_ip", "127.0.0.1", "--main_process_port", str(free_ports(1)[0]),
    ]  # fmt: skip
    machines = [
        subprocess.Popen(
            [*words, "--machine_rank", rank, str(script)], env=environment(ACCELERATE_USE_CPU="true"),
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in ("0", "1")
    ]  # fmt: skip
    said = [machine.communicate(timeout=120) for machine in machines]
    assert [out for out, _ in said] == ["0 2 cpu\n", "1 2 cpu\n"], said
