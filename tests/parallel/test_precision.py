"""`precision=auto`: what CPUs can do by their flags, what all ranks take, and that a run keeps it where it goes on."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import pytest
from command import write_text
from layouts import Layout, run_for
from omegaconf import OmegaConf

from opt_parallel.checkpoint.folders import precision_of
from opt_parallel.config.run import Precision, PrecisionConfig
from opt_parallel.parallel.precision import cpu_flags, native_on_cpu, resolved

FP32, BF16, FP16 = Precision.fp32, Precision.bf16, Precision.fp16
ZEN_2 = "fpu vme sse sse2 ssse3 fma cx16 sse4_1 sse4_2 movbe popcnt aes xsave avx f16c rdrand avx2 bmi2 clwb"
ICE_LAKE = ZEN_2 + " avx512f avx512dq avx512cd avx512bw avx512vl avx512vbmi avx512_vnni avx512_vpopcntdq"
ZEN_4 = ICE_LAKE + " avx512_bf16"
SAPPHIRE_RAPIDS = ZEN_4 + " amx_bf16 avx512_fp16 amx_tile amx_int8"
GRAVITON_2 = "fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp"
GRAVITON_3 = GRAVITON_2 + " sve asimdfhm i8mm bf16 dgh rng"
RASPBERRY_PI_4 = "fp asimd evtstrm crc32 cpuid"


@pytest.mark.parametrize(
    ("flags", "environment", "able"),
    [
        (ZEN_2, {}, set()),
        (ICE_LAKE, {}, set()),  # its AVX-512 has no product of bf16, which oneDNN emulates
        (ZEN_4, {}, {BF16}),
        (SAPPHIRE_RAPIDS, {}, {BF16, FP16}),
        (GRAVITON_2, {}, {FP16}),
        (GRAVITON_3, {}, {BF16, FP16}),
        (RASPBERRY_PI_4, {}, set()),
        ("", {}, set()),
        (SAPPHIRE_RAPIDS, {"ONEDNN_MAX_CPU_ISA": "AVX2"}, set()),
        (SAPPHIRE_RAPIDS, {"DNNL_MAX_CPU_ISA": "avx512_core"}, set()),
        (SAPPHIRE_RAPIDS, {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"}, {BF16}),
        (SAPPHIRE_RAPIDS, {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_AMX"}, {BF16, FP16}),
        (SAPPHIRE_RAPIDS, {"ONEDNN_MAX_CPU_ISA": "ALL"}, {BF16, FP16}),
    ],
)
def test_what_a_cpu_multiplies(flags: str, environment: dict[str, str], able: set[Precision]) -> None:
    assert native_on_cpu(set(flags.split()), environment) == {FP32, *able}


def test_flags_as_linux_shows_them() -> None:
    intel = f"processor\t: 0\nvendor_id\t: GenuineIntel\nflags\t\t: {ZEN_4}\nbugs\t\t: spectre_v1\n\nprocessor\t: 1\n"
    arm = f"processor\t: 0\nBogoMIPS\t: 2100.00\nFeatures\t: {GRAVITON_3}\nCPU implementer\t: 0x41\n"
    assert cpu_flags(intel) == set(ZEN_4.split())
    assert cpu_flags(arm) == set(GRAVITON_3.split())
    assert cpu_flags("processor\t: 0\n") == set()


@pytest.mark.parametrize(
    ("asked", "ranks", "stage", "before", "precision", "words"),
    [
        ("auto", [{BF16}], 1, None, BF16, ["natively"]),
        ("auto", [{FP16}], 1, None, FP32, ["nodeA", "bf16"]),
        ("auto", [{BF16}, {BF16}], 3, None, BF16, ["natively"]),
        ("auto", [{BF16}, set()], 1, None, FP32, ["nodeB", "bf16"]),  # all ranks or none
        ("auto", [{BF16}], 0, None, FP32, ["zero.stage=0"]),
        ("auto", [{BF16}], 0, BF16, FP32, ["zero.stage=0"]),
        ("auto", [{BF16}], 1, FP32, FP32, ["checkpoint"]),
        ("auto", [set()], 1, BF16, BF16, ["checkpoint"]),
        ("auto", [set()], 1, FP16, FP16, ["checkpoint"]),
        ("bf16", [set()], 1, FP32, BF16, []),
        ("fp32", [{BF16}], 1, BF16, FP32, []),
        ("fp16", [{BF16}], 2, None, FP16, []),
    ],
)
def test_all_ranks_choose_the_same(
    capsys: pytest.CaptureFixture[str], asked: str, ranks: list[set[Precision]], stage: int,
    before: Precision | None, precision: Precision, words: list[str],
) -> None:  # fmt: skip
    natives = [{FP32, *able} for able in ranks]
    found, why = resolved(
        Precision(asked), stage, natives, ["the CPU of nodeA", "the CPU of nodeB"][: len(ranks)], before
    )
    assert found is precision
    assert bool(why) == bool(words)
    assert all(word in why for word in words)
    emulated = any(precision not in able for able in natives)
    printed = capsys.readouterr().out
    assert (f"emulates {precision.value}" in printed) == emulated
    assert printed.startswith("warning:") == emulated


def trained(folder: Path, machines: list[str], steps: int, **changes: Any) -> str:
    """On the crew: a run with `precision=auto` on the CPUs of `machines`, a rank each; what is printed."""
    import opt_parallel.parallel.precision as module
    from opt_parallel.config.output import LoggingConfig, Wandb
    from opt_parallel.config.run import DataConfig, RunConfig
    from opt_parallel.loop import train
    from opt_parallel.runtime.process import rank

    own = folder / f"cpuinfo-{rank()}"
    own.write_text(f"flags : {machines[rank()]}\n")
    run = dataclasses.replace(
        run_for(Layout(tensor=len(machines), stage=1), {"vocab_size": 301, "num_hidden_layers": 1}, steps=4, batch=2),
        precision=PrecisionConfig(**changes),
        data=DataConfig(train=str(folder / "text.jsonl"), sequence_length=16, cache=str(folder / "cache")),
        logging=LoggingConfig(wandb=Wandb.disabled, tensorboard=False),
        run=RunConfig("settled", str(folder / "run")),
        stop_at=steps,
    )
    real, module.CPUINFO = module.CPUINFO, own
    try:
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            assert train(run) == 0
    finally:
        module.CPUINFO = real
    return printed.getvalue()


def written(folder: Path, step: int) -> set[str]:
    """What the run's files say that it trained in."""
    manifest = json.loads((folder / "run" / "checkpoints" / f"step-{step}" / "manifest.json").read_text())
    config = OmegaConf.load(folder / "run" / "config.yaml")
    return {config.precision.name, manifest["config"]["precision"]["name"], manifest["layout"]["precision"]}


