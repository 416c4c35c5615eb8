"""Sizes as a user types them, on every command line and in every key."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from command import ROOT
from hydra import compose, initialize_config_dir

from opt_parallel.config.compose import register_schema, run_from
from opt_parallel.config.units import bytes_of, quantity_of
from opt_parallel.launching.kubernetes import manifests
from opt_parallel.launching.settings import Kubernetes, System
from opt_parallel.runtime.errors import UserError

SIZES: dict[str | int, tuple[int, str]] = {
    "5GB": (5 * 10**9, "5G"), "5gb": (5 * 10**9, "5G"), "5Gb": (5 * 10**9, "5G"), "5 GB": (5 * 10**9, "5G"),
    "5GiB": (5 * 2**30, "5Gi"), "5gib": (5 * 2**30, "5Gi"), "5Gi": (5 * 2**30, "5Gi"), "5G": (5 * 10**9, "5G"),
    "500MB": (500 * 10**6, "500M"), "1.5mb": (1_500_000, "1.5M"), " 3KB ": (3000, "3k"), "3KiB": (3072, "3Ki"),
    "2TB": (2 * 10**12, "2T"), "1PiB": (2**50, "1Pi"), "12": (12, "12"), "12B": (12, "12"),
    9_007_199_254_740_993: (9_007_199_254_740_993, "9007199254740993"),
}  # fmt: skip


@pytest.mark.parametrize("size", SIZES, ids=repr)
def test_a_size(size: str | int) -> None:
    assert (bytes_of(size, "key="), quantity_of(str(size), "key=")) == SIZES[size]


@pytest.mark.parametrize(
    "size", ["", "GB", "0", "0GB", "-5GB", "0.5", "5 apples", "5GBB", "5iB", "5,000MB", "1_000", "nan", "infGB", "٥GB"]
)
def test_what_is_not_a_size(size: str) -> None:
    for take in (bytes_of, quantity_of):
        with pytest.raises(UserError, match="5GB") as raised:
            take(size, "--max-shard-size ")
        assert f"--max-shard-size {size} " in str(raised.value)


@pytest.mark.parametrize("given", ["5GiB", "500mb", "5000000000", 5_000_000_000])
def test_a_key_takes_it(given: Any) -> None:
    register_schema()
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        run = run_from(compose("config", overrides=["model=opt-tiny", "run.name=x", f"export.max_shard_size={given}"]))
    assert bytes_of(run.export.max_shard_size, "") == bytes_of(given, "")


def test_kubernetes_gets_it_in_its_own_words() -> None:
    settings: dict[str, Any] = {"system": System.kubernetes, "name": "a", "image": "b", "claim": "c"}
    job = manifests(Kubernetes(**settings, memory="64gb"), [])[1]
    assert job["spec"]["template"]["spec"]["containers"][0]["resources"]["limits"]["memory"] == "64G"
    with pytest.raises(UserError, match=r"launch\.memory=lots"):
        Kubernetes(**settings, memory="lots")


def test_a_plain_number_limits_an_export_s_files(tmp_path: Path) -> None:
    from opt_parallel import OPTForCausalLM

    OPTForCausalLM.from_pretrained(ROOT / "tests" / "saved_before" / "export").save_pretrained(
        tmp_path / "out", max_shard_size=20_000
    )
    files = list((tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 1
