"""The two graphs of a decoder that reads an encoder, in one file with one copy of the weights.

transformers.js and optimum know it as `decoder_model_merged.onnx`: the input `use_cache_branch` says which of the two runs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import onnx_ir as ir


def joined(first: ir.Model, later: ir.Model) -> ir.Model:
    """One model of both; `first` makes the keys and values of the encoder's tokens, `later` is given them."""
    inputs = _inputs(first, later)
    outputs = [ir.Value(name=value.name, shape=value.shape, type=value.type) for value in first.graph.outputs]
    weights: dict[str, ir.Value] = {}
    no, yes = (_branch(model, inputs, weights, name) for model, name in ((first, "first"), (later, "later")))
    _add_passed_on(yes, inputs, [str(value.name) for value in outputs])
    node = ir.Node(
        "",
        "If",
        [inputs["use_cache_branch"]],
        [ir.AttrGraph("then_branch", yes), ir.AttrGraph("else_branch", no)],
        outputs=outputs,
    )
    graph = ir.Graph(
        list(inputs.values()),
        outputs,
        nodes=[node],
        initializers=list(weights.values()),
        opset_imports=first.graph.opset_imports,
        name="main_graph",
    )
    functions = [*first.functions.values(), *(item for key, item in later.functions.items() if key not in first.functions)]
    return ir.Model(graph, ir_version=first.ir_version, functions=functions)


def _inputs(first: ir.Model, later: ir.Model) -> dict[str, ir.Value]:
    """Those of both, each once, and the one that chooses."""
    found = {str(value.name): value for model in (later, first) for value in model.graph.inputs}
    flag = ir.Value(name="use_cache_branch", shape=ir.Shape([1]), type=ir.TensorType(ir.DataType.BOOL))
    return {name: ir.Value(name=name, shape=value.shape, type=value.type) for name, value in found.items()} | {
        "use_cache_branch": flag
    }


def _branch(model: ir.Model, inputs: dict[str, ir.Value], weights: dict[str, ir.Value], name: str) -> ir.Graph:
    """A model's graph as a branch: inputs and weights come from around it, all other names are its own."""
    old = model.graph
    for value in list(old.inputs):
        ir.convenience.replace_all_uses_with(value, inputs[str(value.name)])
    for value in list(old.initializers.values()):
        ir.convenience.replace_all_uses_with(value, _shared(value, weights))
    nodes = list(old)
    for value in _values(nodes):
        if value.name:
            value.name = f"{name}.{value.name}"
    outputs = list(old.outputs)
    old.outputs.clear()
    old.remove(nodes)
    return ir.Graph([], outputs, nodes=nodes, name=name)


def _values(nodes: Iterable[ir.Node]) -> list[ir.Value]:
    return [value for node in nodes for value in node.outputs]


def _shared(value: ir.Value, weights: dict[str, ir.Value]) -> ir.Value:
    """The one value of both graphs that holds these numbers."""
    tensor = value.const_value
    assert tensor is not None
    digest = hashlib.sha256(tensor.tobytes()).hexdigest()
    key = f"{tensor.dtype}{tensor.shape}{digest}"
    if key not in weights:
        name = str(value.name)
        taken = {known.name for known in weights.values()}
        weights[key] = ir.Value(
            name=name if name not in taken else f"{name}.later", shape=value.shape, type=value.type, const_value=tensor
        )
        tensor.name = weights[key].name
    return weights[key]


def _add_passed_on(branch: ir.Graph, inputs: dict[str, ir.Value], names: list[str]) -> None:
    """Give a branch those outputs that it does not change, in the order of all: what went in comes out."""
    made = {str(value.name).partition(".")[2]: value for value in branch.outputs}
    branch.outputs.clear()
    for name in names:
        if name not in made:
            node = ir.node("Identity", [inputs[name.replace("present", "past_key_values")]])
            node.outputs[0].name = f"later.{name}"
            branch.append(node)
            made[name] = node.outputs[0]
        branch.outputs.append(made[name])
