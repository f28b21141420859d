"""Virtual tokens as words of a copy of the base: an engine that knows nothing of adapters serves them, and keeps their
keys and values in its own prefix cache.

A soft prompt (arXiv:2104.08691) is rows of an input embedding. The copy's embedding gets these rows, one new word each,
and its tokenizer and chat template begin every prompt with the words. None of them is ever an answer's: in the output
head they have the row of another word, the one that is the least likely of all.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from peftopt.errors import BadInput
from peftopt.merging import baking, certificate
from peftopt.merging.baking import Live
from peftopt.merging.certificate import Check, Steps
from peftopt.models import hf
from peftopt.models.adapter import Adapter
from peftopt.records import Json, Model

TRAINED_STATES = ("PREFIX_TUNING", "CARTRIDGE")
"""PEFT types that train keys and values, which no embedding gives."""
LIKELY_ON = 4
"""Prompts on which it is seen which word is the least likely."""


def check_words(adapter: Adapter) -> None:
    """Raises BadInput for an adapter whose virtual tokens are not rows of an embedding."""
    if adapter.kind in TRAINED_STATES:
        raise BadInput(
            f"adapter {adapter.folder} ({adapter.kind}) cannot be words of a model: it trains keys and values of every "
            "layer, and no embedding gives those",
            "bake it as a folder (without --for), and serve it with --engine eager or compiled",
        )


def write(model: Model, adapter: Adapter, task: int | None, depth: str, out: Path, texts: Sequence[str]) -> None:
    """Write a copy of the base with an adapter's virtual tokens as words to the folder `out`, with its certificate.

    `task`, `depth` and `texts` as in `baking.bake`. Raises BadInput for an adapter that does not fit the base, and for
    a base that changes what its embedding gives.
    """
    import torch

    home = Path(model.path)
    settings = hf.unquantized_config(model, "bake into the words of")
    live = Live(home, adapter, task)
    with torch.inference_mode(), hf.refusing(str(adapter.folder)):
        rows = live.prompt()[0]
    prompts = baking.prompts(model, live, texts)
    tokenizer = hf.tokenizer(hf.tokenizer_home(model), model.path)
    words = _with_words(tokenizer, len(rows))
    _save(model, words, rows, _least_likely(live, prompts), out)
    tokenizer.save_pretrained(out)
    checks = predictions(out, live, depth, prompts, words, settings.get_text_config().vocab_size)
    method = f"PEFT's own {adapter.kind} prompt, as {len(rows)} words of the embedding"
    certificate.write(out, home, [adapter], method, depth, checks, {})


def _with_words(tokenizer: Any, count: int) -> list[int]:
    """Add so many words to a tokenizer, and let each prompt begin with them, with a chat template and without one;
    their ids."""
    from tokenizers import AddedToken, processors

    names = [f"<|virtual_{number}|>" for number in range(count)]
    if known := set(names) & set(tokenizer.get_vocab()):
        raise BadInput(f"the base's tokenizer has the word {min(known)} already", "bake on the base as it was")
    tokenizer.add_tokens([AddedToken(name, special=True, normalized=False) for name in names], special_tokens=True)
    ids = [int(id_) for id_ in tokenizer.convert_tokens_to_ids(names)]
    if isinstance(tokenizer.chat_template, dict):
        tokenizer.chat_template = {name: "".join(names) + text for name, text in tokenizer.chat_template.items()}
    elif tokenizer.chat_template:
        tokenizer.chat_template = "".join(names) + tokenizer.chat_template
    backend = tokenizer.backend_tokenizer
    before = processors.TemplateProcessing(
        single=" ".join([*names, "$A"]), special_tokens=list(zip(names, ids, strict=True))
    )
    own = backend.post_processor
    backend.post_processor = processors.Sequence([own, before]) if own else before
    return ids


def _least_likely(live: Live, prompts: Sequence[list[int]]) -> int:
    """The word whose highest logit over some prompts is the lowest."""
    import torch

    with torch.inference_mode(), hf.quiet():
        logits = [live.once(torch.tensor([ids])).logits[0] for ids in prompts[:LIKELY_ON]]
    return int(torch.cat(logits).amax(0).argmin())


def _save(model: Model, words: Sequence[int], rows: Any, unlikely: int, out: Path) -> None:
    """Write the copy. Its input and output embeddings are two, whatever the base's are."""
    import torch

    copy = hf.load(model.path)
    size = copy.get_input_embeddings().num_embeddings
    for config in {id(each): each for each in (copy.config, copy.config.get_text_config())}.values():
        config.tie_word_embeddings = False
    with torch.no_grad():
        head = copy.get_output_embeddings()
        head.weight = torch.nn.Parameter(head.weight.clone())
        copy.resize_token_embeddings(max(size, *(word + 1 for word in words)), mean_resizing=False)
        table, head = copy.get_input_embeddings(), copy.get_output_embeddings()
        table.weight[list(words)] = rows.to(table.weight.dtype)
        head.weight[list(words)] = head.weight[unlikely].clone()
        if head.bias is not None:
            head.bias[list(words)] = head.bias[unlikely].clone()
        if not torch.equal(table(torch.tensor(list(words))), rows.to(table.weight.dtype)):
            raise BadInput(
                f"{model.path} changes what its embedding gives, and PEFT's virtual tokens come after that",
                "bake it as a folder (without --for)",
            )
    hf.save(copy, model.path, out)


def predictions(
    out: Path, live: Live, depth: str, prompts: Sequence[list[int]], words: Sequence[int], vocabulary: int
) -> list[Check]:
    """Compare what the copy predicts after the words with the live adapter, as `baking.predictions` does; and whether
    a word is ever the likeliest."""
    import torch

    widens = depth == "full" and live.base.dtype != torch.float32
    if widens:
        live = live.again(torch.float32)
    copy = hf.load(str(out), dtype=live.base.dtype)
    above: list[float] = []

    def asked_of_copy(input_ids: Any) -> Any:
        begun = torch.cat([torch.tensor([list(words)]), input_ids], dim=1)
        logits = copy(input_ids=begun).logits[:, len(words) :]
        above.append(float((logits[..., list(words)].amax(-1) - logits[..., :vocabulary].amax(-1)).max()))
        return SimpleNamespace(logits=logits[..., :vocabulary])

    steps = Steps.of(len(prompts), models=4)
    asked = certificate.answered_by(live, prompts, steps)
    predict = partial(certificate.predicted_by, asked=asked, folder=out.parent, steps=steps)
    exact = predict(live.once, what="the live adapter")
    plain = predict(live.plain, what="the base")
    ours = predict(asked_of_copy, what="the copy with words")
    noisy = predict(live.again().once if widens else live.twice, what="the live adapter, for its own noise")
    decode = certificate.decoder(out)
    nearest = max(above)
    values: dict[str, Json] = {"nearest": nearest}
    detail = f"the likeliest of {len(words)} words is {-nearest:.2g} below the likeliest token at its nearest"
    return [
        Check("words are never answered", nearest < 0, detail, values),
        certificate.compare(exact, ours, noisy, plain, asked, steps, decode, change="prompt"),
    ]
