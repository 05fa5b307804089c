"""A Hugging Face configuration as the converter of ModelZoo reads it, and what it writes, put right."""

from typing import Any

from pydantic import Field

from phoenix_sparse.errors import PhoenixError
from phoenix_sparse.settings import Settings

MODELS = ("llama", "mistral", "mixtral")
ROPES = ("default", "linear", "llama3")
# The converter writes these, and ModelZoo's own models refuse them.
FAULTY = ("norm_first", "use_ff_layer1_dropout")


class Shape(Settings):
    """What must be known of a model to lay its weights out."""

    kind: str
    layers: int = Field(ge=1)
    heads: int = Field(ge=1)
    key_heads: int = Field(ge=1)
    vocabulary: int = Field(ge=1)
    positions: int = Field(ge=1)


def shape_of(config: dict[str, Any], where: str) -> Shape:
    """Read the shape from a config.json, and refuse what the converter would get wrong without a word.

    Raises:
        PhoenixError: another kind of model, or one with biases, with heads of their own size or with an unknown rope.
    """
    kind = config.get("model_type")
    if kind not in MODELS:
        raise PhoenixError(f"cerebras: {where} is of type {kind}; {', '.join(MODELS)} can be exported")
    heads = config["num_attention_heads"]
    size = config.get("head_dim") or config["hidden_size"] // heads
    if size * heads != config["hidden_size"]:
        raise PhoenixError(
            f"cerebras: {where} has {heads} heads of {size} for a hidden size of {config['hidden_size']}; ModelZoo's "
            "converter takes them for heads of hidden size / heads"
        )
    if config.get("attention_bias") or config.get("mlp_bias"):
        raise PhoenixError(f"cerebras: {where} has biases, which ModelZoo's converter passes over")
    if config.get("hidden_act", "silu") != "silu":
        raise PhoenixError(f"cerebras: {where} has the activation {config['hidden_act']}; silu is known here")
    _rope(config, where)
    return Shape(
        kind=kind,
        layers=config["num_hidden_layers"],
        heads=heads,
        key_heads=config.get("num_key_value_heads") or heads,
        vocabulary=config["vocab_size"],
        positions=config["max_position_embeddings"],
    )


def conversion_config(config: dict[str, Any], where: str) -> dict[str, Any]:
    """The configuration with rope_theta and rope_scaling where transformers 4 had them.

    transformers 5 keeps both in `rope_parameters`, which the converter passes over: the model would be trained with
    another rope than it was made with.
    """
    result = {key: value for key, value in config.items() if key not in ("rope_parameters", "quantization_config")}
    theta, scaling = _rope(config, where)
    result |= {"rope_theta": theta, "rope_scaling": scaling}
    if "dtype" in result:
        result["torch_dtype"] = result.pop("dtype")
    return result


def _rope(config: dict[str, Any], where: str) -> tuple[float, dict[str, Any] | None]:
    """The base frequency and the scaling of the rope (None for none)."""
    given = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    theta = given.pop("rope_theta", None) or config.get("rope_theta") or 10000.0
    kind = given.get("rope_type") or given.get("type") or "default"
    if kind not in ROPES or "full_attention" in given:
        raise PhoenixError(f"cerebras: {where} has a rope of type {kind}; {', '.join(ROPES)} can be exported")
    return float(theta), (None if kind == "default" else {**given, "rope_type": kind})


def model_block(emitted: dict[str, Any]) -> dict[str, Any]:
    """The `model` section of a training YAML from what the converter wrote.

    Without `moe_implementation: optimized` a Mixtral's experts have other names than the converted ones, and stay
    random.
    """
    block = {key: value for key, value in emitted["model"].items() if key not in FAULTY}
    if "moe" in block:
        block["moe"] = {**block["moe"], "moe_implementation": "optimized"}
    return {**block, "loss_scaling": "num_tokens", "loss_weight": 1.0}
