"""Every kernel of a layer against float64: every rank, popularity and dtype, sizes that fill no tile."""

import pytest
import torch

from kernels.gpu.few_rows_linear import few_rows_linear
from kernels.reference import gated_linear, linear
from tests.kernels.cases import CUDA, DTYPES, TOLERANCE, assert_shrunk, randn, relative_error, worst_row_error
from tests.kernels.layer_case import Layer, LayerShape, mixes

SHAPES = [LayerShape(200, 3, 1, 64, 136, False), LayerShape(90, 2, 1, 96, 75, True)]
if CUDA:  # several splits of a shrink, heads of every size
    SHAPES += [LayerShape(1100, 5, 1, 128, 601, True), LayerShape(4104, 2, 2, 256, 1090, False)]
# Short segments of 8 rows, of 16, and long ones of 64 or, beside answers, none: see launch.block_rows and long_rows.
STEPS = [(37, True), (97, True), (557, False), (557, True)] if CUDA else [(21, True), (261, True), (517, False)]


@pytest.mark.parametrize(("num_rows", "has_answers"), STEPS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_mix(shape: LayerShape, dtype: torch.dtype, num_rows: int, has_answers: bool) -> None:
    """Twice the same bits, and rows without an adapter those of the base model."""
    layer = Layer(shape, num_rows, dtype, has_answers)
    base = layer.run(None)
    for i, (name, mix) in enumerate(mixes(num_rows).items()):
        if not CUDA and (i % 4 or num_rows > 64) and name != "zipf":
            continue  # the interpreter takes its time
        layer.set_mix(mix)
        works = layer.work_lists(changes=i % 2 == 0)
        outs, again = layer.run(works), layer.run(works)
        for op, expected in layer.expected().items():
            assert torch.equal(outs[op], again[op]), (name, op)
            assert torch.equal(outs[op][layer.base_rows], base[op][layer.base_rows]), (name, op)
            assert relative_error(outs[op], expected) <= TOLERANCE[dtype], (name, op)
            assert worst_row_error(outs[op], expected) <= 4 * TOLERANCE[dtype], (name, op)
        for work in works.values():
            assert not any(table.semaphores.any() for table in work.tables), name


@pytest.mark.parametrize(("num_rows", "has_answers"), STEPS[2:])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shrink_buffers(shape: LayerShape, dtype: torch.dtype, num_rows: int, has_answers: bool) -> None:
    layer = Layer(shape, num_rows, dtype, has_answers)
    layer.set_mix(mixes(num_rows)["zipf"])
    for name, s in layer.shrink(layer.work_lists()).items():
        assert_shrunk(layer.cases[name], layer.x[name], s)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_base_linears(shape: LayerShape, dtype: torch.dtype) -> None:
    """Of few rows; gate and up with their SiLU folded in."""
    k, n = shape.hidden, (shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim
    x, weight = randn(1, 37, k, dtype=dtype), randn(2, n, k, dtype=dtype) * k**-0.5
    gate_up = randn(3, 2 * shape.intermediate, k, dtype=dtype) * k**-0.5
    for is_gated, w, twin in ((False, weight, linear), (True, gate_up, gated_linear)):
        y = few_rows_linear(x, w, is_gated=is_gated)
        expected = twin(x.double(), w.double())
        assert relative_error(y, expected) <= (1 + is_gated) * TOLERANCE[dtype]
        assert worst_row_error(y, expected) <= 8 * TOLERANCE[dtype]
        assert torch.equal(y, few_rows_linear(x, w, is_gated=is_gated))
