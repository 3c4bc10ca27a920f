"""transformers' own OpenAI server with NVLM-D: `python -m nvlm.serving.transformers_serve DIR ...`.

All options are those of `transformers serve`. That command alone cannot serve a checkpoint that brings its code: it
takes the model's class from transformers itself, by config.json's `architectures`, unless the model's type is in its
table of multimodal models, and it only sends pictures to classes in that table. Here NVLM-D is put there.
"""

import sys
from collections.abc import Sequence

from nvlm import NVLM_D_Config, NVLM_D_Model


def register() -> None:
    """Put NVLM-D among transformers' multimodal models; calling it again changes nothing.

    Raises:
        ImportError: a transformers without such a table, older than 5.
    """
    from transformers import AutoModelForMultimodalLM
    from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES

    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES[NVLM_D_Config.model_type] = NVLM_D_Model.__name__
    AutoModelForMultimodalLM.register(NVLM_D_Config, NVLM_D_Model, exist_ok=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run `transformers serve` with these arguments, by default the command line's."""
    register()
    from transformers.cli.transformers import app

    app(["serve", *(sys.argv[1:] if arguments is None else arguments)])


if __name__ == "__main__":
    main()
