"""Rows of published tables: how cells are read, what is compared, and that docs/planning-formulas.md is true."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import pytest

from opt_parallel.planning import accuracy, fsdp, golden, published, validate
from opt_parallel.planning.rows import Refused, cluster_of, number
from opt_parallel.planning.workload import Recompute, Trainer
from opt_parallel.runtime.errors import UserError

HERE, ROOT = Path(__file__).parent, Path(__file__).parents[2]
PUBLISHED, GOLDEN = HERE / "published.csv", HERE / "golden.csv"
LATER = HERE / "blind.csv", HERE / "blind_golden.csv"


def cells(name: str, **changes: str) -> dict[str, str]:
    with open(PUBLISHED, newline="", encoding="utf-8") as file:
        return next(row for row in csv.DictReader(file) if row["id"] == name) | changes


def found() -> list[validate.Compared]:
    return validate.compare(validate.read(PUBLISHED))


@pytest.mark.parametrize(
    ("cell", "value"),
    [
        ("153 HARDWARE", 153),
        ("~704", 704),
        ("24 (inferred)", 24),
        ("? (says 24)", None),
        ("", None),
        ("1,536", 1536),
        ("12 288", 12288),
        ("20663519232 / 57143791616", 20663519232),
        ("1e3", 1000),
    ],
)
def test_numbers_of_cells(cell: str, value: float | None) -> None:
    assert number(cell) == value


@pytest.mark.parametrize("cell", ["-4", "~-4", "1,5", "4K", "1.2.3"])
def test_numbers_that_could_be_misread_are_refused(cell: str) -> None:
    with pytest.raises(Refused, match="a cell says"):
        number(cell)


def test_the_judged_rows_are_within_the_documented_errors() -> None:
    """The goals of docs/planning-formulas.md. K2 is measured with another micro-batch than its row says."""
    judged = [each for each in found() if not each.fitted and each.row.id != "K2"]
    for what, mean, worst in (("memory", 0.05, 0.10), ("time", 0.10, 0.20)):
        some = [each for each in judged if each.what == what]
        assert len(some) > 15
        assert validate.mean_of(some) < mean
        assert max(abs(each.error) for each in some) < worst


def test_the_page_has_the_table_and_plans_print_its_result() -> None:
    page = (ROOT / "docs" / "planning-formulas.md").read_text(encoding="utf-8")
    for line in validate.errors(found()):
        assert line in page
    assert accuracy.of(found()) == accuracy.LINE


def test_the_page_has_the_errors_of_rows_collected_later() -> None:
    page = (ROOT / "docs" / "planning-formulas.md").read_text(encoding="utf-8")
    later = [each for path in LATER for each in validate.compare(validate.read(path))]
    for line in validate.errors(later):
        assert line in page


def test_a_row_of_unknown_recomputation_gets_the_lightest_that_fits() -> None:
    row = published.row(cells("B4"))
    assert row.workload is not None
    assert row.workload.recompute is Recompute.none
    tight = published.row(cells("B4", tp="1", pp="8", gpus="8", dp_or_fsdp="1"))
    assert tight.workload is not None
    assert tight.workload.recompute is Recompute.full


def test_networks_of_names_and_sizes() -> None:
    llama, gpt, large = (published.network_of(cells(name)) for name in ("K1", "M1", "S5"))
    assert llama.gated
    assert not llama.tied
    assert (llama.norm, llama.positions, llama.biases) == (1, 0, False)
    assert not gpt.tied  # 1.7B parameters, and 1.5B if the embedding were the output projection
    assert large.tied
    assert not large.gated


def test_a_row_without_a_shape_or_with_an_unknown_device_is_refused() -> None:
    with pytest.raises(Refused, match="the cell layers is empty"):
        published.row(cells("K1", layers=""))
    with pytest.raises(Refused, match="TPU"):
        published.row(cells("K1", gpu="TPU v5"))
    with pytest.raises(Refused, match="a100-80gb has no products in fp8"):
        published.row(cells("S1", precision="fp8"))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"layers": "thirty"}, "the cell layers says 'thirty', which is no whole number"),
        ({"tp": "two"}, "the cell tp says 'two'"),
        ({"micro_batch": "0"}, "the cell micro_batch says 0"),
        ({"micro_batch": "1.5"}, "which is no whole number"),
        ({"gpus": "-8"}, "no column may be negative"),
        ({"gpus": "10"}, "gpus 10 are not a multiple of tp × pp × cp = 4"),
        ({"gpus": "64", "dp_or_fsdp": "3"}, "gpus 64 are not tp × pp × cp × dp_or_fsdp = 12"),
        ({"precision": "nvfp4"}, "the cell precision says 'nvfp4'"),
        ({"recompute": "every second layer"}, "the cell recompute says"),
        ({"mem_gpu": "", "iter_s": "", "tok_s_gpu": "-", "tok_s_total": "", "tflops_gpu_model": "", "mfu_pct": "n/a"},
         "no cell says what was measured"),
    ],
)  # fmt: skip
def test_cells_that_cannot_be_planned_are_refused_with_their_reason(changes: dict[str, str], reason: str) -> None:
    with pytest.raises(Refused, match=reason):
        published.row(cells("K22", **changes))


@pytest.mark.parametrize(
    ("changes", "quantity", "value"),
    [
        ({"iter_s": "", "tok_s_gpu": "", "tok_s_total": "35,824"}, "tok_s_gpu", 35824 / 64),
        ({"iter_s": "none", "tok_s_gpu": "", "tflops_gpu_model": "251.5"}, "tflops_gpu", 251.5),
        ({"iter_s": "", "tok_s_gpu": "", "tflops_gpu_model": "-", "mfu_pct": "25.4"}, "mfu_pct", 25.4),
    ],
)
def test_the_time_of_a_row_is_the_first_that_is_given(changes: dict[str, str], quantity: str, value: float) -> None:
    row = published.row(cells("K22", **changes))
    times = {each.quantity: each for each in validate.compare([row]) if each.what == "time"}
    assert times[quantity].measured == value
    assert abs(times[quantity].error) < 0.1


@pytest.mark.parametrize(
    ("gpu", "name"),
    [
        ("H100", "h100-80gb"),
        ("NVIDIA A100-SXM4-80GB", "a100-80gb"),
        ("A100-SXM4-40GB", "a100-40gb"),
        ("H100-96 500W", "h100-96gb-500w"),
        ("GB200-186", "gb200-186gb"),
        ("B200", "b200-180gb"),
        ("H200-141", "h200-141gb"),
    ],
)
def test_devices_of_cells(gpu: str, name: str) -> None:
    assert cluster_of(gpu, 8).device.name == name


@pytest.mark.parametrize(
    ("word", "mode"),
    [
        ("none (inferred)", Recompute.none),
        ("No AC", Recompute.none),
        ("-", Recompute.none),
        ("full (mem)", Recompute.full),
        ("True", Recompute.full),
        ("? (in the recipe)", Recompute.none),
    ],
)
def test_remarks_beside_recomputation(word: str, mode: Recompute) -> None:
    row = published.row(cells("B4", recompute=word))
    assert row.workload is not None
    assert row.workload.recompute is mode


def test_words_for_recomputation() -> None:
    kept = {word: published.row(cells("B9", recompute=word)) for word in ("none", "mlp", "core_attn", "selective")}
    modes = [row.workload.recompute for row in kept.values() if row.workload]
    assert modes == [Recompute.none, Recompute.feed_forward, Recompute.attention, Recompute.attention]
    titan = published.row(cells("TT6", recompute="selective")).workload
    assert titan is not None
    assert titan.recompute is Recompute.operators


def test_a_stage_of_torchs_pipeline() -> None:
    """Its local batch is divided by the stages. The first stage has no logits, and holds more micro-batches."""
    row = published.row(cells("TT10", pp="4", gpus="1024"))
    assert row.workload is not None
    assert (row.workload.micro, row.workload.accumulation) == (4, 4)
    both = fsdp.part(row.workload)
    first = fsdp.part(replace(row.workload, stage_memory="first"))
    assert first.logits == 0
    assert both.peak_at == "the last stage"
    assert fsdp.part(replace(row.workload, context=2)).activations < both.activations


def test_small_batches_of_fsdp_have_their_peak_where_the_embeddings_are_reduced() -> None:
    """KempnerForge's 175b_360gpu writes 19.7 GiB for a micro-batch of 1, of 53.8 for one of 8."""
    with open(LATER[0], newline="", encoding="utf-8") as file:
        row = next(row for row in csv.DictReader(file) if row["id"] == "K26")
    small = published.row(row | {"micro_batch": "1", "global_batch_seqs": "90", "mem_gpu": "19.7"})
    assert small.workload is not None
    assert fsdp.part(small.workload).peak_at == "the end of the backward"
    peak = next(each for each in validate.compare([small]) if each.quantity == "peak")
    assert abs(peak.error) < 0.1


