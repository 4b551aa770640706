"""The manifest tree: canonical nodes, read strictly; equal layers are equal subtrees."""

from __future__ import annotations

import doctest
import json
import math
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from mergepipe.store import manifest
from mergepipe.store.chunking import block_count, chunk_shape
from mergepipe.store.digest import Digest, hash_record
from mergepipe.store.dtypes import DTYPES
from mergepipe.store.errors import BadInputError
from mergepipe.store.manifest import (
    FileEntry,
    Node,
    Shard,
    TensorEntry,
    build_tree,
    decode_node,
    join_name,
    natural_key,
    split_name,
    walk_tensors,
)
from support.strategies import dtypes, names, whole_bytes

digests = st.binary(min_size=32, max_size=32).map(Digest)


@st.composite
def entries(draw: st.DrawFn) -> TensorEntry:
    dtype = draw(dtypes)
    shape = tuple(draw(st.lists(st.integers(0, 40), max_size=3)))
    assume(whole_bytes(dtype, shape))
    chunks = chunk_shape(shape, DTYPES[dtype].bits, 4096)
    count = block_count(shape, chunks)
    return TensorEntry(dtype, shape, chunks, tuple(draw(st.lists(digests, min_size=count, max_size=count))))


files = st.builds(FileEntry, size=st.integers(0, 2**60), blocks=st.lists(digests, max_size=3).map(tuple))
paths = st.text(st.characters(exclude_categories=["Cs"]), max_size=10)
nodes = st.builds(
    Node,
    nodes=st.dictionaries(paths, digests, max_size=3),
    tensors=st.dictionaries(names, entries(), max_size=3),
    files=st.dictionaries(paths, files, max_size=3),
    shards=st.lists(st.builds(Shard, path=paths, header=files), max_size=2).map(tuple),
)


class Tree:
    """Nodes in memory, as a store would keep them."""

    def __init__(self) -> None:
        self.nodes: dict[Digest, bytes] = {}

    def put(self, data: bytes) -> Digest:
        digest = hash_record("node", data)
        self.nodes[digest] = data
        return digest

    def read(self, digest: Digest) -> Node:
        return decode_node(self.nodes[digest], "a node")

    def build(self, tensors: dict[str, TensorEntry]) -> Digest:
        return build_tree(tensors, {}, (), self.put)


def entry(fill: int = 1) -> TensorEntry:
    return TensorEntry("F32", (2,), (2,), (Digest(bytes([fill]) * 32),))


class TestNames:
    @given(names)
    def test_they_come_back(self, name: str) -> None:
        assert join_name(*split_name(name)) == name

    @given(st.integers(0, 300), st.booleans())
    def test_no_name_makes_the_tree_deep(self, parts: int, numbered: bool) -> None:
        name = "a." * parts + ("7." if numbered else "") + "weight"
        path, leaf = split_name(name)
        assert len(path) <= manifest.MAXIMUM_DEPTH
        assert join_name(path, leaf) == name

    def test_the_examples_in_the_documentation(self) -> None:
        result = doctest.testmod(manifest)
        assert (result.failed, result.attempted) == (0, 3)

    def test_layers_sort_by_their_numbers(self) -> None:
        assert sorted(["10", "2", "a", "1", "b", "02"], key=natural_key) == ["1", "02", "2", "10", "a", "b"]


class TestNodes:
    @given(nodes)
    def test_they_come_back(self, node: Node) -> None:
        data = node.encode()
        again = decode_node(data, "x")
        assert again.encode() == data
        assert (dict(again.nodes), dict(again.tensors)) == (dict(node.nodes), dict(node.tensors))
        assert (dict(again.files), again.shards) == (dict(node.files), node.shards)

    @given(st.dictionaries(names, entries(), max_size=5), st.randoms())
    def test_the_order_of_tensors_changes_nothing(self, tensors: dict[str, TensorEntry], random: Any) -> None:
        shuffled = list(tensors.items())
        random.shuffle(shuffled)
        assert Tree().build(tensors) == Tree().build(dict(shuffled))

    def test_an_empty_node_is_an_empty_object(self) -> None:
        assert Node().encode() == b"{}"
        assert decode_node(b"{}", "x") == Node()

    @pytest.mark.parametrize(
        "value",
        [
            [],
            None,
            {"extra": {}},
            {"nodes": []},
            {"nodes": {"a": "x"}},
            {"nodes": {"a": "0" * 63}},
            {"tensors": {"w": {}}},
            {"tensors": {"w": {**entry().as_json(), "dtype": "F31"}}},
            {"tensors": {"w": {**entry().as_json(), "dtype": 3}}},
            {"tensors": {"w": {**entry().as_json(), "shape": [-2]}}},
            {"tensors": {"w": {**entry().as_json(), "shape": [2.0]}}},
            {"tensors": {"w": {**entry().as_json(), "shape": [True]}}},
            {"tensors": {"w": {**entry().as_json(), "shape": "2"}}},
            {"tensors": {"w": {**entry().as_json(), "chunks": [0]}}},
            {"tensors": {"w": {**entry().as_json(), "chunks": [1]}}},  # two blocks, and one is named
            {"tensors": {"w": {**entry().as_json(), "chunks": [2, 1]}}},
            {"tensors": {"w": {**entry().as_json(), "shape": [4, 4], "chunks": [4, 2]}}},
            {"tensors": {"w": {**entry().as_json(), "shape": [1] * 65, "chunks": [1] * 65}}},
            {"tensors": {"w": {**entry().as_json(), "blocks": ["x"]}}},
            {"tensors": {"w": {"dtype": "F4", "shape": [4, 3], "chunks": [1, 3], "blocks": ["0" * 64] * 4}}},
            {"files": {"f": {"size": -1, "blocks": []}}},
            {"files": {"f": {"size": "1", "blocks": []}}},
            {"files": {"f": {"blocks": []}}},
            {"shards": [{"path": 1, "header": {"size": 0, "blocks": []}}]},
            {"shards": {"path": "a"}},
        ],
    )
    def test_other_values_are_refused(self, value: Any) -> None:
        with pytest.raises(BadInputError, match="node 123"):
            decode_node(json.dumps(value).encode(), "node 123")

    @given(st.binary(max_size=60))
    def test_any_bytes_are_a_node_or_bad_input(self, data: bytes) -> None:
        try:
            node = decode_node(data, "x")
        except BadInputError:
            return
        assert decode_node(node.encode(), "x") == node


