"""Every argument of the three forwards against transformers, over a covering array: each pair of choices occurs."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

SHAPE: dict[str, Any] = {
    "vocab_size": 131, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 96,
    "max_position_embeddings": 40, "dropout": 0.0, "attention_dropout": 0.0, "init_std": 0.1, "num_labels": 3,
}  # fmt: skip
CHOICES: dict[str, dict[str, Any]] = {
    "style": {
        "pre-norm": {},
        "350m": {"do_layer_norm_before": False, "word_embed_proj_dim": 24},
        "no biases": {"enable_bias": False, "activation_function": "silu"},
        "no affine": {"layer_norm_elementwise_affine": False, "_remove_final_layer_norm": True},
        "gelu": {"activation_function": "gelu", "word_embed_proj_dim": 24},
    },
    "kind": dict.fromkeys(("OPTModel", "OPTForCausalLM", "OPTForSequenceClassification")),
    "padding": dict.fromkeys(("none", "left", "right", "inside")),
    "cache": dict.fromkeys(("none", "once", "fed back")),
    "attentions": dict.fromkeys((False, True)),
    "states": dict.fromkeys((False, True)),
    "inputs": dict.fromkeys(("ids", "embeddings", "positions")),
    "where": dict.fromkeys(("arguments", "configuration")),
    "return_dict": dict.fromkeys((True, False)),
    "tensor": dict.fromkeys((1, 2)),
}
LENGTH = 11  # not the width of a head, 12
TOLERANCE = 2e-5  # float32 values of order 1, summed in another order
LOSS_TOLERANCE = 1e-6


def covering() -> list[dict[str, Any]]:
    """Rows in which every pair of two choices' values occurs, greedily chosen."""
    names = list(CHOICES)
    missing = {((a, x), (b, y)) for a, b in itertools.combinations(names, 2) for x in CHOICES[a] for y in CHOICES[b]}
    generator, rows = torch.Generator().manual_seed(1), []
    while missing:
        candidates = []
        for _ in range(40):
            first = sorted(missing, key=str)[int(torch.randint(len(missing), (), generator=generator))]
            row = {name: list(CHOICES[name])[int(torch.randint(len(CHOICES[name]), (), generator=generator))]
                   for name in names} | dict(first)  # fmt: skip
            candidates.append(row)
        best = max(candidates, key=lambda row: len(missing & _pairs(row)))
        missing -= _pairs(best)
        rows.append(best)
    return rows


def _pairs(row: dict[str, Any]) -> set[Any]:
    return set(itertools.combinations(row.items(), 2))


