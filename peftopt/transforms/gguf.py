"""Write the model as GGUF for llama.cpp, its weights in a type of your choice (q4_k_m, q4_1, q8_0, bf16)."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from peftopt import environments, machine, plugins
from peftopt.corpus import TEXTS
from peftopt.errors import BadInput, WorkerFailed
from peftopt.models import hf, provenance
from peftopt.models.adapter import open_adapter
from peftopt.models.checkpoint import open_model
from peftopt.models.gguf import WEIGHTS, library, lora_file, lora_scale
from peftopt.records import Model
from peftopt.transforms import _to_gguf

PLAIN = ("f32", "f16", "bf16")
"""Types that the converter writes itself."""

TYPES = {
    **dict.fromkeys(PLAIN, 1),
    **dict.fromkeys(("q8_0", "q5_0", "q5_1", "q4_0", "q4_1", "iq4_nl"), 32),
    **dict.fromkeys(("q6_k", "q5_k_m", "q5_k_s", "q4_k_m", "q4_k_s", "iq4_xs", "q3_k_m", "q2_k"), 256),
}
"""llama.cpp's names -> how many weights of a row form a block, which the row's width must be a multiple of."""

HEADS = ("", "q8_0", "q6_k", "q5_k", "q5_1", "q4_k", "q4_1", "q4_0", "f16")


@dataclass(frozen=True)
class Params:
    """`type`: one of llama.cpp's names, for all matrices but those that it holds more precisely by itself. `head`: the
    type of the output head and of the embeddings, "" for llama.cpp's own choice (6 bits or more)."""

    type: str = "q4_k_m"
    head: str = ""


PLUGIN = plugins.quantizer(Params, environment="llamacpp", format="gguf", reader="llamacpp", weights=WEIGHTS)


def transform(model: Model, params: Params, out: Path, texts: Sequence[str], seed: int) -> Model:
    """Convert with llama.cpp's converter and round with llama.cpp's quantizer (no calibration). Format:
    github.com/ggml-org/ggml/blob/master/docs/gguf.md.

    Leaves model.gguf beside the tokenizer, and quantization.json, which says what made it. Adapters stay on top of the
    model as they are; their GGUF forms, which llama.cpp applies at run time, lie in adapters/, named by the hash of
    the weights they were made from. Raises BadInput for a type or an architecture that llama.cpp does not have,
    weights that are already quantized, and an adapter that is not a plain LoRA.
    """
    if params.type not in TYPES:
        raise BadInput(f"gguf has no type {params.type!r}", f"use {', '.join(TYPES)}")
    if params.head not in HEADS or (params.head and params.type in PLAIN):
        raise BadInput(f"gguf has no head {params.head!r} for {params.type}", f"use {', '.join(filter(None, HEADS))}")
    hf.unquantized_config(model, "convert")
    adapters = [open_adapter(Path(folder)) for folder in model.adapters]
    for adapter in adapters:
        lora_scale(adapter.folder)  # raises for what is not a plain LoRA
    out.mkdir(parents=True, exist_ok=True)
    plain = params.type in PLAIN
    converted = out / (WEIGHTS if plain else "plain.gguf")
    _convert("convert_hf_to_gguf.py", converted, model.path, params.type if plain else _own_type(model.path))
    if not plain:
        _quantize(converted, out / WEIGHTS, params)
        converted.unlink()
    for adapter in adapters:
        (out / "adapters").mkdir(exist_ok=True)
        _convert("convert_lora_to_gguf.py", lora_file(out, adapter.folder), str(adapter.folder), "f32", base=model.path)
    hf.copy_all_but_weights(model.path, out, {"quant_method": "gguf", "type": params.type})
    _note(out, params, seed)
    return Model(str(out), model.adapters)


def _own_type(folder: str) -> str:
    """What to quantize from: the weights as they are, or fp32 where they are mixed."""
    with open_model(Path(folder)) as weights:
        kinds = {entry.dtype for entry in weights.entries.values()}
    return {frozenset({"BF16"}): "bf16", frozenset({"F16"}): "f16"}.get(frozenset(kinds), "f32")


