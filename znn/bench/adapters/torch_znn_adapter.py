"""Single layers by znn.torch inside PyTorch's autograd, with the plan that the cost model gives."""

from __future__ import annotations

from typing import Any

from .torch_layers_adapter import LayerSession, TorchLayersAdapter
from .torch_net import TorchNet


class ZnnNet(TorchNet):
    """The net with znn.torch's convolutions."""

    def _edge(self, edge: Any, images: dict[int, Any], bias: Any) -> Any:
        if edge.kind != "conv":
            return super()._edge(edge, images, bias)
        import znn.torch

        image, cut = images[edge.source], 1 if self.flat else 0
        conv = znn.torch.conv2d if self.flat else znn.torch.conv3d
        return conv(
            image,
            self.weights[edge.name],
            bias,
            dilation=edge.sparsity[cut:],
            groups=image.shape[1] if edge.spec.depthwise else 1,
        )


class TorchZnnAdapter(TorchLayersAdapter):
    name = "torch_znn"
    layouts = (False,)

    def net(self, graph: Any, parameters: Any, channels_last: bool) -> TorchNet:
        return ZnnNet(graph, parameters, "cpu", channels_last)

    def ran(self, session: LayerSession, graph: Any) -> str:
        from znn.torch.layers import Problem, method_of

        session.lap()
        zero = (0, 0, 0)
        found = []
        for edge in graph.edges:
            if edge.kind == "conv":
                maps = graph.nodes[edge.source].maps, graph.nodes[edge.target].maps
                groups = maps[0] if edge.spec.depthwise else 1
                found.append(
                    method_of(Problem(*maps, groups, edge.in_extent, edge.kernel, edge.sparsity, zero, zero))
                )
        return f"methods: {', '.join(map(str, found))}"


ADAPTER = TorchZnnAdapter()
