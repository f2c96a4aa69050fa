import re

import pytest

from znn import zoo
from znn.draw import draw_graph
from znn.errors import DataError
from znn.graph import Graph


@pytest.mark.parametrize("name", ["scaling_3d", "multiscale", "2d_10"])
def test_every_node_and_operation_is_in_the_drawing(name, tmp_path):
    graph = Graph.build(zoo.build(name, width=3), output=zoo.default_output(name))
    draw_graph(graph, tmp_path / "net.svg")
    text = (tmp_path / "net.svg").read_text()
    # Matplotlib writes text as outlines and leaves the words in comments.
    words = " ".join(re.findall(r"<!--(.*?)-->", text, re.DOTALL))
    for node in graph.nodes:
        assert node.name in words
    assert {edge.kind for edge in graph.edges} <= set(words.split())


def test_the_same_graph_gives_the_same_bytes(tmp_path):
    graph = Graph.build(zoo.build("multiscale", width=3), output=1)
    for ending in ("svg", "png", "pdf", "dot"):
        for name in "ab":
            draw_graph(graph, tmp_path / f"{name}.{ending}")
        assert (tmp_path / f"a.{ending}").read_bytes() == (tmp_path / f"b.{ending}").read_bytes()


def test_other_endings_are_refused(tmp_path):
    with pytest.raises(DataError, match=".jpg"):
        draw_graph(Graph.build(zoo.build("scaling_3d", width=1), output=1), tmp_path / "net.jpg")
    assert not list(tmp_path.iterdir())
