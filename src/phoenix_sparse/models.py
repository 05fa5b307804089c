"""Models as Hugging Face directories: find, check, load and save them, and walk their decoder blocks."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from phoenix_sparse.checkpoint import INDEX, SINGLE, Checkpoint, check_finite_tensor, weight_files
from phoenix_sparse.errors import PhoenixError, first_line
from phoenix_sparse.files import atomic_path
from phoenix_sparse.settings import Device, Dtype

# What reading somebody else's files through somebody else's code may raise.
LIBRARY_ERRORS = (
    *(OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError),
    *(AssertionError, ImportError, RuntimeError),
)
FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
OTHER_COPIES = ["consolidated*", "*/*", "*.fp16.*"]  # of the same weights, in some repositories
WEIGHTS = (SINGLE, INDEX)
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")


def find_model(name: str) -> Path:
    """Give the directory of a model: a local path as it is, a hub name through the hub's cache.

    Raises:
        PhoenixError: there is no such directory, the hub can't give it, or it holds no safetensors weights.
    """
    directory = Path(name).expanduser()
    if not directory.is_dir():
        if directory.exists() or name.startswith((".", "/", "~")) or name.count("/") != 1:
            raise PhoenixError(f"model: {name} is not a directory; give a Hugging Face model directory or a hub name")
        directory = _download(name)
    if not (directory / "config.json").is_file():
        inside = [
            str(directory / name) for name in ("merged", "sparse") if (directory / name / "config.json").is_file()
        ]
        instead = f"its model is {' or '.join(inside)}" if inside else "give a Hugging Face model directory"
        raise PhoenixError(f"model: {directory} has no config.json; {instead}")
    if not any((directory / file).is_file() for file in WEIGHTS):
        raise PhoenixError(f"model: {directory} has no {WEIGHTS[0]}; only safetensors weights are read")
    return directory


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return Path(snapshot_download(name, allow_patterns=FILES, ignore_patterns=OTHER_COPIES))
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise PhoenixError(
            f"model: {name} is neither a local directory nor to be had from the hub ({first_line(error)}); look at the "
            "name, or give a directory"
        ) from error


def find_device(device: Device) -> torch.device:
    if device == "cuda" and not torch.cuda.is_available():
        raise PhoenixError("device: cuda was asked for and torch sees no GPU; use device=cpu or device=auto")
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(device)


def load_config(directory: Path, *, packed: bool = False) -> Any:
    """Read config.json.

    Raises:
        PhoenixError: it is no model's, or the model is quantized; one that `phx pack` wrote only with `packed`.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
    except (*LIBRARY_ERRORS, StrictDataclassError) as error:
        raise PhoenixError(
            f"{directory}/config.json: not a model configuration ({first_line(error)}); give a model's"
        ) from error
    entry = getattr(config, "quantization_config", None)
    if isinstance(entry, dict) and entry.get("quant_method") == "phoenix_sparse":
        if not packed:
            raise PhoenixError(f"{directory}: a packed model; `phx unpack` gives the model that this step reads")
    elif entry:
        raise PhoenixError(f"{directory}: the model is quantized (quantization_config); give the unquantized model")
    return config


def empty_model(config: Any) -> Any:
    """A model of a configuration's shapes, without weights (on the meta device)."""
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except LIBRARY_ERRORS as error:
        raise PhoenixError(
            f"model: no causal language model can be built from its config.json ({first_line(error)})"
        ) from error


def load_model(directory: Path, dtype: Dtype = "auto", device: Device = "auto") -> Any:
    """Load a causal language model for computing with, in one dtype.

    `auto` takes the dtype that config.json names (float32 where it names none), except float16, which can't hold the
    gradients of training: it becomes bfloat16 on a GPU and float32 on a CPU.

    Raises:
        PhoenixError: there is no such directory, a file is damaged, its index names one elsewhere, weights are missing
            or of the wrong shape, or a weight is not finite.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    directory, place = Path(directory), find_device(device)
    if not directory.is_dir():  # which transformers would look for on the hub
        raise PhoenixError(f"model: {directory} is not a directory; give a Hugging Face model directory")
    config = load_config(directory)
    if (directory / INDEX).is_file():
        weight_files(directory)  # which refuses files outside the directory
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            directory,
            config=config,
            dtype=choose_dtype(config, dtype, place),
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # which are told below, by name
        )
    except (*LIBRARY_ERRORS, SafetensorError) as error:
        raise PhoenixError(f"{directory}: the weights can't be loaded ({first_line(error)})") from error
    model, info = loaded
    if info.get("missing_keys"):
        missing = sorted(str(key) for key in info["missing_keys"])
        raise PhoenixError(f"{directory}: {len(missing)} missing keys, {missing[0]} first; the file is not whole")
    if info.get("mismatched_keys"):
        name, stored, expected = min(info["mismatched_keys"])
        raise PhoenixError(
            f"{directory}: {name} is {tuple(stored)} in the file and {tuple(expected)} by config.json, and so are "
            f"{len(info['mismatched_keys']) - 1} others; is it this model's configuration?"
        )
    beyond = [key for key in info.get("unexpected_keys", ()) if _is_block_weight(key, model)]
    if beyond:
        raise PhoenixError(
            f"{directory}: config.json has no place for {len(beyond)} weights of the file, {min(beyond)} first; "
            "is it this model's configuration?"
        )
    check_finite(model, directory)
    return model.to(place).eval()


def require_shapes(empty: nn.Module, directory: Path) -> None:
    """Refuse weights of other shapes than config.json says, from the heads of their files alone."""
    expected = {name: tuple(part.shape) for name, part in empty.named_parameters()}
    for name, stored in Checkpoint(directory).shapes.items():
        if name in expected and expected[name] != stored:
            raise PhoenixError(
                f"{directory}: {name} is {stored} in the file and {expected[name]} by config.json; is it this model's "
                "configuration?"
            )


def _is_block_weight(key: str, model: nn.Module) -> bool:
    """Whether a name is that of a decoder block's weight (old files also hold buffers that nobody needs)."""
    blocks = next(iter(decoder_blocks(model))).rsplit(".", 1)[0]
    return key.startswith(f"{blocks}.") and key.endswith(".weight")


