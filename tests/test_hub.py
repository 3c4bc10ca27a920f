"""A checkpoint folder with this repository's code beside the weights, loaded as the Hub's users load it."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

REPOSITORY = Path(__file__).resolve().parent.parent

# What a user's script does, in a process that has no package `nvlm`: only the folder's own code is there.
SCRIPT = """
import sys, json
sys.modules["nvlm"] = None  # an import of the installed package would fail
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer
path = sys.argv[1]
config = AutoConfig.from_pretrained(path, trust_remote_code=True)
model = AutoModel.from_pretrained(
    path, torch_dtype=torch.bfloat16, low_cpu_mem_usage=True, use_flash_attn=False, trust_remote_code=True).eval()
assert model.dtype == torch.bfloat16
causal = AutoModelForCausalLM.from_pretrained(path, torch_dtype=torch.float32, trust_remote_code=True)
assert type(causal).__name__ == "NVLM_D_Model" and causal.dtype == torch.float32
tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=True, use_fast=False)
generation_config = dict(max_new_tokens=12, do_sample=False)
response, history = causal.chat(
    tokenizer, None, "Hello, who are you?", generation_config, history=None, return_history=True)
pixel_values = torch.zeros(3, 3, 56, 56).to(torch.bfloat16)
picture = model.chat(tokenizer, pixel_values, '<image>\\nPlease describe the image shortly.', generation_config)
print(json.dumps({"response": response, "history": history, "picture": picture, "class": type(config).__module__}))
"""


@pytest.fixture(scope="module")
def hub_folder(checkpoint, tmp_path_factory):
    """The golden base checkpoint with the repository's modules beside it."""
    folder = tmp_path_factory.mktemp("hub")
    for file in checkpoint("base").iterdir():
        shutil.copy(file, folder)
    for module in REPOSITORY.glob("*.py"):
        if module.name != "__init__.py":
            shutil.copy(module, folder)
    return folder


def test_the_documents_scripts_run_on_remote_code_alone(hub_folder, golden_chat, tmp_path):
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    command = [sys.executable, "-c", SCRIPT, str(hub_folder)]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    answer = json.loads(result.stdout.splitlines()[-1])
    golden = golden_chat["cases"]["base"]["text"]
    assert answer["response"] == golden["response"]
    assert answer["history"] == [[golden["question"], golden["response"]]]
    assert answer["picture"]
    assert answer["class"].startswith("transformers_modules.")


def test_installed_package_needs_no_trust_remote_code(checkpoint):
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(checkpoint("base"))
    assert type(config).__module__ == "nvlm.configuration_nvlm_d"
    for auto_class in (AutoModel, AutoModelForCausalLM):
        model = auto_class.from_pretrained(checkpoint("base"))
        assert type(model).__module__ == "nvlm.modeling_nvlm_d"
        assert model.dtype == torch.float32
