"""Packed models in one line, and text from them."""

from pathlib import Path
from typing import Any

import torch

from phoenix_sparse.checkpoint import weight_files
from phoenix_sparse.errors import PhoenixError, first_line
from phoenix_sparse.files import read_json
from phoenix_sparse.models import LIBRARY_ERRORS, choose_dtype, find_device, load_config, load_model
from phoenix_sparse.runtime.cuda.linear import prepare
from phoenix_sparse.runtime.cuda.many_rows import Prefill, check_prefill, refuse
from phoenix_sparse.runtime.decodable import context_of, refusal
from phoenix_sparse.runtime.decoding import Decoder
from phoenix_sparse.runtime.packing import read_config
from phoenix_sparse.settings import Device, Dtype


def load(directory: Path | str, dtype: Dtype = "auto", device: Device = "auto", prefill: Prefill = "packed") -> Any:
    """Load a packed model for inference; its linears stay packed.

    On a GPU they are put in the layout of Phoenix's kernels there (see `cuda.linear.prepare`).

    Args:
        directory: that `phx pack` wrote.
        dtype: to compute in.
        device: to compute on.
        prefill: what the linears keep beside that on a GPU, for prompts and large batches. `packed`: nothing, the least
            memory (at 50% 0.59 of the dense linears'). `dense`: a dense copy, and with it a dense model's prefill, in
            1.59 of the dense memory. `semi`: cuSPARSELt's form of 2:4 linears (0.56 more). `auto`: what is fastest, if
            it takes at most half of the memory that is free after loading. See `cuda.many_rows.Prefill`.

    Raises:
        PhoenixError: the directory isn't packed, a file of it is damaged, the GPU's kernels can't be had, or what
            `prefill` names doesn't fit or isn't for this model or device.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    from phoenix_sparse.runtime import quantizer  # noqa: F401 (registers itself)

    check_prefill(prefill)
    directory, place = Path(directory).expanduser(), find_device(device)
    read_config(directory)
    weight_files(directory)  # which refuses an index that leads out of the directory
    config = load_config(directory, packed=True)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            directory,
            dtype=choose_dtype(config, dtype, place),
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except (*LIBRARY_ERRORS, SafetensorError) as error:
        raise PhoenixError(f"{directory}: the packed weights can't be loaded ({first_line(error)})") from error
    model, info = loaded
    if info["missing_keys"]:  # which transformers makes up
        missing = sorted(info["missing_keys"])
        raise PhoenixError(f"{directory}: its files lack {len(missing)} tensors, {missing[0]} first; pack it again")
    model = model.to(place).eval()
    prepare(model, place, prefill)
    return model


def generate(model: Any, tokenizer: Any, prompt: str, *, max_new_tokens: int = 64) -> str:
    """Continue a prompt greedily, within the model's context; gives the continuation alone.

    By `decoding.Decoder`; models that it can't decode (`decodable.refusal`) go through transformers' own loop.

    Raises:
        PhoenixError: the prompt is empty, or fills the model's context, or no token is asked for.
    """
    if max_new_tokens < 1:
        raise PhoenixError(f"generate: {max_new_tokens} new tokens; give 1 or more")
    inputs = tokenizer(prompt, return_tensors="pt").to(model.get_input_embeddings().weight.device)
    start, context = inputs["input_ids"].shape[1], context_of(model)
    if not start:
        raise PhoenixError("generate: the prompt is empty; give some text to continue")
    if context is not None and start >= context:
        raise PhoenixError(f"generate: the prompt has {start} tokens, and the model's context {context}; shorten it")
    length = start + max_new_tokens if context is None else min(start + max_new_tokens, context)
    if refusal(model) is None:
        tokens = Decoder(model, 1, length).generate(inputs["input_ids"], max_new_tokens)
    else:
        with torch.inference_mode():
            tokens = model.generate(
                **inputs, max_new_tokens=length - start, do_sample=False, pad_token_id=tokenizer.pad_token_id
            )
    return str(tokenizer.decode(tokens[0, start:], skip_special_tokens=True))


def open_model(directory: Path, dtype: Dtype = "auto", device: Device = "auto", prefill: Prefill = "packed") -> Any:
    """A model from its directory, packed or not; `prefill` is for packed ones (see `load`).

    Raises:
        PhoenixError: it can't be loaded, or isn't packed, and `prefill` asks for copies of packed linears.
    """
    if "quantization_config" in read_json(directory / "config.json"):
        return load(directory, dtype, device, prefill)
    refuse(check_prefill(prefill), f"{directory} isn't packed, and multiplies densely as it is")
    return load_model(directory, dtype, device)