def inputs_of(row: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
    ids = torch.randint(4, SHAPE["vocab_size"], (3, LENGTH), generator=torch.Generator().manual_seed(5))
    if row["padding"] == "none":
        return ids, None
    mask = torch.ones_like(ids)
    hidden = {"left": slice(4), "right": slice(-4, None), "inside": slice(3, 6)}[row["padding"]]
    mask[0, hidden], mask[2, hidden] = 0, 0
    return ids.masked_fill(mask == 0, 1), mask


def labels_of(kind: str, ids: Tensor) -> dict[str, Any]:
    """Labels, those of padding included: transformers counts them too."""
    return {"OPTModel": {}, "OPTForCausalLM": {"labels": ids}}.get(kind, {"labels": torch.tensor([0, 2, 1])})


def answers(model: Any, row: dict[str, Any], ours: bool) -> list[Tensor]:
    """Every tensor that a forward of the row's arguments returns."""
    ids, mask = inputs_of(row)
    arguments: dict[str, Any] = {} if mask is None else {"attention_mask": mask}
    options = {"use_cache": row["cache"] != "none", "output_hidden_states": row["states"],
               "output_attentions": row["attentions"], "return_dict": row["return_dict"]}  # fmt: skip
    if row["where"] == "arguments":
        arguments |= options
    else:
        for name, value in options.items():
            setattr(model.config, name, value)
        if not ours:  # in transformers 5.23, return_dict=False in the configuration ends with an AttributeError
            model.config.return_dict, arguments["return_dict"] = True, row["return_dict"]
    with torch.no_grad():
        if row["cache"] == "fed back":
            first = model(ids[:, :7], **({} if mask is None else {"attention_mask": mask[:, :7]}), use_cache=True,
                          return_dict=True).past_key_values  # fmt: skip
            arguments["past_key_values"] = tuple((key, value) for key, value in first) if ours else first
            ids = ids[:, 7:]
        if row["inputs"] == "positions":
            arguments["position_ids"] = torch.arange(20, 20 + ids.size(1)).expand(3, -1)
        if row["inputs"] == "embeddings":
            arguments["inputs_embeds"] = model.get_input_embeddings()(ids)
        else:
            arguments["input_ids"] = ids
        output = model(**arguments, **labels_of(row["kind"], ids))
    if row["return_dict"]:
        names = [name for name in output if name != "past_key_values"]
        assert output.to_tuple()[0] is output[0] is output[names[0]] is getattr(output, names[0])
    else:
        assert type(output) is tuple
    return list(_tensors(output.values() if row["return_dict"] else output))


def _tensors(values: Any) -> Any:
    """All tensors, nested ones in order; of a cache the rank's keys and values."""
    for value in values:
        if isinstance(value, Tensor):
            yield value.detach().clone()
        elif value is not None and not isinstance(value, str):
            layers = getattr(value, "layers", None)
            yield from _tensors([(layer.keys, layer.values) for layer in layers] if layers else value)


def ours(folder: str, row: dict[str, Any]) -> list[Any]:
    """On the crew: our answers, with all heads of the cache."""
    import opt_parallel
    from opt_parallel.parallel.collectives import gather

    with opt_parallel.Topology.open(row["tensor"]) as topology:
        model = getattr(opt_parallel, row["kind"]).from_pretrained(folder, tensor=topology.tensor)
        found = answers(model, row, ours=True)
        heads = SHAPE["num_attention_heads"] // row["tensor"]
        return [
            (gather(each.movedim(1, -1), topology.tensor).movedim(-1, 1) if _of_cache(each, heads) else each).numpy()
            for each in found
        ]


def _of_cache(values: Tensor, heads: int) -> bool:
    """Whether a tensor is (B, heads, positions, D): keys or values. Attentions end in their number of keys."""
    return values.dim() == 4 and values.size(1) == heads and values.size(3) == 12


@pytest.mark.parametrize("row", covering(), ids=lambda row: "-".join(map(str, row.values())))
def test_every_output_is_transformers(crew: Any, tmp_path: Path, row: dict[str, Any]) -> None:
    import transformers

    torch.manual_seed(3)
    kind = getattr(transformers, row["kind"])
    theirs = kind(transformers.OPTConfig(**SHAPE, **CHOICES["style"][row["style"]]))
    with torch.no_grad():
        for tensor in theirs.parameters():
            tensor.add_(torch.randn_like(tensor) * 0.05)  # biases and LayerNorms away from 0 and 1
    theirs.save_pretrained(tmp_path)
    implementation = "eager" if row["attentions"] else "sdpa"  # transformers returns attentions from the first only
    theirs = kind.from_pretrained(tmp_path, attn_implementation=implementation).eval()
    expected = answers(theirs, row, ours=False)
    for rank in crew(row["tensor"])(ours, str(tmp_path), row):
        assert [each.shape for each in rank] == [tuple(each.shape) for each in expected]
        for number, (mine, other) in enumerate(zip(rank, expected, strict=True)):
            difference = float((torch.from_numpy(mine) - other).abs().max())
            is_loss = number == 0 and other.dim() == 0
            assert difference <= (LOSS_TOLERANCE if is_loss else TOLERANCE), (number, difference)
