"""Bake a prompt: run an adapter's virtual tokens through its base once, keep their keys and values, and prove it.

Causal attention lets the virtual tokens see each other and nothing that comes after them, so their keys and values are
the same for every request (prompt tuning, arXiv:2104.08691; P-tuning, arXiv:2103.10385; multitask prompt tuning,
arXiv:2303.02861; CPT, arXiv:2410.17222). Prefix tuning (arXiv:2101.00190) trains them as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from peftopt.errors import BadInput
from peftopt.merging import certificate
from peftopt.merging.certificate import Check, Steps
from peftopt.models import baked, hf
from peftopt.models.adapter import NO_DELTA, PROMPTS, Adapter, is_embedding
from peftopt.models.baked import Baked
from peftopt.models.checkpoint import Checkpoint
from peftopt.records import Json, Model

ACCEPTED = ("CAUSAL_LM",)


def check_bakeable(adapter: Adapter) -> None:
    """Raises BadInput for an adapter that is no prompt of its own: what it is, and what to do instead."""
    who = f"adapter {adapter.folder} ({adapter.kind})"
    if adapter.kind not in PROMPTS:
        if adapter.kind in NO_DELTA:
            raise BadInput(f"{who} cannot be baked: {NO_DELTA[adapter.kind]}", "serve it live")
        raise BadInput(
            f"{who} cannot be baked: it changes weights, and puts no virtual tokens before a sequence",
            "merge it: put `merge` where `bake` is; peftopt merge does it outside a recipe",
        )
    task = adapter.config.get("task_type")
    if task not in ACCEPTED or (adapter.config.get("num_transformer_submodules") or 1) > 1:
        raise BadInput(
            f"{who} cannot be baked: it was trained for {task}, and only a causal language model starts from its cache",
            "serve it live",
        )
    if copies := [name for name in adapter.weights.entries if is_embedding(name)]:
        raise BadInput(
            f"{who} cannot be baked: it brings embeddings ({copies[0]}), and a baked prompt leaves the base as it is",
            "save the base with these embeddings, and the adapter without them (save_embedding_layers=False)",
        )


def bake(model: Model, adapter: Adapter, task: int | None, depth: str, out: Path, texts: Sequence[str]) -> Baked:
    """Write the baked prompt of an adapter to the folder `out`, with its certificate.

    `task` is the number of a multitask prompt's task. `depth`: "full" compares predictions in fp32, "own" in the base's
    own dtype. `texts`: rendered prompts to compare on, ours if empty. Raises BadInput for an adapter that does not fit
    the base, and for a base whose cache cannot begin with a prompt.
    """
    home = Path(model.path)
    live = Live(home, adapter, task)
    baked.check_cache(live.base.config, live.tokens)
    about: dict[str, Json] = {
        "peft_type": adapter.kind,
        "adapter": {"name": adapter.folder.resolve().name, "sha256": adapter.sha256},
        **({"task": task} if task is not None else {}),
    }
    folder = baked.write(out, live.layers(), baked.base_of(home), about)
    hf.carry_tokenizer(model, out)
    decode = certificate.decoder(Path(hf.tokenizer_home(model)))
    checks = [
        shapes(folder, live),
        finite(folder),
        predictions(folder, live, depth, prompts(model, live, texts), decode),
    ]
    method = f"PEFT's own {adapter.kind} prompt, through the base once"
    certificate.write(out, home, [adapter], method, depth, checks, digests(folder))
    return folder


class Live:
    """An adapter on its base as PEFT runs it, a lone row at a time. `dtype`: the base's own if None."""

    def __init__(self, base: Path, adapter: Adapter, task: int | None, dtype: Any = None) -> None:
        import torch

        self.folder, self.adapter, self._number = base, adapter, task
        loaded = hf.load(str(base)) if dtype is None else hf.load(str(base), dtype=dtype)
        with hf.refusing(str(adapter.folder)):
            self.model = hf.attach(loaded, str(adapter.folder))
        self.base = self.model.get_base_model()
        self.tokens = int(self.model.active_peft_config.num_virtual_tokens)
        self._task = {} if task is None else {"task_ids": torch.tensor([task])}

    def again(self, dtype: Any = None) -> Live:
        """The same in another dtype; this one is no more afterwards."""
        self.model = self.base = None
        return Live(self.folder, self.adapter, self._number, dtype)

    def prompt(self) -> Any:
        """The virtual tokens as PEFT gives them to the base: embeddings [1, virtual tokens, hidden size], or a cache of
        keys and values where it trains those."""
        return self.model.get_prompt(1, **self._task)

    def layers(self) -> list[tuple[Any, Any]]:
        """Keys and values of the virtual tokens, [key-value heads, virtual tokens, head size] a layer.

        Raises BadInput where PEFT leaves a layer without them.
        """
        import torch
        from transformers import DynamicCache

        with torch.inference_mode(), hf.refusing(str(self.adapter.folder)):
            prompt = self.prompt()
            if not torch.is_tensor(prompt):  # prefix tuning: keys and values, as they were trained
                cache = prompt
            else:
                embedded = prompt.to(self.base.get_input_embeddings().weight.dtype)
                cache = DynamicCache(config=self.base.config)
                self.base(inputs_embeds=embedded, past_key_values=cache, use_cache=True)
        layers = [(layer.keys[0].clone(), layer.values[0].clone()) for layer in cache.layers if layer.keys is not None]
        expected, shapes = self.expected(), [_shapes(pair) for pair in layers]
        if shapes != expected:
            raise BadInput(
                f"adapter {self.adapter.folder} does not fit the base: PEFT gives it {_shown(shapes)}, and "
                f"the base keeps {_shown(expected)}",
                "PEFT cannot run this prompt on this base either: train another kind, such as PROMPT_TUNING",
            )
        return layers

    def expected(self) -> list[tuple[int, ...]]:
        """What a pass of the base leaves in each layer of its cache: see `_shapes`."""
        import torch
        from transformers import DynamicCache

        cache = DynamicCache(config=self.base.config)
        with torch.inference_mode(), hf.quiet():
            self.base(input_ids=torch.zeros(1, 1, dtype=torch.long), past_key_values=cache, use_cache=True)
        return [_shapes((layer.keys[0], layer.values[0])) for layer in cache.layers]

    def generate(self, **inputs: Any) -> Any:
        """Token ids of the prompt and its answer."""
        return self.model.generate(**inputs, **self._task)

    def once(self, input_ids: Any) -> Any:
        """`logits` [1, tokens, vocabulary] after each token."""
        logits = self.model(input_ids=input_ids, **self._task).logits
        return SimpleNamespace(logits=logits[:, -input_ids.shape[1] :])

    def twice(self, input_ids: Any) -> Any:
        """The same, in two passes: the first token by itself, which changes nothing but how sums are rounded."""
        import torch

        first = self.model(input_ids=input_ids[:, :1], use_cache=True, **self._task)
        rest = self.base(input_ids=input_ids[:, 1:], past_key_values=first.past_key_values, use_cache=True)
        return SimpleNamespace(logits=torch.cat([first.logits[:, -1:], rest.logits], dim=1))

    def plain(self, input_ids: Any) -> Any:
        """The base without virtual tokens."""
        return self.base(input_ids=input_ids)


