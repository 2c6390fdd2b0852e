"""How many values per token our decoder keeps for the backward, from a description and the widths of the linear layers.

Of a layer, in the order of its forward (`train.nn.decoder`):

    the input of a norm                         so that its backward computes the rest again
    q, k, v                                     once: rotated, or as they came where a norm has to be computed again
    attention's result                          which the output projection reads too
    a branch's result, where a norm is behind   the input of that norm
    gate and up, or the one before the activation
    what linear layers read, if one of them learns

Llama-2-7B, 4,096 hidden and 11,008 MLP features: two norms' inputs, q k v, attention's result, what q k v and gate up read are
8 * 4,096; gate, up and what down reads are 3 * 11,008; together 65,792 values per layer.
"""

from __future__ import annotations

from collections.abc import Mapping

from train.nn.description import DecoderDescription, LayerDescription, MlpDescription
from train.sizing import Activations

Shapes = Mapping[str, tuple[int, int]]
Input = tuple[frozenset[str], int]


def activations(description: DecoderDescription, layers: str, shapes: Shapes, hidden: int) -> Activations:
    """What `description`'s decoder keeps.

    Args:
        layers: the name of the list of layers, ``model.layers``.
        shapes: (out, in) features of every linear layer, by its full name.
        hidden: features of the residual stream.
    """
    kept = 0
    inputs: list[Input] = []
    for index, layer in enumerate(description.layers):
        prefix = f"{layers}.{index}."
        mine = {name.removeprefix(prefix): shape for name, shape in shapes.items() if name.startswith(prefix)}
        layer_kept, layer_inputs = _layer(layer, mine, hidden)
        kept += layer_kept
        inputs += [(frozenset(prefix + name for name in names), width) for names, width in layer_inputs]
    return Activations(kept, tuple(inputs))


def _layer(layer: LayerDescription, shapes: Shapes, hidden: int) -> tuple[int, list[Input]]:
    """Values of one layer, and its inputs by names within the layer."""
    attention_kept, attention_names = _attention(layer, shapes)
    mlp_kept, mlp_inputs = _mlp(layer, shapes, hidden)
    reads_input = layer.attention_norm is not None or (layer.parallel and layer.mlp_norm is not None)
    reads_sum = not layer.parallel and layer.mlp_norm is not None
    behind = [layer.attention_out_norm, layer.mlp_out_norm]
    norms = reads_input + reads_sum + sum(norm is not None for norm in behind)
    if layer.shares_norm and isinstance(layer.mlp, MlpDescription):
        names, width = mlp_inputs.pop(0)
        return norms * hidden + attention_kept + mlp_kept, [(attention_names | names, width), *mlp_inputs]
    return norms * hidden + attention_kept + mlp_kept, [(attention_names, hidden), *mlp_inputs]


def _attention(layer: LayerDescription, shapes: Shapes) -> tuple[int, frozenset[str]]:
    attention = layer.attention
    projected = [shapes[name][0] for name in attention.projections]
    result = shapes[attention.output][1]
    kept = sum(projected) + result
    if attention.clip is not None:
        kept += sum(projected)
    if attention.value_norm is not None:
        # The values, beside what they are made of: the keys are as wide.
        kept += projected[-1] if len(projected) > 1 else (projected[0] - result) // 2
    return kept, frozenset(attention.projections)


def _mlp(layer: LayerDescription, shapes: Shapes, hidden: int) -> tuple[int, list[Input]]:
    """Values and inputs; the first input is what the layer's projections read."""
    mlp = layer.mlp
    if isinstance(mlp, MlpDescription):
        inner = sum(shapes[name][0] for name in mlp.projections)
        return inner, [(frozenset(mlp.projections), hidden), (frozenset({mlp.output}), shapes[mlp.output][1])]
    # A module's linear layers, each as if the backward read its output.
    readers: dict[tuple[str, int], set[str]] = {}
    kept = 0
    for name, (out_features, in_features) in shapes.items():
        if name.startswith(f"{mlp.name}."):
            kept += out_features
            readers.setdefault((name.rpartition(".")[0], in_features), set()).add(name)
    return kept, [(frozenset(names), width) for (_, width), names in readers.items()]
