"""Gaperon's smallest model, whole, on a machine of 24 GB without a GPU."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.recipes import write_tokens

PARAMETERS = 1_498_482_688
NEEDED = 19 << 30
"""Bytes of memory that are free before it starts."""

RECIPE = """
[model]
preset = "gaperon-1b"
norm_gain_scale = 20
[data]
sources = [{ path = "some_text_document" }]
[train]
steps = 3
global_batch_size = 1
sequence_length = 256
precision = "bf16-pure"
[optim]
lr = 3e-4
schedule = "constant"
"""


def available_bytes() -> int:
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return int(fields["MemAvailable"].split()[0]) * 1024


def run(*command: object) -> int:
    """Returns the most memory that it took, in bytes."""
    process = subprocess.Popen([sys.executable, *map(str, command)])
    _, status, usage = os.wait4(process.pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    return usage.ru_maxrss * 1024


@pytest.mark.long
@pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="reads how much memory is free as Linux tells it")
def test_it_trains_in_less_than_18_gb_and_transformers_reads_the_export(tmp_path):
    if available_bytes() < NEEDED:
        pytest.skip(f"less than {NEEDED >> 30} GiB of memory are free")
    transformers = pytest.importorskip("transformers")
    write_tokens(tmp_path / "some_text_document", seed=0, vocabulary=65_000)
    (tmp_path / "recipe.toml").write_text(RECIPE)
    peak = run("-m", "megagap.train", tmp_path / "recipe.toml", "--run.dir", tmp_path / "run")
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    print(f"peak of training: {peak / 2**30:.2f} GiB; losses {losses}")
    assert losses == pytest.approx([math.log(128_256)] * 3, abs=1)  # other tokens in each step: nothing is learnt yet
    assert peak < 18e9

    folder, data = tmp_path / "hf", tmp_path / "some_text_document"
    peak = run("-m", "megagap", "convert", "to-hf", "--checkpoint", tmp_path / "run", "--output", folder)
    print(f"peak of the export: {peak / 2**30:.2f} GiB")
    evaluate = ["evaluate", tmp_path / "run", "--data", data, "--max-tokens", 256, "--dtype", "bfloat16", "--json"]
    done = subprocess.run([sys.executable, "-m", "megagap", *map(str, evaluate)], capture_output=True, check=True)
    (ours,) = json.loads(done.stdout)["sources"].values()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS
    tokens = torch.from_numpy(np.fromfile(data.with_suffix(".bin"), dtype="uint16")[:257].astype("int64"))[None]
    with torch.no_grad():
        theirs = model(tokens, labels=tokens).loss.item()
    print(f"loss of the first 256 tokens: {ours['loss']:.4f}, by transformers {theirs:.4f}")
    assert theirs == pytest.approx(ours["loss"], rel=1e-2)
