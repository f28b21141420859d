"""Merging: adapter and base checkpoint -> new checkpoint -> certificate, without ever holding the model.

job.py          one merge from its folders to its folder: plan, write, check, certify
blocks.py       bytes of a tensor through one small buffer: copy, convert, add a LoRA delta, check, write
kernel.py       the compiled loop for that delta
lanes.py        threads, each at a file of its own
modular.py      every other PEFT type: module by module, through
modules.py      PEFT's own layers, one real module at a time in a hollow model
training.py     the base that a 4-bit-trained adapter saw
wholeness.py    whether the base has all its weights, asked beside
certificate.py  what was checked of the result, and what came out
"""
