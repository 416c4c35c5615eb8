"""Embeddings of more and fewer rows, at any tensor degree: transformers loads them, and computes the same loss."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from opt_parallel import OPTConfig, OPTForCausalLM, OPTModel

OLD, SIZES = 50272, (50265, 50272, 50280)
SHAPE: dict[str, Any] = {
    "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 4, "ffn_dim": 16, "max_position_embeddings": 16,
    "init_std": 0.3, "dropout": 0.0,
}  # fmt: skip


def ids_of(rows: int) -> Tensor:
    ids = torch.randint(4, rows, (2, 9), generator=torch.Generator().manual_seed(1))
    ids[0, 3] = rows - 1  # the last row, new or old
    return ids


def resized(folder: str, tensor: int, rows: int, output: str) -> tuple[float, Any, int]:
    """On the crew: loads, resizes and saves; the loss, the last rows of the logits, and the rows of this rank."""
    from opt_parallel import OPTForCausalLM, Topology

    with Topology.open(tensor) as topology, torch.no_grad():
        model = OPTForCausalLM.from_pretrained(folder, tensor=topology.tensor)
        assert model.resize_token_embeddings(rows) is model.get_input_embeddings()
        assert model.config.vocab_size == rows
        assert model.lm_head.weight is model.get_input_embeddings().weight
        output_of = model(ids_of(rows), labels=ids_of(rows))
        model.save_pretrained(output)
        return output_of.loss.item(), output_of.logits[..., -8:].numpy(), model.lm_head.weight.size(0)


@pytest.mark.parametrize("tensor", [1, 2, 4])
def test_resized_models_load_in_transformers(crew: Any, tmp_path: Path, tensor: int) -> None:
    from transformers import OPTConfig as TheirConfig
    from transformers import OPTForCausalLM as Theirs

    torch.manual_seed(2)
    theirs = Theirs(TheirConfig(vocab_size=OLD, **SHAPE)).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    old = theirs.get_input_embeddings().weight.detach()
    for rows in SIZES:
        answers = crew(tensor)(resized, str(tmp_path / "theirs"), tensor, rows, str(tmp_path / str(rows)))
        loaded, info = Theirs.from_pretrained(tmp_path / str(rows), output_loading_info=True)
        assert not any(info.values()), info
        weights = loaded.get_input_embeddings().weight.detach()
        kept = min(rows, OLD)
        assert torch.equal(weights[:kept], old[:kept])
        # the mean of 50,272 numbers of order 1, here in float64 and there in float32
        torch.testing.assert_close(weights[kept:], old.mean(0).expand(rows - kept, -1), rtol=1e-4, atol=1e-6)
        with torch.no_grad():
            wanted = loaded.eval()(ids_of(rows), labels=ids_of(rows))
        for loss, logits, held in answers:
            assert loss == pytest.approx(wanted.loss.item(), abs=1e-6)
            torch.testing.assert_close(torch.from_numpy(logits), wanted.logits[..., -8:], rtol=0, atol=2e-5)
            assert held == -(-rows // tensor)


def test_as_transformers_resizes() -> None:
    """transformers draws new rows around the mean, with a deviation of 3 · 10⁻⁵ of the old rows'."""
    from transformers import OPTConfig as TheirConfig
    from transformers import OPTForCausalLM as Theirs

    small = {**SHAPE, "vocab_size": 131}
    theirs, ours = Theirs(TheirConfig(**small)).eval(), OPTForCausalLM(OPTConfig(**small)).eval()
    ours.load_state_dict(theirs.state_dict())
    for rows, multiple in ((140, None), (100, 8), (None, 64), (131, None)):
        theirs.resize_token_embeddings(rows, pad_to_multiple_of=multiple)
        ours.resize_token_embeddings(rows, pad_to_multiple_of=multiple)
        assert ours.config.vocab_size == theirs.config.vocab_size
        with torch.no_grad():
            difference = ours(ids_of(100)).logits - theirs(ids_of(100)).logits
        assert float(difference.abs().max()) < 1e-3


def test_embeddings_are_exchanged() -> None:
    model = OPTForCausalLM(OPTConfig(**SHAPE, vocab_size=131)).eval()
    other = nn.Embedding(150, 16)
    model.set_input_embeddings(other)
    assert torch.equal(model.get_output_embeddings().weight, other.weight)
    assert model(torch.tensor([[149]])).logits.shape == (1, 1, 150)
    model.get_input_embeddings().weight.requires_grad_(False)
    model.resize_token_embeddings(160)
    assert not model.lm_head.weight.requires_grad
    assert model.resize_token_embeddings() is model.get_input_embeddings()
    bare = OPTModel(OPTConfig(**SHAPE, vocab_size=131))
    bare.resize_token_embeddings(140)
    assert (bare.config.vocab_size, bare.get_output_embeddings()) == (140, None)


def test_what_cannot_be_resized() -> None:
    model = OPTForCausalLM(OPTConfig(**SHAPE, vocab_size=131))
    for call, words in (
        (lambda: model.resize_token_embeddings(0), "new_num_tokens=0 must be a whole number, at least 1"),
        (lambda: model.resize_token_embeddings(140.0), "new_num_tokens=140.0 must be a whole number"),
        (lambda: model.resize_token_embeddings(2), "bos_token_id=2 is not in the vocabulary"),
        (lambda: model.resize_token_embeddings(140, mean_resizing=False), "mean_resizing=False is not supported"),
        (lambda: model.set_input_embeddings(nn.Embedding(150, 8)), "is not an embedding of width 16"),
        (lambda: model.prune_heads({0: [1]}), "pass head_mask with 0 at [layer, head]"),
    ):
        with pytest.raises(ValueError, match=r"^[^\n]+$") as caught:
            call()
        assert words in str(caught.value)
    assert model.config.vocab_size == 131
