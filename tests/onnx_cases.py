"""Exports a model to ONNX and runs the file beside it: what tests/test_onnx*.py share."""

import pytest
import torch
from torch import nn
from torch.export import Dim

import pyseg

pytest.importorskip("onnxscript")
onnxruntime = pytest.importorskip("onnxruntime")


class Call(nn.Module):
    """A function as a module."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *args):
        return self.function(*args)


def flat(results):
    return [results] if isinstance(results, torch.Tensor) else list(results)


def onnx_session(program):
    """A session on an ONNX program that holds nothing but standard operators."""
    proto = program.model_proto
    assert {node.domain for node in proto.graph.node} | {o.domain for o in proto.opset_import} <= {"", "ai.onnx"}
    assert not proto.functions
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])


def run_session(session, arguments):
    names = [each.name for each in session.get_inputs()]
    tensors = [x for each in arguments for x in (each if isinstance(each, list) else [each])]
    return [
        torch.from_numpy(x) for x in session.run(None, dict(zip(names, map(torch.Tensor.numpy, tensors), strict=True)))
    ]


def check(model, examples, dynamic_shapes=None, tolerance=1e-5, aten=False, compare=None, optimize=False):
    """Runs a model, its program of ATen operators and its ONNX file on examples, and compares.

    Most programs of ATen operators alone are what the ONNX file is made from: only some are run by themselves. Neither
    does onnxscript's optimiser, which takes half the time, see all of them: it sees one case of each family at least.
    """
    compare = compare or (lambda got, expected: torch.testing.assert_close(got, expected, rtol=1e-4, atol=tolerance))
    with torch.no_grad():
        expected = [flat(model(*arguments)) for arguments in examples]
        program = torch.export.export(model, examples[0], dynamic_shapes=dynamic_shapes, strict=False)
        assert any("pyseg" in str(node.target) for node in program.graph.nodes)
        if aten:
            decomposed = program.run_decompositions(pyseg.export.decompositions())
            assert not any("pyseg" in str(node.target) for node in decomposed.graph.nodes)
            module = decomposed.module()
            for arguments, results in zip(examples, expected, strict=True):
                for got, want in zip(flat(module(*arguments)), results, strict=True):
                    compare(got, want)
        session = onnx_session(pyseg.export_onnx(program, optimize=optimize))
        for arguments, results in zip(examples, expected, strict=True):
            for got, want in zip(run_session(session, arguments), results, strict=True):
                assert got.dtype == want.dtype
                compare(got, want)
    return session


def rand(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def maps(*names):
    """Dynamic sizes of an input [n, C, h, w]."""
    return {i: Dim(name, min=4 * (i > 0), max=4096) for i, name in zip((0, 2, 3), names, strict=True)}
