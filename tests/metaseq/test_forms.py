"""Every form of metaseq's checkpoints has the tensors of the Hugging Face folder with the same weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from metaseq_forms import FORMS, Size, weights_of, write, write_hugging_face

from opt_parallel.checkpoint.sources import Opened, open_checkpoint
from opt_parallel.config.output import ExportDtype
from opt_parallel.huggingface.names import HuggingFaceWeights
from opt_parallel.metaseq.settings import HEADS
from opt_parallel.metaseq.weights import Turns
from opt_parallel.model.heads import CausalLM
from opt_parallel.parallel.shard import Shard, marked
from opt_parallel.parallel.topology import ALONE, Group
from opt_parallel.runtime.errors import UserError
from opt_parallel.tools.export import export
from opt_parallel.tools.progress import ahead

SIZE = Size()
SMALL_350M = Size(post_norm=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for the checkpoints of this module, with the same weights for transformers in `hf` and `hf-350m`."""
    folder = tmp_path_factory.mktemp("metaseq")
    write_hugging_face(folder / "hf", SIZE, weights_of(SIZE))
    write_hugging_face(folder / "hf-350m", SMALL_350M, weights_of(SMALL_350M))
    return folder


SHARDS: dict[tuple[str, int], list[tuple[str, Shard]]] = {}  # by configuration and degree


def shards_of(opened: Opened, degree: int) -> list[tuple[str, Shard]]:
    """The parts of all parameters on all ranks of a tensor group."""
    key = str(opened.config), degree
    if key not in SHARDS:
        with torch.device("meta"):
            models = [CausalLM(opened.config, Group(None, rank, degree)) for rank in range(degree)]
        SHARDS[key] = [(name, shard) for model in models for name, _, shard in marked(model)]
    return SHARDS[key]


def state_heads(folder: Path, **values: Any) -> None:
    """Write a config.json with the values that files without settings do not have."""
    (folder / "config.json").write_text(json.dumps({"model_type": "opt", **values}))


def written(form: str, folder: Path, size: Size, parts: int = 2, shards: int = 3) -> Path:
    write(form, folder, size, weights_of(size), parts, shards)
    if form in ("bare", "arrays"):
        state_heads(folder, num_attention_heads=size.heads, do_layer_norm_before=not size.post_norm)
    return folder


def require_equal(opened: Opened, hugging_face: Path, degrees: tuple[int, ...] = (1, 2, 4)) -> None:
    """Every part of every tensor has the bits of the Hugging Face folder, at each tensor degree."""
    opened.check_language_model()
    expected = HuggingFaceWeights(hugging_face)
    for degree in degrees:
        for name, shard in shards_of(opened, degree):
            found = opened.weights(name, shard)
            assert found.dtype is torch.float16
            assert torch.equal(found, expected(name, shard)), (name, degree, shard.index)


@pytest.mark.parametrize("form", FORMS)
def test_every_form_has_the_same_tensors(form: str, folder: Path, tmp_path: Path) -> None:
    opened = open_checkpoint(written(form, tmp_path / form, SIZE))
    config = json.loads((folder / "hf/config.json").read_text())
    assert opened.config.num_attention_heads == SIZE.heads
    assert opened.config.max_position_embeddings == config["max_position_embeddings"]
    require_equal(opened, folder / "hf")


# by default each number of parts and of shards, and each form with several parts. 16 parts are OPT-IML's, and part10 is
# before part2 in the order of text.
CUTS = [("raw", 4, 5), ("raw", 1, 3), ("raw", 2, 11), ("flat_one", 8, 2), ("flat_one", 1, 1), ("views", 4, 5),
        ("iml", 16, 1)]  # fmt: skip
LONG_CUTS = [
    (form, parts, shards)
    for form in ("raw", "flat_one", "views")
    for parts, shards in ((1, 1), (4, 5), (8, 2), (1, 3), (2, 11))
    if (form, parts, shards) not in CUTS
]


@pytest.mark.parametrize(
    ("form", "parts", "shards"), [*CUTS, *(pytest.param(*cut, marks=pytest.mark.long) for cut in LONG_CUTS)]
)
def test_any_number_of_parts_and_shards(form: str, parts: int, shards: int, folder: Path, tmp_path: Path) -> None:
    opened = open_checkpoint(written(form, tmp_path / form, SIZE, parts, shards))
    assert (opened.metaseq.described.parts, opened.metaseq.described.shards) == (parts, shards if form == "raw" else 1)
    require_equal(opened, folder / "hf", (1, 2, 8))


