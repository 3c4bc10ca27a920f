"""OpenAI requests to token ids inside vLLM: control tokens come from the chat template only (SPEC 9 and 11)."""

from typing import Any

from vllm.config import VllmConfig
from vllm.multimodal.cache import LruKeyReplicatedSenderCache, MultiModalProcessorOnlyCache
from vllm.multimodal.media.connector import merge_media_io_kwargs
from vllm.renderers.chat_utils import parse_chat_messages, parse_chat_messages_async
from vllm.renderers.hf import HfRenderer, safe_apply_chat_template
from vllm.renderers.params import ChatParams
from vllm.utils.async_utils import make_async

from nvlm.conversation import IMAGE_TOKEN
from nvlm.prompt import IMAGE_PLACEHOLDER, encode_prompt
from nvlm.serving.plugin import ARCHITECTURE
from nvlm.serving.prompts import chat_segments

# Pictures come as they were sent: `load_image` converts them; vLLM would put transparent ones on white.
AS_SENT = {"image": {"image_mode": None}}


def make_renderer(config: VllmConfig, tokenizer: Any) -> HfRenderer:
    """This package's renderer for NVLM_D, vLLM's own for all other models."""
    architectures = getattr(config.model_config.hf_config, "architectures", None) or []
    renderer = NvlmRenderer if ARCHITECTURE in architectures else HfRenderer
    return renderer(config, tokenizer)


class NvlmRenderer(HfRenderer):
    """Renders conversations by the checkpoint's chat template, text that users wrote kept apart from control tokens.

    Raises:
        ValueError: vLLM is started with `--enable-prompt-embeds`, whose placeholders are not handled here.
    """

    _mm_processor_cache: Any

    def __init__(self, config: VllmConfig, tokenizer: Any) -> None:
        if config.model_config.enable_prompt_embeds:
            raise ValueError("NVLM_D does not take prompt_embeds: start vLLM without --enable-prompt-embeds.")
        super().__init__(config, tokenizer)
        # vLLM's cache of processed pictures only holds what the engine is believed to have. A request that fails
        # between the two makes that wrong for the next one with the picture; this cache sends the picture each time.
        if isinstance(self._mm_processor_cache, LruKeyReplicatedSenderCache):
            self._mm_processor_cache = MultiModalProcessorOnlyCache(config.model_config)
        self._prompt_async = make_async(self._prompt, executor=self._executor)

    def render_messages(self, messages: list[Any], params: ChatParams) -> tuple[list[Any], Any]:
        """(messages as the template reads them, the prompt's ids with its pictures)."""
        parsed = parse_chat_messages(messages, self.model_config, **self._parse_options(params))
        return self._prompt(parsed, params)

    async def render_messages_async(self, messages: list[Any], params: ChatParams) -> tuple[list[Any], Any]:
        """`render_messages`, with pictures fetched together and the template rendered in a thread."""
        parsed = await parse_chat_messages_async(messages, self.model_config, **self._parse_options(params))
        return await self._render_with_timeout(self._prompt_async(parsed, params))

    @staticmethod
    def _parse_options(params: ChatParams) -> dict[str, Any]:
        return {
            "content_format": "openai",  # keeps parts apart and in order
            "media_io_kwargs": merge_media_io_kwargs(AS_SENT, params.media_io_kwargs),
            "mm_processor_kwargs": params.mm_processor_kwargs,
        }

    def _prompt(self, parsed: tuple[Any, Any, Any], params: ChatParams) -> tuple[list[Any], Any]:
        conversation, mm_data, mm_uuids = parsed
        tokenizer = self.get_tokenizer()
        variables = params.get_apply_chat_template_kwargs()
        template = variables.pop("chat_template", None)

        def render(messages: list[Any], shielded: dict[str, Any]) -> str:
            options = {**shielded, "chat_template": template, "tokenize": False}
            return safe_apply_chat_template(self.model_config, tokenizer, messages, **options)

        variables.pop("tokenize", None)
        segments = chat_segments(tokenizer, conversation, variables, render)
        prompt: dict[str, Any] = {"prompt_token_ids": encode_prompt(tokenizer, segments)}
        if mm_data is not None:
            prompt["multi_modal_data"] = mm_data
        if mm_uuids is not None:
            prompt["multi_modal_uuids"] = mm_uuids
        return conversation, prompt

    def _tokenize_prompt(self, prompt: Any, params: Any) -> Any:
        """Tokenise a bare prompt, which is trusted: its special tokens are such, and with pictures so is `<image>`."""
        if prompt.get("multi_modal_data") or prompt.get("multi_modal_uuids"):
            prompt = {**prompt, "prompt": prompt["prompt"].replace(IMAGE_PLACEHOLDER, IMAGE_TOKEN)}
        return super()._tokenize_prompt(prompt, params)
