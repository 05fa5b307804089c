"""Model directories to packed ones and back, one file of weights at a time."""

import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from phoenix_sparse.checkpoint import INDEX, check_finite_tensor, reading, weight_files
from phoenix_sparse.errors import PhoenixError
from phoenix_sparse.files import atomic_path, read_json
from phoenix_sparse.models import empty_model, load_config, prunable_linears
from phoenix_sparse.progress import Progress
from phoenix_sparse.runtime.packed import Packed, check, negative_zeros, pack, quantize, unpack

METHOD = "phoenix_sparse"
VERSION = 1
NEGATIVE = 0.01  # share of a layer's weights above which its negative zeros are a mask's
FLOATS = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}  # as config.json names them, and as files do
PARTS = ("shape", "bitmask", "compressed", "row_offsets", "scales")
Values = Literal["auto", "bf16", "int8"]

Tensors = dict[str, Tensor]


def check_values(text: str) -> Values:
    """One of `Values`, or a PhoenixError."""
    if text not in get_args(Values):
        raise PhoenixError(f"--values: {text!r} is none of {', '.join(get_args(Values))}")
    return text  # type: ignore[return-value]


def pack_model(source: Path, out: Path, *, values: Values = "auto", progress: Progress | None = None) -> dict[str, Any]:
    """Write a packed copy of a model directory.

    Linears inside decoder blocks are packed where that is smaller; all else is copied. A packed linear keeps an empty
    `weight`, on which every loader that doesn't know the format stops with a mismatch of shapes.

    Args:
        source: a Hugging Face directory with safetensors weights.
        out: the directory to write; replaced as a whole if it exists.
        values: of the kept weights: as stored, rounded to bfloat16, or to int8 with a scale a row.
        progress: called with (what, done, all) after each file.

    Returns:
        `layers` packed, `weights` and `nnz` in them, `dense_bytes` and `packed_bytes` of all files,
        `bytes_per_weight` of the packed linears, and `negative_zeros` that became zeros: a mask applied by
        multiplication leaves them by the million, each as dear as a value. A layer's few others are kept.

    Raises:
        PhoenixError: the model can't be read, its files name the linears otherwise than the model does, or no linear is
            smaller packed.
    """
    config = load_config(source)
    names = {f"{name}.weight" for name in prunable_linears(empty_model(config))}
    listed: dict[str, dict[str, Any]] = {}
    packed_bytes = negative = 0

    def convert(name: str, value: Tensor) -> Tensors:
        nonlocal packed_bytes, negative
        check_finite_tensor(value, name, source)
        if name not in names:
            return {name: value}
        count = negative_zeros(value)
        if count > NEGATIVE * value.numel():
            value, negative = value + 0.0, negative + count  # -0.0 + 0.0 is 0.0
        one = pack(value.bfloat16() if values == "bf16" else value)
        one = quantize(one) if values == "int8" else one
        layer, parts = name.removesuffix(".weight"), one.tensors()
        size = sum(part.nbytes for part in parts.values())
        if size >= value.nbytes:
            listed[layer] = {}
            return {name: value}
        packed_bytes += size
        listed[layer] = {"shape": list(one.shape), "nnz": one.nnz, "values": str(one.compressed.dtype)[6:]}
        marker = torch.zeros(0, dtype=value.dtype)
        return {f"{layer}.{part}": tensor for part, tensor in parts.items()} | {name: marker}

    with atomic_path(out) as temporary:
        sizes = _rewrite(source, temporary, convert, progress)
        missing = sorted(names - {f"{layer}.weight" for layer in listed})
        if missing:
            raise PhoenixError(
                f"{source}: its files have no {missing[0]} ({len(missing)} linears missing); load it with transformers "
                "and save it again, which gives the names of today"
            )
        layers = {layer: facts for layer, facts in listed.items() if facts}
        if not layers:
            raise PhoenixError(f"{source}: no linear of it has zeros enough to be smaller packed; give a pruned model")
        content = read_json(temporary / "config.json")
        content["quantization_config"] = {"quant_method": METHOD, "version": VERSION, "layers": layers}
        _write(temporary / "config.json", content)
    weights = sum(facts["shape"][0] * facts["shape"][1] for facts in layers.values())
    return {
        "layers": len(layers),
        "weights": weights,
        "nnz": sum(facts["nnz"] for facts in layers.values()),
        "dense_bytes": sizes[0],
        "packed_bytes": sizes[1],
        "negative_zeros": negative,
        "bytes_per_weight": packed_bytes / weights,
    }


