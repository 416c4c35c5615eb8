"""A checkpoint of the ecosystem goes in: logits are transformers', and a run starts from its weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from command import launch, python, small, train_rows
from composing import quick_run_of
from hugging_face import SHAPE, VARIANTS, logits_of, random_model, some_ids
from safetensors.torch import load_file, save_file
from stores import feed_of
from training import trained

from opt_parallel.data.encode.tokenizer import save_tokenizer, train_tokenizer
from opt_parallel.runtime.errors import UserError

STORED = [(dtype, size) for dtype in ("float32", "float16", "bfloat16") for size in ("1GB", "40KB")]
# every variant, and every way of storing at least once
IMPORTS = [(variant, *STORED[number % len(STORED)]) for number, variant in enumerate(VARIANTS)]
NETWORK = {"vocab_size": 300, "dropout": 0.0}
ZERO_3 = ["parallel.tensor=2", "zero.stage=3", "zero.persistence_threshold=0", "zero.prefetch_bucket_size=1000"]


def our_logits(folder: str, tensor: int) -> torch.Tensor:
    """On the crew."""
    from opt_parallel.checkpoint.sources import open_checkpoint
    from opt_parallel.parallel.topology import Topology

    with Topology.open(tensor) as topology, torch.no_grad():
        return open_checkpoint(folder).model(topology.tensor, torch.device("cpu"))(some_ids())


@pytest.mark.parametrize("tensor", [1, 2])
@pytest.mark.parametrize(("variant", "dtype", "size"), IMPORTS)
def test_logits_are_transformers(crew: Any, tmp_path: Path, variant: str, dtype: str, size: str, tensor: int) -> None:
    model = random_model(VARIANTS[variant]).to(getattr(torch, dtype))
    model.save_pretrained(tmp_path, max_shard_size=size)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (size == "40KB")
    expected = logits_of(model.float())
    for logits in crew(tensor)(our_logits, str(tmp_path), tensor):
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)  # fp32 sums in another order


def warned(folder: str) -> str:
    """On the crew: what rank 0 says of a model whose other rank's part has a NaN."""
    import contextlib
    import io

    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        our_logits(folder, 2)
    return printed.getvalue()


def test_a_nan_in_another_ranks_part_is_named(crew: Any, tmp_path: Path) -> None:
    model = random_model()
    with torch.no_grad():
        model.model.decoder.layers[1].fc1.weight[-1, 0] = float("nan")
    model.save_pretrained(tmp_path)
    said, silence = crew(2)(warned, str(tmp_path))
    assert said.endswith("not finite, in decoder.layers.1.fc1.weight\n")
    assert silence == ""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder with a tokenizer, of one of the ids in `small`'s text."""
    folder = tmp_path_factory.mktemp("checkpoints") / "theirs"
    random_model(NETWORK).save_pretrained(folder, max_shard_size="40KB")
    texts = [f"Sentence {i} of the made-up text" for i in range(50)]
    save_tokenizer(train_tokenizer(texts, NETWORK["vocab_size"]), folder)
    return folder


def start(folder: Path, checkpoint: str | Path, *more: str) -> list[str]:
    """The arguments of a small run from `checkpoint`, whose model is not named."""
    arguments = [argument for argument in small(folder) if not argument.startswith("model=")]
    return [*arguments, f"init_from={checkpoint}", *more]


def test_a_run_at_zero_3_starts_from_the_weights(crew: Any, checkpoint: Path, tmp_path: Path) -> None:
    """Its first loss is transformers' on the run's first batch."""
    from opt_parallel.data.samples.samples import Rows
    from opt_parallel.data.store.store import TokenStore

    process = trained(crew(2), *start(tmp_path, checkpoint, *ZERO_3, "steps=1"))
    assert process.returncode == 0, process.stderr
    assert f"starting from {checkpoint}: from-theirs," in process.stdout
    rows = Rows(TokenStore(next((tmp_path / "cache").glob("store-*[!k]"))), 16)
    batch = feed_of(rows, 1, 4, 4).at(0)[0]
    theirs = random_model(NETWORK)
    with torch.no_grad():
        logits = theirs(input_ids=batch.ids).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.labels.flatten())
    assert train_rows(tmp_path / "run")[0]["loss"] == pytest.approx(loss.item(), rel=1e-5)  # fp32, another order


