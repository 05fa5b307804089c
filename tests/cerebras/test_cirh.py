"""Reading the compiler's annotations."""

from phoenix_sparse.cerebras.cirh import annotations, compared

TEXT = """
func.func @main(
 %a: tensor<4x4xf32> {cs.max_sparsity = 0.6 : f32, cs.sparsity = 0.600000024 : f32, tf.aliasing_output = 2 : i64,
 tf.resource_name = "state.model.model.layers.0.q.weight"},
 %b: tensor<4x4xf32> {tf.resource_name = "state.model.model.layers.0.k.weight"},
 %c: tensor<4x4xf32> {cs.sparsity = 5.000000e-01 : f32, tf.resource_name = "state.model.layers.0.v.weight"},
 %d: tensor<4xf32> {tf.resource_name = "state.optimizer.x", cs.sparsity = 0.5 : f32})
 -> (tensor<4x4xf32> {tf.resource_name = "state.model.model.layers.0.q.weight"})
"""


def test_every_argument_of_the_model_is_seen():
    assert annotations(TEXT) == {"layers.0.q.weight": 0.600000024, "layers.0.k.weight": None, "layers.0.v.weight": 0.5}


def test_missing_and_wrong_are_told_apart():
    wanted = {"layers.0.q.weight": 0.6, "layers.0.k.weight": 0.5, "layers.0.v.weight": 0.51, "layers.9.o.weight": 0.5}
    found = compared(annotations(TEXT), wanted)
    verdicts = [weight["verdict"] for weight in found["weights"].values()]
    assert verdicts == ["right", "missing", "wrong", "missing"]
    assert (found["right"], found["valid"]) == (1, False)
    assert compared(annotations(TEXT), {"layers.0.q.weight": 0.6})["valid"]
    assert not compared({}, {})["valid"]
