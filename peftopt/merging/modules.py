"""Every PEFT type that can be merged, by PEFT's own mathematics, one real module at a time in a hollow model.

The base model is built with parameters that have shapes and no memory; PEFT injects its layers into it and loads the
adapter. Then each wrapped module in turn is given its real weights, merged by PEFT's own `merge`, handed out and made
hollow again, so that memory is bounded by the largest module, whatever the size of the model.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

from peftopt.errors import BadInput
from peftopt.merging.training import TrainingBase
from peftopt.models import hf
from peftopt.models.adapter import PREFIX, Adapter, is_embedding
from peftopt.models.checkpoint import Checkpoint

Tensors = dict[str, Any]

DECOMPOSED_TOGETHER = ("FROD",)
"""Types that decompose the weights of all layers at once, so that for a moment the whole base is in memory."""


@dataclass
class Group:
    """Parameters of the model and tensors of the checkpoint that are made of each other: nearly always one of each.

    transformers fuses some on loading, e.g. the experts of one layer; `converter` is its rule for that.
    """

    params: list[str]
    tensors: list[tuple[str, str | None]] = field(default_factory=list)
    converter: Any = None


class Hollow:
    """A causal language model without memory, the adapters injected, and the base's values on request."""

    def __init__(
        self, folder: str, base: Checkpoint, adapters: Sequence[Adapter], combination: str, training: TrainingBase
    ) -> None:
        self.base, self.adapters, self.training = base, adapters, training
        self.config = hf.config(folder)
        training.clean(self.config)
        self._resize()
        self.model = _empty(self.config)
        self.params = dict(self.model.named_parameters(remove_duplicate=False))
        self.tied = _tied(self.model)
        self.groups = _groups(self.model, base, training)
        self.overrides: Tensors = {}
        self.quantized = training.quantized(self.model)
        self.packed = {n for n, g in self.groups.items() if any(training.is_packed(base, key) for key, _ in g.tensors)}
        self.peft = self._inject(folder, combination)
        self.units = dict(_units(self.peft, self.params))
        self._check_resized()
        if not self.units and not self.overrides:
            raise BadInput("the adapter touches no module of the base", "it was trained on another model")

    # ---- building ----------------------------------------------------------------------------

    def _resize(self) -> None:
        """Take the vocabulary's size from an adapter that brings its own, resized embeddings."""
        text = self.config.get_text_config()
        for adapter in self.adapters:
            for name, entry in adapter.weights.entries.items():
                if is_embedding(name):
                    text.vocab_size = entry.shape[0]

    def _check_resized(self) -> None:
        """Raises BadInput when the vocabulary was resized in training and an embedding of that size is not there."""
        for name, group in self.groups.items():
            stored = self.base.entries[group.tensors[0][0]].shape
            if group.converter is None and name not in self.overrides and name not in self.packed:
                self._check_shape(name, stored)

    def _check_shape(self, name: str, shape: Sequence[int]) -> None:
        if tuple(shape) != tuple(self.params[name].shape):
            raise BadInput(
                f"{name} is {list(shape)} in the base and {list(self.params[name].shape)} in the adapter",
                "it was trained after a resize and does not bring this tensor: save it with save_embedding_layers=True",
            )

    def _inject(self, folder: str, combination: str) -> Any:
        """PEFT's layers in the hollow model, the adapters' weights loaded, every key of theirs accounted for."""
        from peft import PeftModel

        peft = None
        for n, adapter in enumerate(self.adapters):
            name, path = f"adapter{n}", str(adapter.folder)
            config = hf.adapter_config(path)
            config.inference_mode = True
            with hf.refusing(path), self._real_while_injected(config):
                if peft is None:
                    peft = PeftModel(self.model, config, name)
                else:
                    peft.add_adapter(name, config)
            self._load(peft, adapter, name)
        assert peft is not None
        names = [f"adapter{n}" for n in range(len(self.adapters))]
        hf.combine(peft, names, [a.weight for a in self.adapters], combination)
        return peft.eval()

    @contextlib.contextmanager
    def _real_while_injected(self, config: Any) -> Iterator[None]:
        """Give each module its weights while PEFT wraps it: some types decompose them at that moment (OSF, PSOFT …)."""
        from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING

        tuner = PEFT_TYPE_TO_TUNER_MAPPING[config.peft_type]
        wrap = tuner._create_and_replace
        names = {id(p): name for name, p in self.params.items()}
        whole = list(self.params) if config.peft_type.value in DECOMPOSED_TOGETHER else []

        def wrapped(this: Any, config: Any, adapter_name: str, target: Any, *args: Any, **kwargs: Any) -> Any:
            inside = [names[id(p)] for p in target.parameters() if id(p) in names and not whole]
            self._fill(inside)
            try:
                return wrap(this, config, adapter_name, target, *args, **kwargs)
            finally:
                self._drain(inside)

        self._fill(whole)
        with mock.patch.object(tuner, "_create_and_replace", wrapped):
            yield
        self._drain(whole)

    def _load(self, peft: Any, adapter: Adapter, name: str) -> None:
        """Load the adapter's tensors. Those that replace parameters of the base itself (trained biases, a copy of the
        embeddings) become its new values."""
        import torch
        from peft import set_peft_model_state_dict

        path = str(adapter.folder)
        weights = hf.adapter_weights(path)
        inner = peft.base_model.model
        inside = dict(inner.named_parameters(remove_duplicate=False))
        own = {id(p): n for n, p in self.params.items()}
        replaced = {}
        for key in weights:
            at = key.removeprefix(PREFIX)
            for candidate in (at, _with_base_layer(at)):
                parameter = inside.get(candidate)
                if parameter is not None and id(parameter) in own:
                    parameter.data = torch.zeros(parameter.shape)
                    replaced[own[id(parameter)]] = parameter
        with hf.refusing(path):
            set_peft_model_state_dict(peft, weights, adapter_name=name)
        hf.check_keys(peft, path, name, weights)
        for param, parameter in replaced.items():
            self.overrides[param] = parameter.data.clone()
            parameter.data = _hollow(parameter.shape)

    # ---- the base's values -------------------------------------------------------------------

    def value(self, name: str, dtype: Any = None) -> Any:
        """A parameter of the base as the adapter saw it in training, in fp32 unless `dtype` says otherwise. Raises
        BadInput where the base lacks it, or has it in another shape."""
        import torch

        dtype = dtype or torch.float32
        if name in self.overrides:
            return self.overrides[name].to(dtype, copy=True)
        if name not in self.groups and self.tied and name in self.tied:
            return self.value(self.tied[0] if name == self.tied[1] else self.tied[1], dtype)
        if name not in self.groups:
            raise BadInput(f"the base has no weight {name}", "its checkpoint is not whole: download it again")
        value = self._loaded(self.groups[name], dtype)[name]
        self._check_shape(name, value.shape)
        return self.training.seen(name, value) if name in self.quantized else value

    def _loaded(self, group: Group, dtype: Any) -> Tensors:
        """What transformers would load for these parameters."""
        tensors = {key: self.training.tensor(self.base, key).to(dtype) for key, _ in group.tensors}
        if group.converter is None:
            return {group.params[0]: tensors[group.tensors[0][0]]}
        converter = copy.deepcopy(group.converter)
        for key, pattern in group.tensors:
            converter.add_tensor(group.params[0], key, pattern, tensors[key])
        converted = converter.convert(group.params[0], model=self.model, config=self.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in converted.items()}

    def stored(self, group: Group, values: Tensors) -> Tensors:
        """The way back: these parameters as the tensors of the checkpoint. Raises BadInput where they come out under
        other names."""
        if group.converter is None:
            return {group.tensors[0][0]: values[group.params[0]]}
        from transformers.core_model_loading import revert_weight_conversion

        tensors: Tensors = revert_weight_conversion(self.model, dict(values))
        if odd := tensors.keys() ^ {key for key, _ in group.tensors}:
            raise BadInput(f"cannot split {group.params[0]} back into the checkpoint's tensors ({sorted(odd)[0]})")
        return tensors

    # ---- merging -----------------------------------------------------------------------------

    @property
    def adapted(self) -> set[str]:
        """Every parameter that the adapters may change."""
        return {name for names in self.units.values() for name in names} | self.overrides.keys()

    @property
    def touched(self) -> set[str]:
        """Every parameter that may come out different: those adapted, and those that were or are in 4 bits."""
        return self.adapted | self.quantized | self.packed

    def merged(self, unit: str, exact: bool = False) -> Tensors:
        """The parameters of one wrapped module after PEFT merged it: fp32, or fp64 all the way when `exact`. Raises
        BadInput where the merge would change the module's architecture, or PEFT cannot merge it."""
        import torch

        names = self.units[unit]
        layer = self.peft.base_model.model.get_submodule(unit)
        self._fill(names)
        try:
            if exact:
                layer = copy.deepcopy(layer).double()
                originals = {id(p): n for n, p in _own_parameters(layer, unit, self.peft, self.params)}
                for parameter in layer.parameters():
                    if name := originals.get(id(parameter)):
                        parameter.data = self.value(name, torch.float64)
            with hf.refusing(unit), torch.no_grad():
                if hasattr(layer, "unload_and_optionally_merge_module"):
                    result = layer.unload_and_optionally_merge_module(merge=True, safe_merge=False, adapter_names=None)
                else:
                    layer.merge(safe_merge=False, adapter_names=None)
                    result = layer.get_base_layer()
            tensors = {f"{unit}.{name}": p.data for name, p in result.named_parameters()}
            if tensors.keys() != set(names):
                raise BadInput(f"merging {unit} would change its architecture", "serve this adapter unmerged")
            return tensors
        finally:
            self._drain(names)

    def changes(self) -> Iterator[Tensors]:
        """All parameters that the adapters may change, module by module."""
        for unit in self.units:
            yield self.merged(unit)
        for name in sorted(self.overrides.keys() - {name for names in self.units.values() for name in names}):
            yield {name: self.value(name)}

    def _fill(self, names: Sequence[str]) -> None:
        for name in names:
            self.params[name].data = self.value(name)

    def _drain(self, names: Sequence[str]) -> None:
        for name in names:
            self.params[name].data = _hollow(self.params[name].shape)