@pytest.mark.parametrize("cell", ["", "?", "0", "unknown"])
def test_a_row_with_any_empty_cell_is_planned_or_refused(cell: str) -> None:
    """No cell, if it is empty or odd, ends the comparison of the other rows."""
    for name in ("K22", "M7", "S8", "P9", "B8", "TT10", "G1"):
        for column in cells(name):
            try:
                row = published.row(cells(name, **{column: cell}))
            except Refused:
                continue
            assert all(each.predicted > 0 for each in validate.compare([row])), (name, column)


def test_a_row_with_unknown_cells_is_planned() -> None:
    row = published.row(cells("G5"))
    assert row.no_time == "the number of devices is unknown"
    assert row.workload is not None
    assert row.workload.data == 24


def test_arguments_of_megatrons_tests() -> None:
    rows = {row.id: row for row in validate.read(GOLDEN)}
    uneven = rows["gpt3_mcore_te_tp1_pp4_vp1_uneven_pipeline/lts"]
    assert uneven.workload is None
    assert "uneven_pipeline" in (uneven.refused or "")
    virtual = rows["gpt3_mcore_te_tp1_pp4_vp1/dev_dgx_gb200"].workload
    assert virtual is not None
    assert (virtual.trainer, virtual.virtual, virtual.flash) == (Trainer.megatron, 3, False)
    judged = [each for each in validate.compare(list(rows.values())) if each.what == "memory"]
    assert validate.mean_of(judged) < 0.015
    assert set(GOLDEN.read_text(encoding="utf-8").splitlines()[0].split(",")) >= golden.COLUMNS