def unpack_model(source: Path, out: Path, *, progress: Progress | None = None) -> None:
    """Write the dense directory of a packed one: bit for bit that which was packed, int8 values scaled.

    Raises:
        PhoenixError: the directory isn't packed, is of another version, or is damaged.
    """
    config = read_config(source)
    layers: dict[str, Any] = config["quantization_config"]["layers"]
    check_heads(layers, weight_files(source), str(source))
    parts: dict[str, Tensors] = {}

    def convert(name: str, value: Tensor) -> Tensors:
        layer, _, part = name.rpartition(".")
        if layer not in layers or part not in (*PARTS, "weight"):
            return {name: value}
        found = parts.setdefault(layer, {})
        found[part] = value
        if not found.keys() >= forms(layers[layer]).keys():
            return {}
        dtype = found["weight"].dtype
        return {f"{layer}.weight": unpack(assemble(layer, parts.pop(layer), layers[layer]), dtype)}

    with atomic_path(out) as temporary:
        _rewrite(source, temporary, convert, progress)
        if parts:
            raise PhoenixError(f"{source}: {next(iter(parts))} lacks some of {', '.join(PARTS[:4])}; pack it again")
        del config["quantization_config"]
        _write(temporary / "config.json", config)


def forms(facts: dict[str, Any]) -> dict[str, tuple[tuple[str, ...], tuple[int, ...]]]:
    """The parts that files have of a layer with such an entry in config.json: dtypes as files name them, and shape."""
    (out, inner), values = facts["shape"], facts["values"]
    found: dict[str, tuple[tuple[str, ...], tuple[int, ...]]] = {
        "weight": (("F64", *FLOATS.values()), (0,)),
        "shape": (("I64",), (2,)),
        "bitmask": (("U8",), (out, (inner + 7) // 8)),
        "compressed": ((FLOATS.get(values, "I8"),), (facts["nnz"],)),
        "row_offsets": (("I64",), (out + 1,)),
    }
    return found | ({"scales": (("BF16", "F32"), (out,))} if values == "int8" else {})


def check_heads(layers: dict[str, dict[str, Any]], files: Iterable[Path], where: str) -> None:
    """Refuse files that hold packed layers otherwise than config.json says, from their heads alone.

    Loaders would convert values of another dtype, and make up what isn't there.

    Args:
        layers: of the `quantization_config`, checked (`check_entry`).
        files: all files of weights.
        where: what a message begins with.

    Raises:
        PhoenixError: naming the tensor that is missing, of another shape or dtype, or of a layer that isn't packed.
    """
    found: dict[str, tuple[str, tuple[int, ...]]] = {}
    for file in files:
        with reading(file) as reader:
            for name in reader.keys():  # noqa: SIM118 (a reader is no mapping)
                part = reader.get_slice(name)
                found[name] = part.get_dtype(), tuple(part.get_shape())
    for layer, facts in layers.items():
        expected = forms(facts)
        for part, (dtypes, shape) in expected.items():
            name = f"{layer}.{part}"
            if name not in found:
                raise PhoenixError(f"{where}: its files have no {name}; pack the model again")
            dtype, stored = found[name]
            if dtype not in dtypes or stored != shape:
                raise PhoenixError(
                    f"{where}: {name} is {dtype} {stored} in its file and {dtypes[-1]} {shape} by config.json; "
                    "pack the model again"
                )
        if "scales" not in expected and f"{layer}.scales" in found:
            raise PhoenixError(f"{where}: {layer}.scales are for int8 values, and it has none; pack the model again")
    for name in sorted(found):
        layer, _, last = name.rpartition(".")
        if last in ("bitmask", "compressed", "row_offsets") and layer not in layers:
            raise PhoenixError(
                f"{where}: config.json doesn't say that {layer} is packed, and its files do; pack it again"
            )


def assemble(layer: str, parts: Tensors, facts: dict[str, Any]) -> Packed:
    """A checked matrix from its stored parts.

    Raises:
        PhoenixError: parts are missing, or contradict each other or what config.json says of the layer.
    """
    missing = [part for part in PARTS[:4] if part not in parts]
    if missing:
        raise PhoenixError(f"{layer}: has no {missing[0]}; pack the model again")
    stored, said = parts["shape"], tuple(facts["shape"])
    if stored.dtype != torch.int64 or tuple(stored.shape) != (2,) or tuple(stored.tolist()) != said:
        raise PhoenixError(f"{layer}: its stored shape is not the {said} of config.json; pack the model again")
    one = Packed(said, parts["bitmask"], parts["compressed"], parts["row_offsets"], parts.get("scales"))
    check(one, layer)
    return one


def read_config(directory: Path) -> dict[str, Any]:
    """The config.json of a packed directory, with its entry checked.

    Raises:
        PhoenixError: it isn't packed, or by another version, or its entry is damaged.
    """
    config = read_json(directory / "config.json")
    entry = config.get("quantization_config") if isinstance(config, dict) else None
    if not isinstance(entry, dict) or entry.get("quant_method") != METHOD:
        raise PhoenixError(f"{directory}: not a packed model; `phx pack` makes one")
    check_entry(entry, str(directory))
    return config


def check_entry(entry: dict[str, Any], where: str) -> None:
    """Refuse a quantization_config of another version, or one that doesn't describe packed layers."""
    if type(entry.get("version")) is not int or entry["version"] != VERSION:
        raise PhoenixError(
            f"{where}: packed by version {entry.get('version')!r} of the format; this reads {VERSION}: pack it again"
        )
    layers = entry.get("layers")
    if not isinstance(layers, dict) or not all(_is_layer(facts) for facts in layers.values()):
        raise PhoenixError(f"{where}: the quantization_config of config.json is damaged; pack the model again")


def _is_layer(facts: Any) -> bool:
    if not isinstance(facts, dict):
        return False
    shape, nnz = facts.get("shape"), facts.get("nnz")
    return (
        isinstance(shape, list)
        and len(shape) == 2
        and all(type(size) is int and 0 < size < 2**31 for size in shape)
        and type(nnz) is int
        and 0 <= nnz <= shape[0] * shape[1]
        and facts.get("values") in (*FLOATS, "int8")
    )


def _rewrite(
    source: Path, target: Path, convert: Callable[[str, Tensor], Tensors], progress: Progress | None
) -> tuple[int, int]:
    """Copy a model directory with its tensors converted, file by file under the same names; bytes before and after."""
    from safetensors.torch import save_file

    target.mkdir()
    weights, index = weight_files(source), dict[str, str]()
    sizes = [0, 0]
    for number, file in enumerate(weights):
        tensors: Tensors = {}
        with reading(file) as reader:
            metadata = reader.metadata()
            for name in reader.keys():  # noqa: SIM118 (a reader is no mapping)
                tensors |= convert(name, reader.get_tensor(name))
        save_file({name: value.contiguous() for name, value in tensors.items()}, target / file.name, metadata=metadata)
        index |= dict.fromkeys(tensors, file.name)
        sizes[0] += file.stat().st_size
        sizes[1] += (target / file.name).stat().st_size
        if progress is not None:
            progress("file of weights", number + 1, len(weights))
    for file in source.iterdir():
        if file.is_file() and file not in weights and file.name != INDEX and not file.name.endswith(".safetensors"):
            shutil.copyfile(file, target / file.name)
    if (source / INDEX).is_file():
        old = read_json(source / INDEX)
        content = old | {"weight_map": dict(sorted(index.items()))}
        _write(target / INDEX, content)
    return sizes[0], sizes[1]


def _write(path: Path, content: dict[str, Any]) -> None:
    """JSON as transformers writes it, so that unpacking gives the same bytes again."""
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
