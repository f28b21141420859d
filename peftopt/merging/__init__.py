"""Merging: adapter and base checkpoint -> new checkpoint -> certificate, without ever holding the model.

blocks.py       bytes of a tensor through one small buffer: copy, convert, add a LoRA delta, check, write
modules.py      every other PEFT type: PEFT's own layers, one real module at a time in a hollow model
training.py     the base that a 4-bit-trained adapter saw
certificate.py  what was checked of the result, and what came out
"""