@pytest.mark.parametrize(("first", "then", "name"), [(ZEN_4, ZEN_2, "bf16"), (ZEN_2, ZEN_4, "fp32")])
def test_a_run_keeps_what_it_began_with(crew: Any, tmp_path: Path, first: str, then: str, name: str) -> None:
    write_text(tmp_path)
    (said,) = crew(1)(trained, tmp_path, [first], 1)
    assert f", {name} (precision=auto: " in said
    assert "warning" not in said
    assert written(tmp_path, 1) == {name}
    (said,) = crew(1)(trained, tmp_path, [then], 2)
    assert f", {name} (precision=auto: the checkpoint" in said
    assert ("emulates bf16" in said) == (name == "bf16")
    assert written(tmp_path, 2) == {name}
    (tmp_path / "run" / "checkpoints" / "step-2" / "manifest.json").write_text("damaged")
    assert precision_of(tmp_path / "run" / "checkpoints" / "step-2") is Precision(name)


def test_one_host_without_bf16_is_enough(crew: Any, tmp_path: Path) -> None:
    write_text(tmp_path)
    said = crew(2)(trained, tmp_path, [ZEN_4, ZEN_2], 1)[0]
    assert ", fp32 (precision=auto: the CPU of " in said
    assert "rank 1" in said
    assert written(tmp_path, 1) == {"fp32"}


def test_a_named_one_is_taken_with_a_warning(crew: Any, tmp_path: Path) -> None:
    write_text(tmp_path)
    (said,) = crew(1)(trained, tmp_path, [ZEN_2], 1, name=BF16)
    assert said.count("warning: the CPU emulates bf16") == 1
    assert "precision=auto" not in said
    assert written(tmp_path, 1) == {"bf16"}


def held_to_avx2(folder: Path) -> str:
    """On the crew: a run in fp16 on a CPU with fp16 arithmetic, which oneDNN does not use; what is printed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
        return trained(folder, [SAPPHIRE_RAPIDS], 1, name=FP16)


def test_fp16_on_a_cpu_without_it(crew: Any, tmp_path: Path) -> None:
    write_text(tmp_path)
    (said,) = crew(1)(held_to_avx2, tmp_path)
    assert "warning: the CPU emulates fp16" in said
    assert written(tmp_path, 1) == {"fp16"}