def choose_dtype(config: Any, dtype: Dtype, device: torch.device) -> torch.dtype:
    """The dtype to compute in, as `load_model` says."""
    if dtype != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[dtype]
    stored = getattr(config, "dtype", None) or torch.float32
    if stored == torch.float16:
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return stored


def check_finite(model: nn.Module, where: Path | str) -> None:
    """Refuse a model with a weight that is NaN or infinite, by the weight's name."""
    for name, parameter in model.named_parameters():
        check_finite_tensor(parameter, name, where)


def load_tokenizer(directory: Path) -> Any:
    """Load a tokenizer that can pad (with its end token, where it has no padding token of its own)."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    except LIBRARY_ERRORS as error:
        there = any((directory / name).is_file() for name in TOKENIZERS)
        why = first_line(error) if there else "none of its files is there"
        raise PhoenixError(
            f"{directory}: the tokenizer can't be loaded ({why}); put that of the model which this came from there"
        ) from error
    if tokenizer.eos_token_id is None:
        raise PhoenixError(f"{directory}: the tokenizer has no end-of-text token, which completions need")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def fit_tokenizer(model: Any, tokenizer: Any, where: Path | str) -> None:
    """Make a tokenizer pad with a token that the model has an embedding for; its end token needs one in any case.

    Padding tokens are often added to a tokenizer alone. They are masked everywhere, so the end token does as well.
    """
    rows = model.get_input_embeddings().weight.shape[0]
    if tokenizer.eos_token_id >= rows:
        raise PhoenixError(
            f"{where}: the tokenizer's end token is number {tokenizer.eos_token_id} and the model has embeddings for "
            f"{rows} tokens; is it this model's tokenizer?"
        )
    if tokenizer.pad_token_id >= rows:
        tokenizer.pad_token = tokenizer.eos_token


def save_model(model: Any, tokenizer: Any, directory: Path) -> None:
    """Write an ordinary Hugging Face directory, whole or not at all."""
    with atomic_path(directory) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)


def decoder_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """Name the decoder blocks in order, `model.layers.0` and so on (OPT: `model.decoder.layers.0`).

    Raises:
        PhoenixError: the model has no list of blocks as long as its configuration says.
    """
    if not isinstance(model, nn.Module):
        raise PhoenixError(
            f"{type(model).__name__} given in the place of a model; give one that load_model or transformers has loaded"
        )
    count = getattr(getattr(model, "config", None), "num_hidden_layers", None)
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return {f"{name}.{index}": block for index, block in enumerate(module)}
    if count is None:
        raise PhoenixError(
            f"{type(model).__name__} has no configuration with num_hidden_layers; give a causal language model of "
            "transformers"
        )
    raise PhoenixError(
        f"{type(model).__name__} has no list of {count} decoder blocks; Llama-like and OPT models have one"
    )


def linears(module: nn.Module, prefix: str = "") -> dict[str, nn.Linear]:
    """The linear layers inside a module by their full names."""
    start = f"{prefix}." if prefix else ""
    return {start + name: child for name, child in module.named_modules() if isinstance(child, nn.Linear)}


def prunable_linears(model: nn.Module) -> dict[str, nn.Linear]:
    """The linears that Phoenix prunes and adapts: those inside decoder blocks. Embeddings and lm_head stay dense.

    Raises:
        PhoenixError: the blocks hold none (GPT-2, for one, has its own kind of layer).
    """
    found: dict[str, nn.Linear] = {}
    for name, block in decoder_blocks(model).items():
        found |= linears(block, name)
    if not found:
        raise PhoenixError(
            f"{type(model).__name__} has no nn.Linear inside its decoder blocks; nothing could be pruned"
        )
    return found
