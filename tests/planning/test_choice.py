"""The choice of `auto`, the settings nearest to those that do not fit, scaling, and failures."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest

from opt_parallel.config.model import ModelConfig
from opt_parallel.config.output import CheckpointConfig
from opt_parallel.config.overrides import PLANNED
from opt_parallel.config.run import ActivationCheckpointing, Offload, Precision, PrecisionConfig, Run
from opt_parallel.planning.choice import MARGIN, SAME, changes, choose, nearest, settings, with_settings
from opt_parallel.planning.cluster import DEVICES, Cluster
from opt_parallel.planning.compose import keys_from
from opt_parallel.planning.plan import plan_of, scaled
from opt_parallel.planning.rates import TO_HOST
from opt_parallel.planning.reliability import PUBLISHED, best_interval, lost, reliability
from opt_parallel.planning.saving import saved_bytes, saving
from opt_parallel.runtime.errors import UserError

CLUSTER = Cluster(DEVICES["a100-40gb"], nodes=2, per_host=8)
OPT_6_7B = ModelConfig(hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, ffn_dim=16384)


def run_of(model: ModelConfig = OPT_6_7B, batch: int = 64, **changed: Any) -> Run:
    base = Run(model=model, precision=PrecisionConfig(Precision.bf16), batch={"global": batch, "micro": 1})
    return dataclasses.replace(base, **changed)


def test_the_choice_is_the_fastest_that_fits() -> None:
    """Compared with a plain search over all values, without the rules that leave some out."""
    run = run_of()
    choice = choose(run, CLUSTER, PLANNED)
    fastest = None
    for tensor, stage, micro, kind in itertools.product(
        (1, 2, 4, 8), (1, 2, 3), (1, 2, 4, 8, 16, 32), ActivationCheckpointing
    ):
        data = CLUSTER.devices // tensor
        if 64 % (data * micro) == 0:
            plan = plan_of(with_settings(run, tensor, stage, micro, kind), CLUSTER)
            if plan.memory.total <= (1 - MARGIN) * plan.limit:
                fastest = min(fastest or plan.time.step, plan.time.step)
    assert choice.best.fits
    assert choice.best.time.step == pytest.approx(fastest, rel=2 * SAME)
    assert all(other.fits and other.time.step > (1 - 2 * SAME) * choice.best.time.step for other in choice.others)
    assert len(choice.others) == 3


def test_what_speaks_against_other_values_names_each_once() -> None:
    choice = choose(run_of(), CLUSTER, ["zero.stage", "activation_checkpointing"])
    words = [word for word, _ in choice.against]
    kinds = [f"activation_checkpointing={kind.value}" for kind in ActivationCheckpointing]
    given = settings(choice.best.run)
    assert {*words, f"activation_checkpointing={given['activation_checkpointing']}"} >= {*kinds}
    assert all("GiB" in reason or "slower" in reason or "as fast" in reason for _, reason in choice.against)
    assert choice.best.run.parallel.tensor == 1


def test_a_model_that_cannot_fit_is_refused_with_what_it_needs() -> None:
    large = ModelConfig(hidden_size=12288, num_hidden_layers=96, num_attention_heads=96, ffn_dim=49152)
    with pytest.raises(UserError, match=r"no settings fit on 16 × a100-40gb: .* needs least, \d+"):
        choose(run_of(large), CLUSTER, PLANNED)


def test_a_batch_that_cannot_be_split_is_refused() -> None:
    with pytest.raises(UserError, match=r"no values divide batch\.global=7"):
        choose(run_of(batch=7), CLUSTER, ["batch.micro"])


def test_the_nearest_settings_fit_and_change_few_keys() -> None:
    run = with_settings(run_of(), 1, 1, 4, ActivationCheckpointing.none)
    plan = plan_of(run, CLUSTER)
    assert not plan.fits
    found = nearest(plan, plan.limit)
    assert len(found) == 3
    assert all(each.fits for each in found)
    numbers = [len(changes(run, each.run).split()) for each in found]
    assert numbers == sorted(numbers)
    assert numbers[0] == 1, "recomputation alone does not suffice?"


def test_scaling_keeps_or_multiplies_the_batch() -> None:
    plan = plan_of(run_of(batch=64), CLUSTER)
    strong, weak = scaled(plan, 32, strong=True), scaled(plan, 32, strong=False)
    assert strong is not None
    assert weak is not None
    assert (strong.run.global_batch, strong.workload.accumulation) == (64, 2)
    assert (weak.run.global_batch, weak.workload.accumulation) == (128, 4)
    assert (strong.cluster.nodes, strong.cluster.per_host) == (4, 8)
    assert scaled(plan, 128, strong=True) is None  # 64 sequences for 128 data ranks


def test_the_interval_of_checkpoints_loses_least() -> None:
    stall, between, restart = 20.0, 40_000.0, 600.0
    best = best_interval(stall, between)
    least = min(range(100, 10_000), key=lambda seconds: lost(seconds, stall, between, restart))
    assert best == pytest.approx(least, rel=0.02)


def test_a_step_has_its_share_of_saving() -> None:
    """All ranks together write 12 bytes of each parameter. With zero.offload=cpu the host holds this copy too."""
    run = dataclasses.replace(run_of(), checkpoint=CheckpointConfig(every=50))
    plan, unsaved = plan_of(run, CLUSTER), plan_of(run_of(), CLUSTER)
    everything = saved_bytes(plan.workload) * CLUSTER.devices
    assert everything == pytest.approx(12 * run.model.parameters(), rel=1e-6)
    stall = saving(plan.workload, CLUSTER, asynchronous=True).stall
    assert stall == pytest.approx(everything / CLUSTER.devices / (CLUSTER.to_host * TO_HOST))
    assert plan.time.step - unsaved.time.step == pytest.approx(stall / 50)
    waiting = saving(plan.workload, CLUSTER, asynchronous=False).stall
    assert waiting == pytest.approx(stall + everything / CLUSTER.storage)
    offloaded = plan_of(dataclasses.replace(run, zero=dataclasses.replace(run.zero, offload=Offload.cpu)), CLUSTER)
    assert offloaded.memory.host == pytest.approx((12 + 12 + 4) / 12 * plan.memory.host, rel=1e-6)


def test_more_devices_fail_more_often() -> None:
    config = keys_from(["cluster=a100-40gb", "cluster.nodes=2"]).cluster
    plan = plan_of(run_of(), config.cluster())
    seen = reliability(plan, config)
    assert seen is not None
    assert seen.between == pytest.approx(86_400_000 / 0.47 / 16)
    assert 0.9 < seen.effective < 1
    more = dataclasses.replace(config, failures=47.0)
    assert reliability(plan, more).every < seen.every  # type: ignore[union-attr]
    assert reliability(plan, dataclasses.replace(config, failures=0.0)) is None


def test_the_published_rates_are_those_of_the_sources() -> None:
    llama, opt = PUBLISHED
    assert llama.per_1000_days == pytest.approx(0.474, abs=1e-3)
    assert opt.per_1000_days == pytest.approx(1.76, abs=1e-2)


@pytest.mark.parametrize(
    ("file", "name"),
    [("a100-40gb", "a100-40gb"), ("a100-80gb", "a100-80gb"), ("h100-80gb", "h100-80gb"), ("h200-141gb", "h200-141gb"),
     ("b200", "b200-180gb")],
)  # fmt: skip
def test_the_files_of_clusters_have_the_devices_of_the_formulas(file: str, name: str) -> None:
    device = keys_from([f"cluster={file}"]).cluster.cluster().device
    known = DEVICES[name]
    assert (device.memory, device.bandwidth) == (known.memory, known.bandwidth)
    assert device.peak == known.peak
