"""Run one of llama.cpp's own converters: `python -m peftopt.transforms._to_gguf SCRIPT ARGUMENTS…`, in the main Python.

They are maintained with the library that reads what they write. Three things are bent. A byte-pair tokenizer that
llama.cpp does not know is no reason to stop, since text here is encoded by the tokenizer.json beside the GGUF. One that
works on bytes is never taken for SentencePiece, as the converter does when `byte_fallback` is set (SmolLM2 saved anew):
llama.cpp aborts on the first text that such a vocabulary is given. And SentencePiece is only imported where it is used.
"""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from typing import Any


def main(script: str, *arguments: str) -> None:
    """`script` is a converter in llama.cpp's source folder."""
    sys.path.insert(0, str(Path(script).parent))
    from conversion.base import TextModel

    like_llama = TextModel._set_vocab_llama_hf
    pre_tokenizer, sentencepiece = TextModel.get_vocab_base_pre, TextModel._create_vocab_sentencepiece

    def known_or_default(self: Any, tokenizer: Any) -> str:
        try:
            return str(pre_tokenizer(self, tokenizer))
        except NotImplementedError:
            return "default"  # whether it splits text alike is tried afterwards

    def where_there_is_one(self: Any) -> Any:
        if not (self.dir_model / "tokenizer.model").is_file():
            raise FileNotFoundError("no tokenizer.model")
        return sentencepiece(self)

    def not_on_bytes(self: Any) -> Any:
        if '"ByteLevel"' in json.dumps(json.loads((self.dir_model / "tokenizer.json").read_text())["pre_tokenizer"]):
            raise FileNotFoundError("a byte-level tokenizer")
        return like_llama(self)

    TextModel.get_vocab_base_pre, TextModel._create_vocab_sentencepiece = known_or_default, where_there_is_one
    TextModel._set_vocab_llama_hf = not_on_bytes
    sys.argv = [script, *arguments]
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main(*sys.argv[1:])