@pytest.mark.parametrize(
    ("case", "platform", "backend", "flash", "logit"),
    [
        ("gpt3_mcore_te_tp2_pp2_cross_entropy_loss_fusion", "lts_dgx_a100", "", True, 10),
        ("gpt3_mcore_te_tp2_pp2_cross_entropy_loss_fusion", "lts_dgxa100_dracooci", "", False, 14),
        ("gpt3_mcore_te_tp2_pp2_cross_entropy_loss_fusion", "dev_dgx_h100", "unfused", False, 10),
        ("gpt3_mcore_te_tp2_pp2_resume_torch_dist", "dev_dgx_h100", "", True, 6),
    ],
)
def test_a_fused_loss_of_megatrons_tests(case: str, platform: str, backend: str, flash: bool, logit: int) -> None:
    with open(GOLDEN, newline="", encoding="utf-8") as file:
        one = next(csv.DictReader(file))
    row = golden.row(one | {"case": case, "platform": platform, "attention-backend": backend, "n_iter": "11"})
    assert row.workload is not None
    assert (row.workload.flash, row.workload.logits.value) == (flash, logit)


def test_records_of_other_devices_are_refused() -> None:
    with open(GOLDEN, newline="", encoding="utf-8") as file:
        release = next(row for row in csv.DictReader(file) if row["case"] == "gpt3_15b_8t_release")
    with pytest.raises(Refused, match="the case is of GB200 and the platform is not"):
        golden.row(release | {"case": "gpt3_15b_8t_release_sm_gb200"})
    with pytest.raises(Refused, match="the device 'b300' is unknown"):
        golden.row(release | {"platform": "dev_dgx_b300"})


def test_times_without_a_fitted_rate_are_not_planned() -> None:
    for name, changes, reason in (
        ("TT10", {"precision": "fp8 rowwise compile"}, "a scale for each row"),
        ("TT7", {"cp": "2", "dp_or_fsdp": "4"}, "over context ranks"),
        ("G1", {"gpu": "GB200-186"}, "equal from run to run"),
    ):
        assert reason in (published.row(cells(name, **changes)).no_time or "")


def test_the_report_and_its_json(tmp_path: Path) -> None:
    text = validate.report(GOLDEN, tmp_path / "out.json")
    assert "not planned: the case's name says uneven_pipeline" in text
    rows = json.loads((tmp_path / "out.json").read_text())
    assert {"id", "quantity", "predicted", "measured"} == set(rows[0])
    assert len(rows) == len(validate.compare(validate.read(GOLDEN)))


def test_files_of_spreadsheets(tmp_path: Path) -> None:
    """A byte order mark, semicolons, CRLF, further columns, line breaks in cells and a line that ends early."""
    lines = list(csv.reader(PUBLISHED.open(newline="", encoding="utf-8")))
    path = tmp_path / "rows.csv"
    with open(path, "w", newline="", encoding="utf-8-sig") as file:
        table = csv.writer(file, delimiter=";", lineterminator="\r\n")
        table.writerow([*lines[0], "note"])
        table.writerow([*lines[1], "two\nlines"])
        table.writerow(lines[2][:10])
        table.writerow([*lines[3], "", "one cell more"])
    first, second, third = validate.read(path)
    assert (first.workload, first.refused) == (validate.read(PUBLISHED)[0].workload, None)
    assert second.refused == "no cell says what was measured"
    assert "more cells than the first line has columns" in (third.refused or "")


@pytest.mark.parametrize(("text", "reason"), [("", "has no columns"), ("HEAD", "has columns but no rows")])
def test_files_without_rows_are_refused(tmp_path: Path, text: str, reason: str) -> None:
    path = tmp_path / "rows.csv"
    path.write_text(PUBLISHED.read_text(encoding="utf-8").splitlines()[0] if text else "")
    with pytest.raises(UserError, match=reason):
        validate.report(path, None)


def test_other_columns_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("name,value\nx,1\n")
    with pytest.raises(UserError, match="has no columns dp_kind"):
        validate.report(path, None)
    with pytest.raises(UserError, match="cannot read"):
        validate.report(tmp_path / "absent.csv", None)
