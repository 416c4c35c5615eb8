"""verify says yes to what we export, at any degree and of any head, and no to each way an export can be wrong."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
import torch
from composing import load_script
from exporting import checkpoint, tampered
from safetensors.torch import load_file
from torch import Tensor

from opt_parallel.checkpoint.sources import open_checkpoint
from opt_parallel.config.output import ExportDtype
from opt_parallel.runtime.errors import UserError
from opt_parallel.tools.export import export
from opt_parallel.tools.verify import verify

ATTENTION = "model.decoder.layers.1.self_attn"
QUERY, KEY, VALUE = (f"{ATTENTION}.{part}_proj.weight" for part in "qkv")


@pytest.fixture(scope="module")
def exported(crew: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A checkpoint of two processes and its export, in one file."""
    folder = tmp_path_factory.mktemp("exported")
    source = checkpoint(crew, folder, "pre-norm")
    export(source, folder / "export", 10**9, ExportDtype.float32)
    return source, folder / "export"


def swap_query_and_key(tensors: dict[str, Tensor]) -> None:
    tensors[QUERY], tensors[KEY] = tensors[KEY], tensors[QUERY]


def permute_two_heads(tensors: dict[str, Tensor]) -> None:
    heads = list(tensors[VALUE].chunk(4))  # layouts.TINY has 4
    tensors[VALUE] = torch.cat([heads[0], heads[2], heads[1], heads[3]])


def flip_a_bit(tensors: dict[str, Tensor]) -> None:
    tensors[KEY].view(torch.int32)[3, 5] ^= 1


