"""What users of transformers type beyond its page: folders that exist, arguments without effect, compiled models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from opt_parallel import OPTConfig, OPTForCausalLM, OPTModel
from opt_parallel.runtime.errors import UserError

SHAPE: dict[str, Any] = {
    "vocab_size": 131, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 96,
    "max_position_embeddings": 32, "dropout": 0.0,
}  # fmt: skip
IDS = torch.arange(4, 24).view(2, 10)


@pytest.fixture(scope="module")
def model() -> OPTForCausalLM:
    return OPTForCausalLM(OPTConfig(**SHAPE)).eval()


@pytest.fixture(scope="module")
def folder(model: OPTForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "model"
    model.save_pretrained(path, is_main_process=True, save_function=torch.save, push_to_hub=False, state_dict=None)
    return path


def test_a_model_joins_a_tokenizer(model: OPTForCausalLM, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    (tmp_path / "tokenizer.json").write_text("{}")
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    assert (tmp_path / "tokenizer.json").read_text() == "{}"
    names = {path.name for path in tmp_path.iterdir()}
    assert {"config.json", "generation_config.json", "checksums.json", "model.safetensors.index.json"} < names
    assert not any(name.endswith(".partial") or name.startswith(".") for name in names)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(theirs(IDS).logits, model(IDS).logits, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "pytorch_model.bin", "manifest.json"])
def test_a_model_never_joins_a_model(model: OPTForCausalLM, tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("theirs")
    with pytest.raises(UserError, match=f"exists and has the {name} of a model: remove it or choose another folder"):
        model.save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text() == "theirs"
    with pytest.raises(UserError, match="is a file: choose another folder"):
        model.save_pretrained(tmp_path / name)


def test_a_failure_leaves_the_folder_as_it_was(tmp_path: Path) -> None:
    """A weight that float16 cannot hold fails in the middle of writing."""
    (tmp_path / "tokenizer.json").write_text("{}")
    large: Any = OPTModel(OPTConfig(**SHAPE)).half()
    large.decoder.layers[1].fc2 = large.decoder.layers[1].fc2.float()
    with torch.no_grad():
        large.decoder.layers[1].fc2.weight[0, 0] = 1e6
    with pytest.raises(UserError, match="the largest value of float16"):
        large.save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer.json"]


def test_other_processes_write_nothing(model: OPTForCausalLM, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "model", is_main_process=False)
    assert not (tmp_path / "model").exists()


WITHOUT_EFFECT: list[dict[str, Any]] = [
    {"torch_dtype": "auto", "low_cpu_mem_usage": True, "device_map": None, "attn_implementation": "eager"},
    {"device_map": {"": "cpu"}, "weights_only": True, "ignore_mismatched_sizes": True, "resume_download": True},
    {"state_dict": None, "force_download": False, "subfolder": "", "variant": None, "load_in_8bit": False},
    {"quantization_config": None, "max_memory": None, "tp_plan": None, "proxies": None, "output_loading_info": False},
]


@pytest.mark.parametrize("arguments", WITHOUT_EFFECT, ids=lambda each: next(iter(each)))
def test_arguments_without_effect(model: OPTForCausalLM, folder: Path, arguments: dict[str, Any]) -> None:
    loaded = OPTForCausalLM.from_pretrained(folder, config=str(folder), **arguments)
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    arguments = {name: value for name, value in arguments.items() if name not in ("device_map", "torch_dtype")}
    arguments.pop("ignore_mismatched_sizes", None)
    config = OPTConfig.from_pretrained(folder, **arguments)
    assert not config.to_dict().keys() & arguments.keys()


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"state_dict": {"a": 1}}, "call load_state_dict"),
    ({"output_loading_info": True}, "a model is loaded completely or not at all: leave it out"),
    ({"load_in_8bit": True}, "load_in_8bit=True: weights are not quantized: choose dtype="),
    ({"variant": "fp16"}, "variant=fp16: files of variants are neither read nor written"),
    ({"device_map": {"model": 0, "lm_head": 1}}, "divides the layers: name one device"),
    ({"device_map": "balanced"}, "device_map=balanced divides the layers"),
]


@pytest.mark.parametrize(("arguments", "words"), REFUSED, ids=lambda each: str(each)[:24])
def test_refused_in_one_line(folder: Path, arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=r"^[^\n]+$") as caught:
        OPTForCausalLM.from_pretrained(folder, **arguments)
    assert words in str(caught.value)


def test_save_refuses_in_one_line(model: OPTForCausalLM, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"save_pretrained: state_dict=.* call load_state_dict"):
        model.save_pretrained(tmp_path / "model", state_dict=model.state_dict())
    with pytest.raises(ValueError, match="save_pretrained has no argument shard_size: check its spelling"):
        model.save_pretrained(tmp_path / "model", shard_size=5)


def test_settings_of_checkpoints_that_do_not_sample(model: OPTForCausalLM, tmp_path: Path) -> None:
    """Many folders have a temperature without do_sample, or were saved after training without a cache."""
    model.save_pretrained(tmp_path / "model")
    settings = {"do_sample": False, "temperature": 0.6, "top_p": 0.9, "use_cache": False, "max_new_tokens": 3}
    (tmp_path / "model" / "generation_config.json").write_text(json.dumps(settings))
    loaded = OPTForCausalLM.from_pretrained(tmp_path / "model")
    greedy = model.generate(IDS, max_new_tokens=3)
    assert torch.equal(loaded.generate(IDS), greedy)
    assert torch.equal(model.generate(IDS, max_new_tokens=3, temperature=0), greedy)
    assert loaded.generation_config.update(max_new_tokens=2, unknown=1) == {"unknown": 1}
    assert torch.equal(loaded.generate(IDS), greedy[:, :-1])
    for name in ("labels", "inputs_embeds"):
        with pytest.raises(ValueError, match=f"{name} is not an argument"):
            model.generate(IDS, **{name: torch.zeros(2, 10)})


def test_what_a_model_says_of_itself(model: OPTForCausalLM) -> None:
    from transformers import OPTConfig as TheirConfig
    from transformers import OPTForCausalLM as Theirs

    theirs = Theirs(TheirConfig(**SHAPE))
    assert model.get_memory_footprint() == theirs.get_memory_footprint()
    assert model.get_memory_footprint(return_buffers=False) == theirs.get_memory_footprint(return_buffers=False)
    assert model.can_generate() is theirs.can_generate() is True
    assert OPTModel(model.config).can_generate() is theirs.model.can_generate() is False


def test_files_of_a_configuration(tmp_path: Path) -> None:
    from transformers import OPTConfig as Theirs

    config = OPTConfig(**SHAPE)
    assert json.loads(config.to_json_string(use_diff=False)).keys() > json.loads(config.to_json_string()).keys()
    config.to_json_file(tmp_path / "config.json")
    assert OPTConfig.from_json_file(tmp_path / "config.json") == config
    assert Theirs.from_json_file(tmp_path / "config.json").ffn_dim == 96
    with pytest.raises(UserError, match=r"missing.json cannot be read \(.*\): give the path of a config.json"):
        OPTConfig.from_json_file(tmp_path / "missing.json")


def compare_compiled() -> None:
    """On the crew, whose processes have imported the compiler."""
    model = OPTForCausalLM(OPTConfig(**{**SHAPE, "num_hidden_layers": 1}))
    expected = model(IDS, labels=IDS).loss
    compiled = torch.compile(model, backend="eager")
    loss = compiled(IDS, labels=IDS).loss
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert model.get_input_embeddings().weight.grad is not None
    mask = torch.ones_like(IDS)
    mask[0, :3] = 0
    torch.testing.assert_close(compiled(IDS, mask).logits, model(IDS, mask).logits)


@pytest.mark.long
def test_a_compiled_model(crew: Any) -> None:
    """With gradients, and with padding, where dynamo falls back to Python."""
    crew(1)(compare_compiled)