class TestTrees:
    @given(st.dictionaries(names, entries(), max_size=8))
    def test_what_is_built_is_walked(self, tensors: dict[str, TensorEntry]) -> None:
        tree = Tree()
        root = tree.build(tensors)
        assert dict(walk_tensors(tree.read(root), tree.read)) == tensors

    def test_layers_are_walked_in_the_order_of_their_numbers(self) -> None:
        tree = Tree()
        root = tree.build({f"model.layers.{i}.w": entry() for i in (10, 2, 0, 1)})
        assert [name for name, _ in walk_tensors(tree.read(root), tree.read)] == [
            f"model.layers.{i}.w" for i in (0, 1, 2, 10)
        ]

    def test_an_unchanged_layer_keeps_its_subtree(self) -> None:
        tensors = {f"model.layers.{i}.{name}.weight": entry(i) for i in range(4) for name in ("q", "k")}
        one, other = Tree(), Tree()
        before = one.build(tensors)
        after = other.build({**tensors, "model.layers.2.k.weight": entry(99)})
        assert before != after
        layers = [
            dict(tree.read(tree.read(tree.read(root).nodes["model"]).nodes["layers"]).nodes)
            for tree, root in ((one, before), (other, after))
        ]
        assert {name for name in layers[0] if layers[0][name] != layers[1][name]} == {"2"}
        assert len(set(other.nodes) - set(one.nodes)) == 4  # the layer and the three nodes above it

    def test_equal_layers_are_one_node(self) -> None:
        tree = Tree()
        tree.build({f"model.layers.{i}.w": entry() for i in range(50)})
        assert len(tree.nodes) == 4

    def test_the_root_alone_has_files_and_shards(self) -> None:
        tree = Tree()
        file = FileEntry(3, (Digest(b"\1" * 32),))
        root = tree.read(build_tree({"a.b.c": entry()}, {"config.json": file}, (Shard("x", file),), tree.put))
        assert dict(root.files) == {"config.json": file}
        assert root.shards == (Shard("x", file),)
        assert dict(tree.read(root.nodes["a"]).files) == {}

    def test_a_tree_that_a_stranger_made_deep_is_an_error(self) -> None:
        tree = Tree()
        digest = tree.put(Node(tensors={"w": entry()}).encode())
        for _ in range(5000):
            digest = tree.put(Node(nodes={"a": digest}).encode())
        with pytest.raises(BadInputError, match="deeper than"):
            list(walk_tensors(tree.read(digest), tree.read))


class TestTensorEntries:
    @given(entries())
    def test_spans_tile_the_bytes(self, tensor: TensorEntry) -> None:
        spans = [tensor.block_span(index) for index in range(len(tensor.blocks))]
        ends = [0, *(offset + size for offset, size in spans)]
        assert [offset for offset, _ in spans] == ends[:-1]
        assert ends[-1] == tensor.nbytes == math.prod(tensor.shape) * tensor.element_type.bits // 8

    @given(entries(), entries())
    def test_ids_are_those_of_the_content(self, one: TensorEntry, other: TensorEntry) -> None:
        assert (one.id == other.id) == (one == other)

    def test_grids_are_compared_by_shape_and_chunks(self) -> None:
        one = TensorEntry("F32", (4,), (2,), (Digest(bytes(32)),) * 2)
        assert one.same_grid(TensorEntry("BF16", (4,), (2,), (Digest(bytes(32)),) * 2))
        assert not one.same_grid(TensorEntry("F32", (4,), (4,), (Digest(bytes(32)),)))
        assert not one.same_grid(TensorEntry("F32", (3,), (2,), (Digest(bytes(32)),) * 2))