@pytest.mark.parametrize("form", ["singleton", "bare", "arrays", "args"])
def test_the_form_of_350m(form: str, folder: Path, tmp_path: Path) -> None:
    opened = open_checkpoint(written(form, tmp_path / form, SMALL_350M))
    assert not opened.config.do_layer_norm_before
    assert opened.config.word_embed_proj_dim == 16
    require_equal(opened, folder / "hf-350m")


@pytest.mark.parametrize("form", ["raw", "arrays"])
def test_an_export_has_the_tensors_and_the_outputs_of_transformers(form: str, folder: Path, tmp_path: Path) -> None:
    import transformers
    from safetensors.torch import load_file

    export(written(form, tmp_path / form, SIZE), tmp_path / "out", 10**9, ExportDtype.auto)
    exported, expected = (load_file(each / "model.safetensors") for each in (tmp_path / "out", folder / "hf"))
    assert exported.keys() == expected.keys()
    assert all(torch.equal(exported[name], values) for name, values in expected.items())
    ids = torch.randint(4, SIZE.rows, (2, 16), generator=torch.Generator().manual_seed(1))
    theirs = transformers.OPTForCausalLM.from_pretrained(folder / "hf", dtype=torch.float32).eval()
    ours = open_checkpoint(tmp_path / form).model(ALONE, torch.device("cpu"))
    with torch.no_grad():
        assert torch.allclose(ours(ids), theirs(ids).logits, atol=1e-5)  # other kernels sum in another order


def test_memory_is_used_in_turns_and_the_next_tensor_is_read_ahead(folder: Path, tmp_path: Path) -> None:
    """The last two tensors are intact, whatever their sizes."""
    opened = open_checkpoint(written("raw", tmp_path / "raw", SIZE))
    expected, asked = HuggingFaceWeights(folder / "hf"), []
    parameters = shards_of(opened, 1)
    opened.metaseq.memory = Turns(2)

    def source(name: str, shard: Shard) -> torch.Tensor:
        asked.append(name)
        return opened.weights(name, shard)

    last = None
    with ahead(source, parameters) as read:
        for number, (name, shard) in enumerate(parameters, start=1):
            assert last is None or torch.equal(last, expected(*parameters[number - 2]))
            last = read(name, shard)
            assert torch.equal(last, expected(name, shard))
            assert len(asked) <= number + 1
    assert asked == [name for name, _ in parameters]


def test_what_the_settings_say_must_fit_the_tensors(tmp_path: Path) -> None:
    write("singleton", tmp_path / "one", Size(ffn=96), weights_of(SIZE))
    with pytest.raises(UserError, match="say decoder_ffn_embed_dim=96, but its tensors have 64"):
        open_checkpoint(tmp_path / "one")


def test_heads_that_no_file_states_are_asked_for(tmp_path: Path) -> None:
    write("arrays", tmp_path / "np", SIZE, weights_of(SIZE))
    with pytest.raises(UserError, match=r'does not say num_attention_heads.*config.json with .*"model_type": "opt"'):
        open_checkpoint(tmp_path / "np")
    state_heads(tmp_path / "np", num_attention_heads=4, hidden_size=48)
    with pytest.raises(UserError, match=r"config.json says hidden_size=48, but the checkpoint has 32"):
        open_checkpoint(tmp_path / "np")


def test_the_published_heads_are_those_of_the_configurations() -> None:
    import yaml

    folder = Path(__file__).parents[2] / "configs/model"
    sizes = [yaml.safe_load(path.read_text()) for path in folder.glob("opt-*[0-9]*.yaml")]
    found = {(each["num_hidden_layers"], each["hidden_size"]): each["num_attention_heads"] for each in sizes}
    assert found == HEADS


def test_a_rank_reads_only_its_bytes(folder: Path, tmp_path: Path) -> None:
    size = Size(hidden=128, ffn=512, rows=512)
    write("raw", tmp_path / "raw", size, weights_of(size), parts=4, shards=3)
    opened = open_checkpoint(tmp_path / "raw")
    weights = opened.metaseq
    with torch.device("meta"):
        ours = list(marked(CausalLM(opened.config, Group(None, 1, 4))))
    held = sum(tensor.numel() for _, tensor, _ in ours) * 2
    replicated = sum(tensor.numel() for _, tensor, shard in ours if shard.count == 1) * 2
    for name, _, shard in ours:
        weights(name, shard)
    # This process is the only rank, so it compares the copies of the other three parts.
    assert weights.bytes_read == held + 3 * replicated