def _convert(script: str, out: Path, source: str, kind: str, base: str = "") -> None:
    """Run a converter in the main environment, which has the torch that it takes. Raises BadInput with its last line
    when it fails."""
    main = environments.python(environments.MAIN)
    command = environments.module(_to_gguf.__name__, main)
    command += [str(Path(sys.prefix) / "llama.cpp" / script), source, "--outfile", str(out), "--outtype", kind]
    command += ["--base", base] if base else []
    found = environments.variables(main)
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False, env=found)
    sys.stderr.write(f"{done.stdout}\n{done.stderr}\n")  # the log of the worker process
    if done.returncode:
        last = (done.stderr.strip() or done.stdout.strip() or f"exit status {done.returncode}").splitlines()[-1]
        if "ModuleNotFoundError" in last:
            library = last.split("'")[1]
            raise WorkerFailed("missing library", f"llama.cpp's converter needs {library}", f"pip install {library}")
        hint = "llama.cpp must know the architecture; run this model on a transformers engine instead"
        raise BadInput(f"llama.cpp's {script} cannot convert {source}: {last[:300]}", hint)


def _quantize(source: Path, out: Path, params: Params) -> None:
    llama_cpp = library()
    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{params.type.upper()}")
    settings.nthread = machine.threads()
    if params.head:
        kind = getattr(llama_cpp, f"GGML_TYPE_{params.head.upper()}")
        settings.output_tensor_type = settings.token_embedding_type = kind
    if llama_cpp.llama_model_quantize(str(source).encode(), str(out).encode(), settings):
        raise RuntimeError(f"llama.cpp could not quantize {source} to {params.type}; its log says why")


def _note(out: Path, params: Params, seed: int) -> None:
    """quantization.json: what made the folder, and what a user must know of it."""
    kinds, widths = _matrices(out / WEIGHTS)
    block, notices = TYPES[params.type], []
    if misfits := sum(n for width, n in widths.items() if width % block):
        narrow = ", ".join(str(width) for width in sorted(widths) if width % block)
        used = ", ".join(f"{n} {kind}" for kind, n in sorted(kinds.items()))
        notices.append(
            f"{params.type} needs rows of a multiple of {block} weights; {misfits} of {sum(widths.values())} matrices "
            f"have rows of {narrow}, for which llama.cpp chose larger types: {used}"
        )
    if not _tokenizer_fits(out):
        notices.append(
            "llama.cpp's own tokenizer splits text in another way than this model's: peftopt encodes with the "
            "tokenizer.json beside the GGUF, and so should whoever serves it"
        )
    matrices = dict(sorted(kinds.items()))
    provenance.write(out, "gguf", ["llama-cpp-python"], asdict(params), seed, notices=notices, matrices=matrices)


def _tokenizer_fits(out: Path) -> bool:
    """As `splits_alike`, in a process of its own: llama.cpp aborts on a vocabulary that lacks bytes of a text."""
    code = f"import sys; from {__name__} import splits_alike as alike; sys.exit(not alike(sys.argv[1]))"
    variables = {**os.environ, "GGML_NO_BACKTRACE": "1"}
    done = subprocess.run([sys.executable, "-P", "-c", code, str(out)], env=variables, stdout=sys.stderr, check=False)
    return done.returncode == 0


def splits_alike(folder: str) -> bool:
    """Whether llama.cpp, as its converter understood the tokenizer, gives the ids that the tokenizer gives: the
    converters go by hashes and by single settings, and take byte-pair tokenizers for SentencePiece without a word."""
    llama_cpp, encode = library(), hf.tokenizer(folder)
    settings = llama_cpp.llama_model_default_params()
    settings.vocab_only = True
    model = llama_cpp.llama_model_load_from_file(str(Path(folder) / WEIGHTS).encode(), settings)
    if not model:
        return False
    vocabulary = llama_cpp.llama_model_get_vocab(model)
    alike = True
    for text in TEXTS:
        raw = text.encode()
        room = (llama_cpp.llama_token * (len(raw) + 8))()
        count = llama_cpp.llama_tokenize(vocabulary, raw, len(raw), room, len(room), False, True)
        alike &= list(room[: max(count, 0)]) == encode(text, add_special_tokens=False).input_ids
    llama_cpp.llama_model_free(model)
    return alike


def _matrices(file: Path) -> tuple[dict[str, int], dict[int, int]]:
    """How many matrices a GGUF file holds, by type and by width."""
    from collections import Counter

    sys.path.insert(0, str(Path(sys.prefix) / "llama.cpp" / "gguf-py"))
    try:
        from gguf import GGUFReader
    finally:
        del sys.path[0]
    matrices = [t for t in GGUFReader(file).tensors if len(t.shape) > 1]
    kinds = Counter(t.tensor_type.name.lower() for t in matrices)
    return dict(kinds), dict(Counter(int(t.shape[0]) for t in matrices))
