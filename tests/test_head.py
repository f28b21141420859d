"""The output head in a first pass: PyTorch on a CPU copies a frozen weight for each row, and nothing here lets it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.tiny_models import make_prompt

from peftopt.engines import _rows, eager
from peftopt.probes import caching
from peftopt.records import Model

PROMPTS = [[5, 9, 77, 30], [8, 8, 100, 41, 33]]


def copied(vocabulary: int, work: Callable[[], object]) -> list[str]:
    """The products that take a matrix of so many words for each row, where one for all rows would do."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as watched:
        work()
    events = watched.key_averages(group_by_input_shape=True)
    heads = [event for event in events if any(vocabulary in shape for shape in event.input_shapes)]
    assert any(event.key in ("aten::mm", "aten::bmm") for event in heads), "the head was computed"
    return [event.key for event in heads if event.key == "aten::bmm"]


def test_no_adapter_and_no_base_beside_it_pays_for_copies_of_the_head(
    tiny_base: Path, tiny_lora: Path, tmp_path: Path
) -> None:
    prompt = make_prompt(tiny_base, tmp_path / "prompt", "p-mlp")
    for folder in (tiny_lora, prompt):
        model = _rows.Served(str(tiny_base), "cpu")
        model.add("one", str(folder))
        for name in ("", "one"):
            for rows in (PROMPTS[:1], PROMPTS)[: model.most_rows(name) or None]:
                assert copied(model.vocabulary, lambda m=model, r=rows, n=name: m.begin(r, n)) == []
        model.close()


def test_what_a_cache_saves_is_no_copy_of_the_head(tiny_base: Path) -> None:
    model = eager.open(Model(str(tiny_base)), eager.Params("cpu")).model
    model.requires_grad_(False)  # as PEFT leaves a base
    vocabulary = model.get_input_embeddings().num_embeddings
    assert copied(vocabulary, lambda: caching.look(model, tokens=8, rounds=1)) == []


@pytest.mark.parametrize("rows", [1, 2])
def test_scores_are_computed_without_copies_of_the_head(rows: int, tiny_base: Path, tiny_lora: Path) -> None:
    engine = eager.open(Model(str(tiny_base), (str(tiny_lora),)), eager.Params("cpu"))
    vocabulary = engine.model.get_input_embeddings().num_embeddings
    assert copied(vocabulary, lambda: engine.score(PROMPTS[:rows], [[3, 9, 41]] * rows)) == []