FAULTS: dict[str, tuple[Callable[[dict[str, Tensor]], None], list[str], list[str]]] = {
    "query and key": (
        swap_query_and_key,
        [
            f"{QUERY}: differs from checksums.json, and contains the bytes of {KEY}",
            f"{KEY}: differs from checksums.json, and contains the bytes of {QUERY}",
        ],
        ["and contains the bytes of"],
    ),
    "heads": (
        permute_two_heads,
        [f"{VALUE}: differs from checksums.json"],
        ["heads along dim 0 are in the order 0 2 1 3"],
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_an_exchange_is_found(exported: tuple[Path, Path], tmp_path: Path, fault: str) -> None:
    change, by_checksums, by_values = FAULTS[fault]
    source, folder = exported
    wrong = tampered(folder, tmp_path / "wrong", change)
    verdict = verify(wrong)
    assert verdict is not None
    assert not verdict.agrees
    assert sorted(verdict.findings) == sorted(by_checksums)
    assert max(verdict.differences.values()) <= verdict.limit  # both read the same wrong file

    (wrong / "checksums.json").unlink()
    verdict = verify(wrong, against=source)
    assert verdict is not None
    assert not verdict.agrees
    assert min(verdict.differences.values()) > verdict.limit
    assert len(verdict.findings) == len(by_checksums)
    assert all(word in finding for finding in verdict.findings for word in ["values differ, by", *by_values])


def test_a_flipped_bit_is_found(exported: tuple[Path, Path], tmp_path: Path) -> None:
    """Too small for any output to show."""
    source, folder = exported
    wrong = tampered(folder, tmp_path / "wrong", flip_a_bit)
    verdict = verify(wrong, against=source)
    assert verdict is not None
    assert max(verdict.differences.values()) <= verdict.limit
    assert [finding.partition(" values differ")[0] for finding in verdict.findings] == [
        f"{KEY}: differs from checksums.json",
        f"{KEY}: 1 of 4,096",
    ]


def test_damaged_weights_are_seen_where_they_are_used(
    exported: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a checkpoint of ours an error; of an export, which others may change, a warning."""
    source, folder = exported
    wrong = tampered(folder, tmp_path / "wrong", flip_a_bit)
    ours = Path(copytree(source, tmp_path / source.name))
    file = ours / "rank-00001.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    line = f"{ours} is not a complete checkpoint: rank-00001.safetensors differs from its checksum"
    with pytest.raises(UserError, match=re.escape(line)):
        open_checkpoint(ours, checksums=True)
    with pytest.raises(UserError, match=re.escape(line)):
        verify(folder, against=ours)
    words = ["generate", "--prompt", "x", "--max-new-tokens", "2", "--checkpoint"]
    generate = load_script("generate")
    monkeypatch.setattr(sys, "argv", [*words, str(ours)])
    with pytest.raises(UserError, match=re.escape(line)):
        generate.main()
    printed = []
    for weights in (wrong, folder):
        monkeypatch.setattr(sys, "argv", [*words, str(weights)])
        generate.main()
        printed.append(capsys.readouterr().out)
    assert f"warning: {wrong}, {KEY}: differs from checksums.json: if the folder is damaged" in printed[0]
    assert "warning" not in printed[1]


def test_another_network_is_found(exported: tuple[Path, Path], tmp_path: Path) -> None:
    source, folder = exported
    wrong = tampered(folder, tmp_path / "wrong", lambda tensors: None)
    config = json.loads((wrong / "config.json").read_text())
    (wrong / "config.json").write_text(json.dumps({**config, "activation_function": "gelu"}))
    verdict = verify(wrong, against=source)
    assert verdict is not None
    assert not verdict.agrees
    assert [finding.partition(" with ")[2] for finding in verdict.findings] == [
        "activation_function=Activation.gelu, but --against one with Activation.relu"
    ]


def test_we_misread_the_file(exported: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Query and value change places on our side alone: the outputs show it."""
    from opt_parallel.huggingface import names as hf

    right, places = hf.hf_names, {"q_proj": "v_proj", "v_proj": "q_proj"}
    monkeypatch.setattr(
        hf,
        "hf_names",
        lambda name: [next((part.replace(a, b) for a, b in places.items() if a in part), part) for part in right(name)],
    )
    verdict = verify(exported[1])
    assert verdict is not None
    assert not verdict.agrees
    assert min(verdict.differences.values()) > verdict.limit


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_an_export_agrees_with_what_was_exported(exported: tuple[Path, Path], tmp_path: Path, dtype: str) -> None:
    export(exported[0], tmp_path / "export", 10**5, ExportDtype(dtype))
    verdict = verify(tmp_path / "export", against=exported[0])
    assert verdict is not None
    assert verdict.agrees, verdict
    assert list(verdict.differences) == ["unpadded", "left-padded", "right-padded", "inner-padded"]
    assert verdict.limit > 0


STYLES: tuple[dict[str, Any], ...] = ({}, {"do_layer_norm_before": False, "word_embed_proj_dim": 24})
HEADS = ("OPTModel", "OPTForSequenceClassification")
# Every head and every style in one of two pairs, and the other two pairs in the long suite.
OTHER_HEADS = [
    pytest.param(head, style, marks=pytest.mark.long if first == second else ())
    for first, head in enumerate(HEADS)
    for second, style in enumerate(STYLES)
]


@pytest.mark.parametrize(("head", "style"), OTHER_HEADS)
def test_folders_of_other_heads(tmp_path: Path, head: str, style: dict[str, Any]) -> None:
    import transformers

    torch.manual_seed(3)
    shape = {"vocab_size": 131, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 96}
    config = transformers.OPTConfig(**shape, **style, max_position_embeddings=40, num_labels=3, init_std=0.2)
    getattr(transformers, head)(config).save_pretrained(tmp_path / "theirs")
    verdict = verify(tmp_path / "theirs")
    assert verdict is not None
    assert verdict.agrees, verdict
    name = next(name for name in load_file(tmp_path / "theirs" / "model.safetensors") if "k_proj.weight" in name)
    wrong = tampered(tmp_path / "theirs", tmp_path / "wrong", lambda tensors: tensors[name].mul_(1.5))
    verdict = verify(wrong, against=tmp_path / "theirs")
    assert verdict is not None
    assert not verdict.agrees
    assert min(verdict.differences.values()) > verdict.limit
    assert [name in finding for finding in verdict.findings] == [True]


def test_keys_that_are_missing_or_unexpected(exported: tuple[Path, Path], tmp_path: Path) -> None:
    source, folder = exported

    def change(tensors: dict[str, Tensor]) -> None:
        tensors["model.decoder.surplus"] = tensors.pop(VALUE)

    wrong = tampered(folder, tmp_path / "wrong", change)
    verdict = verify(wrong, against=source)
    assert verdict is not None
    assert not verdict.agrees
    assert f"transformers has missing_keys: {VALUE}" in verdict.findings
    assert "transformers has unexpected_keys: model.decoder.surplus" in verdict.findings
    verdict = verify(wrong)
    assert verdict is not None
    assert not verdict.agrees
    assert len(verdict.findings) == 1
    assert VALUE in verdict.findings[0]
    with pytest.raises(UserError, match="surplus"):
        verify(folder, against=wrong)


def test_our_side_may_be_split(crew: Any, exported: tuple[Path, Path]) -> None:
    """The main rank has the verdict."""
    source, folder = exported
    verdict, nothing = crew(2)(verify, folder, source, 2)
    assert verdict.agrees, verdict
    assert nothing is None
    with pytest.raises(UserError, match="num_attention_heads=4 is not divisible by --tensor 3"):
        verify(folder, tensor=3)


def test_the_script(
    exported: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source, folder = exported
    monkeypatch.setattr(sys, "argv", ["verify", "--checkpoint", str(folder), "--against", str(source)])
    assert load_script("verify").main() == 0
    agrees = f"{folder}: agrees with {source} in transformers; largest difference of outputs: "
    assert capsys.readouterr().out.startswith(agrees)
    wrong = tampered(folder, tmp_path / "wrong", swap_query_and_key)
    monkeypatch.setattr(sys, "argv", ["verify", "--checkpoint", str(wrong)])
    assert load_script("verify").main() == 1
    assert capsys.readouterr().out.splitlines()[-1].startswith(f"{wrong}: DISAGREES with transformers; ")


def test_a_training_checkpoint_is_nothing_for_transformers(exported: tuple[Path, Path]) -> None:
    with pytest.raises(UserError, match=f"--checkpoint {exported[0]} is not a Hugging Face folder"):
        verify(exported[0])


@pytest.mark.parametrize("content", ["oops", "[1]"])
def test_damaged_checksums_are_a_finding(exported: tuple[Path, Path], tmp_path: Path, content: str) -> None:
    folder = tampered(exported[1], tmp_path / "damaged", lambda tensors: None)
    (folder / "checksums.json").write_text(content)
    verdict = verify(folder)
    assert verdict is not None
    assert "checksums.json cannot be read" in verdict.findings[0]


def test_a_value_that_is_not_finite_is_named(
    exported: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = tampered(exported[1], tmp_path / "nan", lambda tensors: tensors[KEY].view(-1)[:1].fill_(float("nan")))
    verdict = verify(wrong)
    assert verdict is not None
    assert not verdict.agrees
    assert "values that are not finite, in decoder.layers.1.self_attn.qkv_proj.weight" in capsys.readouterr().out
