"""Fast token ids of plain text, the same as `prompt.encode_text` gives: words and short texts are remembered.

Training reads the same tags, roles and questions all the time, and all text is made of the same words.
"""

import re
from typing import Any

from transformers import PreTrainedTokenizerBase

from nvlm.conversation import CONTROL_TOKENS
from nvlm.prompt import control_token_id

Encoded = tuple[list[int], list[int]]  # token ids, and the length of each token's text in bytes

_MOST_WORDS = 200_000
_MOST_TEXTS = 20_000
_SHORT = 200


class TextEncoder:
    """Text to ids; special tokens in it are ordinary characters.

    Args:
        tokenizer: the checkpoint's, a fast byte-level BPE tokenizer.

    Raises:
        ValueError: it is none.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if not tokenizer.is_fast:
            raise ValueError(
                f"The tokenizer is {type(tokenizer).__name__} without a Rust backend, expected a fast one: load the "
                "checkpoint's with AutoTokenizer."
            )
        self.tokenizer = tokenizer
        added = {token.content for token in tokenizer.added_tokens_decoder.values() if not token.special}
        ordinary = sorted(added - CONTROL_TOKENS, key=len, reverse=True)  # of two that fit, the longer is taken
        self._added = {token: control_token_id(tokenizer, token) for token in ordinary}
        self._pattern = re.compile("(" + "|".join(map(re.escape, ordinary)) + ")") if ordinary else None
        self._controls: dict[str, int] = {}
        self._words: dict[str, Encoded] = {}
        self._texts: dict[str, Encoded] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"tokenizer": self.tokenizer}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["tokenizer"])  # type: ignore[misc]

    def control(self, token: str) -> int:
        """The id of a control token.

        Raises:
            ValueError: the tokenizer does not have it.
        """
        if token not in self._controls:
            self._controls[token] = control_token_id(self.tokenizer, token)
        return self._controls[token]

    def encode(self, text: str) -> Encoded:
        """Ids and byte lengths of a text's tokens; the caller must not change the lists."""
        known = self._texts.get(text)
        if known is not None:
            return known
        ids: list[int] = []
        sizes: list[int] = []
        for i, piece in enumerate(self._pattern.split(text) if self._pattern else [text]):
            if i % 2:
                ids.append(self._added[piece])
                sizes.append(len(piece.encode()))
            else:
                self._encode_piece(piece, ids, sizes)
        if len(text) <= _SHORT:
            if len(self._texts) >= _MOST_TEXTS:
                self._texts.clear()
            self._texts[text] = ids, sizes
        return ids, sizes

    def _encode_piece(self, piece: str, ids: list[int], sizes: list[int]) -> None:
        backend: Any = self.tokenizer.backend_tokenizer
        normal = piece
        if not piece.isascii() and backend.normalizer:
            normal = backend.normalizer.normalize_str(piece)
        for word, _ in backend.pre_tokenizer.pre_tokenize_str(normal):
            known = self._words.get(word)
            if known is None:
                if len(self._words) >= _MOST_WORDS:
                    self._words.clear()
                tokens = backend.model.tokenize(word)
                # A word is spelled with one character a byte, and so are its tokens.
                known = [token.id for token in tokens], [len(token.value) for token in tokens]
                self._words[word] = known
            ids += known[0]
            sizes += known[1]