# ---- the hollow model ----------------------------------------------------------------------------


def _hollow(shape: Sequence[int]) -> Any:
    """A tensor of this shape that takes four bytes."""
    import torch

    return torch.zeros(1).expand(tuple(shape))


def _empty(config: Any) -> Any:
    """The architecture with hollow fp32 parameters, tied ones apart: each name may get a value of its own."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"), hf.quiet():
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = torch.nn.Parameter(_hollow(parameter.shape), requires_grad=False)
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_meta:
                module._buffers[name] = torch.zeros(buffer.shape, dtype=buffer.dtype)
    return model.eval()


def _tied(model: Any) -> tuple[str, str] | None:
    """Names of the input and output embedding when the config ties them."""
    head, table = model.get_output_embeddings(), model.get_input_embeddings()
    if not getattr(model.config.get_text_config(), "tie_word_embeddings", False) or head is None:
        return None
    names = {module: name for name, module in model.named_modules()}
    return f"{names[table]}.weight", f"{names[head]}.weight"


def _groups(model: Any, base: Checkpoint, training: TrainingBase) -> dict[str, Group]:
    """Which tensors of the checkpoint make which parameters, by transformers' own rules of renaming and fusing."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    by_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
    known, prefix = model.state_dict(), model.base_model_prefix
    groups: dict[str, Group] = {}
    for key in sorted(training.names(base), key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, prefix, known)
        if name not in known and key in known:
            name, pattern = rename_source_key(key, [], [], prefix, known)
        if name not in known:
            continue  # e.g. a buffer that older versions saved: copied, never touched
        rule = by_pattern[pattern] if pattern is not None else None
        targets = [name]
        if rule is not None and len(rule.target_patterns) > 1:
            targets = [name.replace(rule.target_patterns[0], target) for target in rule.target_patterns]
        group = groups.get(name) or Group(targets, converter=rule)
        group.tensors.append((key, pattern))
        groups |= dict.fromkeys(targets, group)
    model._weight_conversions = [rule for rule in rules if rule.was_used()]
    return groups


def _units(peft: Any, params: Mapping[str, Any]) -> Iterator[tuple[str, list[str]]]:
    """The outermost modules that PEFT wrapped, and the base's parameters inside each."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    last = None
    for path, module in peft.base_model.model.named_modules():
        if last is not None and path.startswith(f"{last}."):
            continue
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
            last = path
            yield path, [name for name in params if name.startswith(f"{path}.")]


def _own_parameters(layer: Any, unit: str, peft: Any, params: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """A copied layer's parameters that stand for parameters of the base, with their names there."""
    original = peft.base_model.model.get_submodule(unit)
    names = {id(p): n for n, p in params.items()}
    for ours, theirs in zip(layer.parameters(), original.parameters(), strict=True):
        if name := names.get(id(theirs)):
            yield name, ours


def _with_base_layer(key: str) -> str:
    module, _, leaf = key.rpartition(".")
    return f"{module}.base_layer.{leaf}"
