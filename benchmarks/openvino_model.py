"""A language model in OpenVINO on the CPU, decoding as `Decoder` does: an export of optimum-intel, in bfloat16.

Needs `pip install openvino`; `optimum-intel[openvino]`, which exports, may live in an environment of its own.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from phoenix_sparse.errors import PhoenixError
from phoenix_sparse.runtime.decoding import Choose

FILE = "openvino_model.xml"
BYTES = ("i8", "u8")  # weights that are no longer bfloat16's


class InOpenVINO:
    """A stateful export, compiled for a number of threads.

    Attributes:
        weights: the type of the largest constants: bf16, or i8 and the like where the export has them so.
        cache: the type of keys and values.
    """

    def __init__(self, core: Any, directory: Path, threads: int, cache: str) -> None:
        """Compile it; `cache` is a type, or `default` for what the export or else OpenVINO says.

        Raises:
            PhoenixError: a linear of it would not be computed in bfloat16.
        """
        model = core.read_model(directory / FILE)
        _only_last_logits(model)
        asked = {"INFERENCE_PRECISION_HINT": "bf16", "PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": 1}
        asked |= {"INFERENCE_NUM_THREADS": threads} | ({} if cache == "default" else {"KV_CACHE_PRECISION": cache})
        compiled = core.compile_model(model, "CPU", asked)
        self.cache = compiled.get_property("KV_CACHE_PRECISION").to_string()
        self.weights = _check_precision(compiled, model, directory)
        self.request = compiled.create_infer_request()
        self.count, self.last = 0, torch.zeros(1, dtype=torch.int64)

    def _put(self, ids: Tensor, choose: Choose | None) -> Tensor:
        count = ids.shape[1]
        self.request.infer(
            {
                "input_ids": ids.numpy(),
                "attention_mask": np.ones((1, self.count + count), np.int64),
                "position_ids": np.arange(self.count, self.count + count)[None],
                "beam_idx": np.zeros(1, np.int32),
            },
            share_inputs=True,
        )
        logits = torch.from_numpy(self.request.get_output_tensor(0).data)[:, -1]
        self.count += count
        self.last = logits.argmax(-1) if choose is None else choose(logits)
        return logits

    def prefill(self, ids: Tensor, choose: Choose | None = None) -> Tensor:
        self.request.reset_state()
        self.count = 0
        return self._put(ids, choose)

    def advance(self, steps: int, choose: Choose | None = None) -> None:
        for _ in range(steps):
            self._put(self.last[:, None], choose)


def _only_last_logits(model: Any) -> None:
    """Leave out the logits of all positions but the last, as OpenVINO's own generation library does."""
    from openvino import opset13

    node = model.output("logits").get_node()
    while node.get_type_name() != "MatMul":
        node = node.input_value(0).get_node()
    bounds = [opset13.constant([number], dtype=np.int64) for number in (-1, np.iinfo(np.int64).max, 1, 1)]
    node.input(0).replace_source_output(opset13.slice(node.input_value(0), *bounds).output(0))
    model.validate_nodes_and_infer_types()


def _check_precision(compiled: Any, model: Any, directory: Path) -> str:
    linears = [op for op in compiled.get_runtime_model().get_ops() if _says(op, "layerType") == "FullyConnected"]
    others = sorted({_says(op, "runtimePrecision") for op in linears} - {"bf16"})
    if not linears or others:
        raise PhoenixError(
            f"{directory}: OpenVINO computes linears in {', '.join(others) or 'no way it tells of'}, not bf16"
        )
    constants = [op for op in model.get_ops() if op.get_type_name() == "Constant"]
    largest = max(constants, key=lambda op: int(np.prod(list(op.get_output_shape(0)))))
    stored = str(largest.get_element_type().to_string())
    return stored if stored in BYTES else "bf16"


def _says(op: Any, key: str) -> str:
    return str(op.get_rt_info()[key].astype(str))


def openvino_version(directories: Sequence[Path]) -> str:
    """OpenVINO's version; looked for, as its exports are, before anything takes long.

    Raises:
        PhoenixError: it isn't installed, or a directory is no export.
    """
    try:
        import openvino
    except ImportError:
        raise PhoenixError("--openvino: there is no openvino here; pip install openvino") from None
    for directory in directories:
        if not (directory / FILE).is_file():
            raise PhoenixError(f"--openvino: {directory} has no {FILE}; export the model as this script says")
    return str(openvino.__version__).partition("-")[0]


def in_openvino(directories: Sequence[Path], threads: int, caches: Sequence[str]) -> dict[str, InOpenVINO]:
    """Each export with each type of keys and values.

    Raises:
        PhoenixError: two would have one name, or see `InOpenVINO`.
    """
    if not directories:
        return {}
    import openvino

    core, variants = openvino.Core(), {}
    for directory in directories:
        for cache in caches:
            one = InOpenVINO(core, directory, threads, cache)
            name = f"OpenVINO {one.weights}, cache {one.cache}"
            if name in variants:
                raise PhoenixError(f"--openvino: {directory} with --cache {cache} is {name}, which is there already")
            variants[name] = one
    return variants
