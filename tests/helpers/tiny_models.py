"""A tiny Llama with a chat template and a LoRA that changes it: made here, in a second, without a network."""

from __future__ import annotations

from pathlib import Path

CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEXTS = [f"the quick brown fox number {i} jumps over the lazy dog and counts {i * i} stars" for i in range(40)]


def make_base(folder: Path, dtype: str, layers: int = 2) -> None:
    """Write a random Llama (two layers, hidden 64, tied embeddings) with a byte-level BPE tokenizer."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    marks = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=384, special_tokens=marks, initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator(TEXTS, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>", bos_token="<|im_start|>"
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)

    torch.manual_seed(0)
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        initializer_range=0.2,  # larger than usual: a random model whose greedy answers differ by prompt
        tie_word_embeddings=True,
        **ids,
    )
    model = LlamaForCausalLM(config).to(getattr(torch, dtype))
    model.generation_config = GenerationConfig(do_sample=True, temperature=0.7, top_p=0.9, **ids)
    model.save_pretrained(folder)


def make_lora(base: Path, folder: Path, std: float = 0.1, **settings: object) -> None:
    """Write a rank-4 LoRA on all linear layers of `base`, with random weights of size `std` (0 changes nothing)."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    config = LoraConfig(
        **{"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **settings}
    )
    adapted = get_peft_model(model, config)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name or "lora_embedding_A" in name:
            torch.nn.init.normal_(parameter, std=std) if std else torch.nn.init.zeros_(parameter)
    adapted.save_pretrained(folder)


PROMPTS: dict[str, tuple[str, dict[str, object]]] = {
    "prompt": ("PromptTuningConfig", {}),
    "p-mlp": ("PromptEncoderConfig", {"encoder_hidden_size": 16}),
    "p-lstm": ("PromptEncoderConfig", {"encoder_hidden_size": 16, "encoder_reparameterization_type": "LSTM"}),
    "prefix": ("PrefixTuningConfig", {}),
    "prefix-projected": ("PrefixTuningConfig", {"prefix_projection": True, "encoder_hidden_size": 16}),
    "multitask": ("MultitaskPromptTuningConfig", {"num_tasks": 3, "num_ranks": 2}),
    "cpt": ("CPTConfig", {"cpt_token_ids": [5, 6, 7, 8, 9], "cpt_mask": [1] * 5, "cpt_tokens_type_mask": [1] * 5}),
    "cartridge": ("CartridgeConfig", {}),
}
"""Methods of PEFT that put virtual tokens before a prompt: a config's class, and settings."""


def make_prompt(base: Path, folder: Path, method: str, tokens: int = 5) -> Path:
    """Write an adapter of one of PROMPTS, with random weights that visibly change the answers of `base`; for CPT,
    `tokens` is always 5."""
    import peft
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(1)
    name, settings = PROMPTS[method]
    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    size = {} if method == "cpt" else {"num_virtual_tokens": tokens}
    adapted = peft.get_peft_model(model, getattr(peft, name)(task_type="CAUSAL_LM", **size, **settings))
    for parameter in adapted.prompt_encoder.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    adapted.eval().save_pretrained(folder)
    return folder