def _shapes(pair: tuple[Any, Any]) -> tuple[int, ...]:
    """Heads and head size of a layer's keys, then of its values."""
    return tuple(size for one in pair for size in (one.shape[0], one.shape[2]))


def _shown(layers: Sequence[tuple[int, ...]]) -> str:
    """Shapes of layers, as a message names them."""
    kinds = sorted({f"{heads} heads of {size}" for heads, size, *_ in layers})
    return f"{len(layers)} layers with {' or '.join(kinds)}"


# ---- the certificate ---------------------------------------------------------------------------


def shapes(folder: Baked, live: Live) -> Check:
    """Every layer has keys and values of the shape that a pass of the base leaves in its cache."""
    expected = live.expected()
    written = [_shapes(pair) for pair in baked.tensors(folder)]
    wrong = sum(one != other for one, other in zip(expected, written, strict=False))
    wrong += abs(len(expected) - len(written))
    detail = f"{len(written)} layers of {folder.tokens} virtual tokens, {wrong} of them unlike the base's cache"
    return Check("shapes", not wrong and folder.tokens == live.tokens, detail, {"layers": len(written), "wrong": wrong})


def finite(folder: Baked) -> Check:
    """No key and no value is NaN or infinite."""
    named = baked.named(baked.tensors(folder))
    bad = hf.not_finite(named)
    detail = f"{bad} holds NaN or infinity" if bad else f"all of {len(named)} tensors are finite"
    return Check("finite", not bad, detail)


def predictions(
    folder: Baked, live: Live, depth: str, prompts: Sequence[list[int]], decode: Callable[[list[int]], str]
) -> Check:
    """Compare what the base predicts from the baked prompt, read back from the folder, with the live adapter.

    In fp32 ("full"), where the adapter's own noise is what the base's dtype makes of it, or in the base's own dtype
    ("own"), where it is what a second way to sum up makes of it. The rules are those of `certificate.compare`: a prompt
    that is not there, or stands at other positions, is farther from the adapter than its noise.
    """
    import torch

    widens = depth == "full" and live.base.dtype != torch.float32
    if widens:
        live = live.again(torch.float32)
    steps = Steps.of(len(prompts), models=4)
    asked = certificate.answered_by(live, prompts, steps)
    predict = partial(certificate.predicted_by, asked=asked, folder=folder.folder.parent, steps=steps)
    exact = predict(live.once, what="the live adapter")
    plain = predict(live.plain, what="the base")
    ours = predict(partial(_begun, baked.load(folder, live.base), live.base), what="the baked prompt")
    again = live.again().once if widens else live.twice
    noisy = predict(again, what="the live adapter, for its own noise")
    return certificate.compare(exact, ours, noisy, plain, asked, steps, decode, change="prompt")


def _begun(prefix: baked.Prefix, base: Any, input_ids: Any) -> Any:
    """Logits of the base that starts from a baked prompt, as an engine does it."""
    import torch

    return base(input_ids=input_ids, **prefix.inputs(torch.ones_like(input_ids)), use_cache=True)


def digests(folder: Baked) -> Mapping[str, Json]:
    """Dtype, shape and XXH3-128 of each tensor, as a certificate lists them."""
    import xxhash

    listed: dict[str, Json] = {}
    with Checkpoint([folder.folder / baked.WEIGHTS]) as written:
        for name, entry in written.entries.items():
            content = bytearray(entry.nbytes)
            written.read(entry, 0, memoryview(content))
            digest = xxhash.xxh3_128(content).hexdigest()
            listed[name] = {"dtype": entry.dtype, "shape": entry.shape, "xxh3_128": digest}
    return listed


def prompts(model: Model, live: Live, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of the prompts to compare on, such as the base has positions for."""
    encoded = certificate.prompts(Path(hf.tokenizer_home(model)), texts)
    room = hf.positions(live.base, live.tokens + certificate.NEW_TOKENS)
    return [ids[-room:] for ids in encoded]
