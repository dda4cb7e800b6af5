"""BranchyNet's networks: as large as the authors', and fit for Edgent's ways to cut them."""

from __future__ import annotations

import pytest

from exporter.graph import layer_graph
from exporter.methods.edgent.layers import chains
from exporter.zoo.branchynet import branchy_lenet, branchy_resnet


def test_lenets_exits_read_as_many_values_as_the_authors():
    model = branchy_lenet()

    assert [tensor.shape for tensor in model.outputs] == [(None, 10), (None, 10)]
    assert model.get_layer("exit1").kernel.shape == (640, 10)
    assert model.get_layer("trunk4_fc").kernel.shape == (720, 84)


@pytest.mark.parametrize(("depth", "blocks"), [(20, 3), (32, 5)])
def test_resnets_branches_leave_behind_the_first_block_and_the_first_stage(depth, blocks):
    found = chains(layer_graph(branchy_resnet(depth)))

    names = [[work.name for work in chain.layers] for chain in found]
    assert len(found) == 3
    assert "stage1_1_relu" in names[0] and "stage1_2_conv1" not in names[0]
    assert f"stage1_{blocks}_relu" in names[1] and "stage2_1_conv1_pad" not in names[1]
    assert names[2][-1] == "logits"


def test_lenet_can_be_cut_before_and_behind_its_branch():
    early, late = chains(layer_graph(branchy_lenet()))

    cuts = [{w.name for w in chain.layers if w.output_elements} for chain in (early, late)]
    assert any("trunk1" in name for name in cuts[0] & cuts[1])
    assert early.layers[-1].name == "exit1" and late.layers[-1].name == "exit2"