def test_a_hub_id(checkpoint: Path, tmp_path: Path) -> None:
    """The hub's cache in its own layout; refs/main names the snapshot."""
    repository = tmp_path / "hub" / "models--someone--theirs"
    shutil.copytree(checkpoint, repository / "snapshots" / "0123abcd")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0123abcd")
    offline = {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    process = launch(1, "train.py", *start(tmp_path, "someone/theirs", "steps=1"), **offline)
    assert process.returncode == 0, process.stderr
    assert "starting from someone/theirs: from-theirs," in process.stdout


@pytest.fixture(scope="module")
def first(crew: Any, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run's text and cache, and in `first` the run, which stopped at step 1 of 2."""
    folder = tmp_path_factory.mktemp("first")
    done = trained(crew(1), *start(folder, checkpoint, *FIRST, f"run.dir={folder / 'first'}", "stop_at=1"))
    assert done.returncode == 0, done.stderr
    return folder


FIRST = ["steps=2", "model.dropout=0.3"]


def test_a_run_that_resumes_does_not_read_its_start_again(crew: Any, first: Path, checkpoint: Path) -> None:
    """Another start than its own is named in a warning."""
    other = Path(shutil.copytree(checkpoint, first / "other"))
    for file in other.rglob("*.safetensors"):
        file.unlink()
    shutil.copytree(first / "first", first / "resumed")
    process = trained(crew(1), *start(first, other, *FIRST, f"run.dir={first / 'resumed'}"))
    assert process.returncode == 0, process.stderr
    assert "continuing at step 1" in process.stdout
    assert f"warning: init_from={other} is not read" in process.stdout
    assert f"started from {checkpoint}; choose another run.name" in process.stdout


def test_one_of_our_checkpoints(crew: Any, first: Path) -> None:
    """Another run starts from its weights, dropout and tokenizer."""
    step = first / "first" / "checkpoints" / "step-1"
    process = trained(crew(1), *start(first, step, "steps=1", "model.attention_dropout=0.2"))
    assert process.returncode == 0, process.stderr
    assert f"starting from {step}: from-first-step-1," in process.stdout
    saved = json.loads((first / "run" / "checkpoints" / "step-1" / "manifest.json").read_text())["config"]
    taken = [saved["model"][name] for name in ("hidden_size", "dropout", "attention_dropout")]
    assert taken == [SHAPE["hidden_size"], 0.3, 0.2]  # the network's, the checkpoint's, the command line's
    assert saved["data"]["tokenizer"] == str(step / "tokenizer")
    losses = [train_rows(folder)[0]["loss"] for folder in (first / "run", first / "first")]
    assert losses[0] < losses[1]  # of the same first batch, after a step that saw it


MISTAKES: dict[str, tuple[list[str], list[str]]] = {
    "field": (["model.hidden_size=64"], ["model.hidden_size=64", "has 48"]),
    "model": (["model=opt-tiny"], ["model.vocab_size=512", "has 300"]),
    "experiment": (["experiment=demo"], ["model.vocab_size=2048", "has 300"]),
    "activation": (["model.activation_function=gelu"], ["model.activation_function=gelu", "has relu"]),
    "nowhere": (["init_from=no/such/folder"], ["init_from=no/such/folder", "does not exist"]),
    "no checkpoint": (["init_from=configs"], ["init_from=configs", "neither a training checkpoint"]),
    "sequence": (["data.sequence_length=64"], ["data.sequence_length=64", "=32"]),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line(checkpoint: Path, mistake: str) -> None:
    arguments, words = MISTAKES[mistake]
    with pytest.raises(UserError) as caught:
        quick_run_of(f"init_from={checkpoint}", "data.sequence_length=16", *arguments)
    assert "\n" not in str(caught.value)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_a_mistake_ends_with_status_2(checkpoint: Path, tmp_path: Path) -> None:
    arguments, words = MISTAKES["field"]
    process = python("train.py", *start(tmp_path, checkpoint, *arguments))
    assert process.returncode == 2, process.stdout + process.stderr
    assert process.stderr.count("\n") == 1
    assert all(word in process.stderr for word in words), process.stderr


def test_the_same_shape_may_be_named_and_dropouts_differ(checkpoint: Path) -> None:
    named = ["model=opt-tiny", *(f"model.{name}={value}" for name, value in SHAPE.items()), "model.vocab_size=300"]
    cases = [  # the named model's dropout, the command line's, the checkpoint's
        ([*named], 0.1),
        ([*named, "model.dropout=0.25"], 0.25),
        (["model.word_embed_proj_dim=null"], 0.0),
    ]
    for given, dropout in cases:
        assert quick_run_of(*given, f"init_from={checkpoint}", "data.sequence_length=16").model.dropout == dropout


def test_wrong_weights_are_one_line_on_every_rank(
    crew: Any, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the ranks wait for each other; a missing tokenizer or hub id likewise."""
    broken = shutil.copytree(checkpoint, tmp_path / "broken")
    file = sorted(broken.glob("*.safetensors"))[0]
    tensors = load_file(file)
    tensors["score.weight"] = torch.zeros(2, 48)
    save_file(tensors, file)
    process = trained(crew(2), *start(tmp_path, broken, *ZERO_3))
    assert (process.returncode, process.stderr.count("\n")) == (2, 1)
    assert "score.weight is unexpected" in process.stderr
    (broken / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="has no tokenizer"):
        quick_run_of(*start(tmp_path, broken))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"init_from=someone/else is not a local folder") as caught:
        quick_run_of(*start(tmp_path, "someone/else"))
    assert "\n" not in str(caught.value)
