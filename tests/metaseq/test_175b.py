"""The 992 files of OPT-175B, with true headers and empty contents, are opened and planned within limits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from command import cold_python
from metaseq_175b import write_sparse

from opt_parallel.metaseq.archive import open_archive
from opt_parallel.metaseq.pickled import Located, item, mapping

OPENING = """
import json, resource, sys, time
from pathlib import Path
resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
from opt_parallel.runtime.machine import resident_peak
from opt_parallel.tools.metaseq import described
start = time.process_time()
shown = described(Path(sys.argv[1]))
peak = resident_peak()
print(json.dumps([shown, time.process_time() - start, peak]))
"""
READING = """
import json, os, resource, sys
from pathlib import Path
resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
import torch
from opt_parallel.checkpoint.sources import open_checkpoint
from opt_parallel.model.heads import CausalLM
from opt_parallel.parallel.shard import marked
from opt_parallel.parallel.topology import Group
from opt_parallel.runtime.machine import resident_peak
os.environ |= {"RANK": "7", "WORLD_SIZE": "8"}
opened = open_checkpoint(Path(sys.argv[1]))
with torch.device("meta"):
    model = CausalLM(opened.config, Group(None, 7, 8))
before = resident_peak()
layer = [each for each in marked(model) if ".layers.5." in each[0] or "embed" in each[0]]
sizes = [tensor.numel() for _, tensor, _ in layer]
for name, _, shard in layer:
    assert opened.weights(name, shard).numel() == shard.numel // shard.count
peak = resident_peak()
print(json.dumps([peak - before, opened.metaseq.bytes_read, 2 * sum(sizes), 2 * max(sizes)]))
"""


@pytest.mark.long
def test_opt_175b_is_opened_and_planned_within_limits(tmp_path: Path) -> None:
    """With 256 files, in a minute, and in 1 GB. A rank then reads the weights that it needs into its own memory."""
    write_sparse(tmp_path / "opt-175b")
    done = cold_python("-c", OPENING, str(tmp_path / "opt-175b"), timeout=900)
    assert done.returncode == 0, done.stderr
    shown, seconds, peak = json.loads(done.stdout)
    assert "8 model parts of 124 FSDP shards each" in shown
    assert "992, 350 GB" in shown
    assert ["8", "43.7", "GB", "2.9"] in [line.split() for line in shown.splitlines()]
    assert peak < 10**9
    assert seconds < 60
    done = cold_python("-c", READING, str(tmp_path / "opt-175b"), timeout=900)
    assert done.returncode == 0, done.stderr
    grown, read, layer, largest = json.loads(done.stdout)
    assert read < layer * 1.2  # The second copy of the position embedding is compared.
    assert grown < 4 * largest


def test_a_small_checkpoint_of_empty_files_is_what_torch_writes(tmp_path: Path) -> None:
    from metaseq_forms import Size

    write_sparse(tmp_path / "small", Size(), parts=2, shards=3)
    path = tmp_path / "small" / "checkpoint_last-model_part-1-shard2.pt"
    content = torch.load(path, weights_only=False, mmap=True)
    ours = open_archive(path).content
    for name, values in content["model"].items():
        found = mapping(item(ours, "model"))[name]
        assert isinstance(found, Located)
        assert found.shape == values.shape
    metadata = content["shard_metadata"]["param_metadata"]
    assert item(ours, "shard_metadata", "param_metadata") is not None
    assert [each["fsdp_path"] for each in metadata] == ["", "decoder.layers.0", "decoder.layers.1"]
