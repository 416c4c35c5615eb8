"""Saved, resumed, exported: the straight run goes on, and transformers reads what we write."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from command import python, small, torchrun, train_rows

from opt_parallel.checkpoint.reading import open_checkpoint
from opt_parallel.checkpoint.store import newest
from opt_parallel.config import ExportDtype, bytes_of
from opt_parallel.errors import UserError
from opt_parallel.export import export
from opt_parallel.topology import ALONE

RUN = [
    "parallel.tensor=2",
    "zero.stage=1",
    "model.layerdrop=0.2",
    "steps=6",
    "checkpoint.every=2",
    "model.vocab_size=301",
]


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """The folder of a run at tensor 2 that was stopped at step 4 of 6, and its arguments."""
    folder = tmp_path_factory.mktemp("stopped")
    arguments = [*small(folder), *RUN]
    process = torchrun(2, "train.py", *arguments, "stop_at=4")
    assert process.returncode == 0, process.stderr
    return folder, arguments


def test_resume_is_the_straight_run(stopped: tuple[Path, list[str]]) -> None:
    folder, arguments = stopped
    assert sorted(path.name for path in (folder / "run" / "checkpoints").iterdir()) == ["step-2", "step-4"]
    assert torchrun(2, "train.py", *arguments, f"run.dir={folder / 'straight'}").returncode == 0
    resumed = torchrun(2, "train.py", *arguments)
    assert resumed.returncode == 0
    assert "continuing at step 4" in resumed.stdout
    assert [(row["step"], row["loss"], row["samples"], row["tokens"]) for row in train_rows(folder / "run")] == [
        (row["step"], row["loss"], row["samples"], row["tokens"]) for row in train_rows(folder / "straight")
    ]
    assert sorted(path.name for path in (folder / "run" / "checkpoints").iterdir()) == ["step-4", "step-6"]  # keep=2


REFUSED = {
    "layout": (["parallel.tensor=1"], ["parallel.tensor 2", "has 1"]),
    "never": (["parallel.tensor=1", "resume=never"], ["resume=never", "run.dir"]),
    "network": (["parallel.tensor=1", "model.num_attention_heads=2"], ["num_attention_heads=4", "has 2"]),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refusals(stopped: tuple[Path, list[str]], what: str) -> None:
    _, arguments = stopped
    change, words = REFUSED[what]
    process = python("train.py", *arguments, *change, "steps=9")
    assert process.returncode == 2
    assert all(word in process.stderr for word in words), process.stderr


def test_another_tokenizer_is_refused(tmp_path: Path) -> None:
    arguments = [*small(tmp_path), "steps=2"]
    assert python("train.py", *arguments).returncode == 0
    (tmp_path / "text.jsonl").write_text('{"text": "Wholly other words make wholly other tokens."}\n' * 40)
    process = python("train.py", *arguments, "steps=4")
    assert process.returncode == 2
    assert "another tokenizer" in process.stderr


def test_a_folder_without_a_manifest_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "step-99").mkdir()
    assert newest(tmp_path) is None
    with pytest.raises(UserError, match="neither a training checkpoint"):
        open_checkpoint(tmp_path / "step-99")


def test_going_back_sets_the_abandoned_branch_aside(tmp_path: Path) -> None:
    """From an earlier checkpoint with a lower learning rate: the remedy for a divergence."""
    arguments = [*small(tmp_path), "steps=4", "checkpoint.every=1", "checkpoint.keep=3"]
    assert python("train.py", *arguments).returncode == 0
    checkpoints = tmp_path / "run" / "checkpoints"
    back = python("train.py", *arguments, f"resume={checkpoints / 'step-2'}", "optimizer.lr=1e-5", "stop_at=3")
    assert back.returncode == 0, back.stderr
    assert sorted(path.name for path in checkpoints.iterdir()) == [
        "step-2",
        "step-3",
        "step-3.abandoned",
        "step-4.abandoned",
    ]
    rows = train_rows(tmp_path / "run")
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert rows[-1]["lr"] < 1e-5  # what is configured now acts on the next step
    again = python("train.py", *arguments, "optimizer.lr=1e-5")
    assert "continuing at step 3" in again.stdout


@pytest.mark.parametrize("shard_size", ["5GB", "100KB"])
def test_export_loads_in_transformers(stopped: tuple[Path, list[str]], tmp_path: Path, shard_size: str) -> None:
    from transformers import AutoTokenizer, OPTForCausalLM

    folder, _ = stopped
    checkpoint = folder / "run" / "checkpoints" / "step-4"
    output = tmp_path / "export"
    export(checkpoint, output, bytes_of(shard_size, ""), ExportDtype.float32)
    files = sorted(path.name for path in output.glob("*.safetensors"))
    if shard_size == "5GB":
        assert files == ["model.safetensors"]
    else:
        assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
        assert len(files) > 1
        assert all((output / name).stat().st_size < 110_000 for name in files)
        index = json.loads((output / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == 4 * open_checkpoint(checkpoint).config.parameters()
    theirs, report = OPTForCausalLM.from_pretrained(output, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert theirs.config.vocab_size == 301  # no padding of the two ranks' halves
    ids = torch.randint(0, 301, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = theirs.eval()(input_ids=ids).logits
        for opened in (checkpoint, output):
            ours = open_checkpoint(opened).model(ALONE, torch.device("cpu"))(ids)
            torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)
    assert AutoTokenizer.from_pretrained(output)("x").input_ids[0] == 2  # a prompt starts with </s>


def test_export_leaves_what_exists(stopped: tuple[Path, list[str]], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="exists"):
        export(stopped[0] / "run" / "checkpoints" / "step-4", tmp_path, 10**9, ExportDtype.float32)
    with pytest.raises(UserError, match="5 apples"):
        bytes_of("5 apples", "")
    assert [bytes_of(text, "") for text in ("5GB", "1.5mb", "12", "3KB")] == [5 * 10**9, 1_500_000, 12, 3000]


def test_generation_is_transformers_greedy_at_any_degree(stopped: tuple[Path, list[str]], tmp_path: Path) -> None:
    from transformers import AutoTokenizer, OPTForCausalLM

    checkpoint = stopped[0] / "run" / "checkpoints" / "step-4"
    output = tmp_path / "export"
    export(checkpoint, output, 10**9, ExportDtype.float32)
    tokenizer = AutoTokenizer.from_pretrained(output)
    ids = tokenizer("Sentence 7", return_tensors="pt").input_ids
    theirs = OPTForCausalLM.from_pretrained(output)
    expected = theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
    text = tokenizer.decode(expected[0], skip_special_tokens=True)
    common = ["scripts/generate.py", "--prompt", "Sentence 7", "--max-new-tokens", "12"]
    one = python(*common, "--checkpoint", str(output))
    two = torchrun(2, *common, "--checkpoint", str(checkpoint), "--tensor", "2")
    assert one.stdout == two.stdout == text + "\n", one.stderr + two.stderr


def test_verify_says_yes_and_no(stopped: tuple[Path, list[str]], tmp_path: Path) -> None:
    output = tmp_path / "export"
    export(stopped[0] / "run" / "checkpoints" / "step-4", output, 10**9, ExportDtype.float32)
    assert python("scripts/verify.py", "--checkpoint", str(output)).returncode == 0
    from opt_parallel.model import hf
    from opt_parallel.verify import TOLERANCE, logit_differences

    with pytest.MonkeyPatch.context() as patch:  # we misread the file: query and value change places
        right = hf.hf_names
        swap = {"q_proj": "v_proj", "v_proj": "q_proj"}
        patch.setattr(
            hf,
            "hf_names",
            lambda name: [
                next((part.replace(a, b) for a, b in swap.items() if a in part), part) for part in right(name)
            ],
        )
        assert max(logit_differences(output).values()) > TOLERANCE
