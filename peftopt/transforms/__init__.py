"""Transforms, one file each: Model -> Model. The file's name is its name in recipes; there is no list to edit.

A transform file has a one-line docstring (its help), a frozen dataclass `Params` (its schema, with defaults; ValueError
for values that make no sense), `PLUGIN = plugins.quantizer(Params, …)`, whose arguments say what it needs, whether it
calibrates and who opens what it wrote, and

    def transform(model: Model, params: Params, out: Path, texts: Sequence[str], seed: int) -> Model

which writes a whole, loadable folder at `out` (weights as safetensors, or in the `format` that it names; config,
generation config, tokenizer, chat template) and returns the Model that is there; or which writes what stands in the
place of the model's adapter, as `bake` does, and returns the same base with that folder. `texts` are rendered
calibration texts (prompt and answer, chat template applied), empty unless it calibrates, merges or bakes. It may also
have `preview(model, params)`, which says what it would change, tensor by tensor, and `check(base, params, before,
rows)`, which raises BadInput for what is impossible and can be told so before anything is built: from the files of the
base (no torch), the steps `before` it and the calibration rows. It may leave a certificate of its own checks
(parity.json) in the folder. A quantizer leaves quantization.json (`provenance.write`), and what it wrote is opened in a
fresh process before anybody else gets to see it. Whatever takes long says how far it is (`progress.report`). Raises
BadInput for a model it cannot work on, before it reads weights, saying what to do. Heavy imports stay inside functions.
"""
