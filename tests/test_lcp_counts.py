"""Counts of LCP's networks: those of the paper's tables that are exact, without TensorFlow."""

from __future__ import annotations

import json
import os
import subprocess
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import pytest
from click.testing import CliRunner

from agent.protocol.errors import DataError
from agent.protocol.plan import Fusion
from exporter.cli import counts
from exporter.methods.lcp.counts import split_counts
from exporter.zoo.papers import CIFARNET_BN, NETWORKS, narrow

# (network, branches, fattened by, classes): what the paper prints, or what its layout gives.
PRINTED = {
    ("lenet-fc", 1, 0.0, 10): 266_610,
    ("lenet", 1, 0.0, 10): 61_706,
    ("lenet", 2, 0.0, 10): 31_466,
    ("lenet", 4, 0.0, 10): 16_094,
    ("lenet", 8, 0.0, 10): 8_834,
    ("cifarnet", 1, 0.0, 10): 797_966,
    ("cifarnet", 1, 0.0, 100): 815_336,
    ("cifarnet", 2, 0.0, 100): 410_476,
    ("cifarnet", 4, 0.0, 100): 208_052,
    ("cifarnet", 8, 0.0, 100): 106_852,
    ("alexnetv2", 1, 0.0, 1000): 50_303_912,
    ("alexnetv2", 8, 0.0, 1000): 6_317_480,
    ("alexnetv2", 8, 0.4, 1000): 12_108_024,
    ("vgg16", 1, 0.0, 1000): 138_357_544,
    ("vgg16", 8, 0.4, 1000): 33_777_712,
    ("vgg-s", 1, 0.0, 100): 76_152_548,
    ("resnet18", 1, 0.0, 1000): 11_689_512,
    ("resnet18", 2, 0.0, 1000): 6_110_760,
    ("resnet18", 4, 0.0, 1000): 3_321_384,
    ("resnet18", 8, 0.0, 1000): 1_926_696,
    ("resnet50", 8, 0.4, 1000): 8_604_056,
}
MACS = {
    ("lenet", 1, 0.0, 10): 416.5e3,
    ("lenet", 2, 0.0, 10): 267.5e3,
    ("lenet", 4, 0.0, 10): 133.8e3,
    ("lenet", 8, 0.0, 10): 204.8e3,
    ("cifarnet", 1, 0.0, 10): 14.693e6,
    ("cifarnet", 1, 0.0, 100): 14.711e6,
    ("cifarnet", 2, 0.0, 100): 9.237e6,
    ("cifarnet", 4, 0.0, 100): 6.500e6,
    ("cifarnet", 8, 0.0, 100): 5.132e6,
    ("alexnetv2", 1, 0.0, 1000): 736.6e6,
    ("alexnetv2", 8, 0.0, 1000): 151.3e6,
    ("alexnetv2", 8, 0.4, 1000): 256.4e6,
    ("vgg16", 1, 0.0, 1000): 15.47e9,
    ("vgg16", 8, 0.0, 1000): 2.01e9,
    ("vgg16", 8, 0.4, 1000): 3.87e9,
    ("resnet18", 1, 0.0, 1000): 1.814e9,
    ("resnet18", 2, 0.0, 1000): 0.966e9,
    ("resnet18", 4, 0.0, 1000): 0.542e9,
    ("resnet18", 8, 0.0, 1000): 0.330e9,
}


def counted(case: tuple[str, int, float, int]):
    model, split, fatten, classes = case
    return split_counts(model, split, fatten=fatten, classes=classes)


@pytest.mark.parametrize("case", PRINTED)
def test_parameters_are_those_of_the_paper(case) -> None:
    assert counted(case).params == PRINTED[case]


@pytest.mark.parametrize("case", MACS)
def test_macs_are_those_of_the_layout(case) -> None:
    assert counted(case).macs == pytest.approx(MACS[case], rel=2e-3)


def test_lenets_macs_in_the_table_are_its_weights() -> None:
    weights = {split: split_counts("lenet", split).weights for split in (1, 2, 4, 8)}
    assert weights == {1: 61_470, 2: 31_230, 4: 15_860, 8: 8_600}
    assert split_counts("lenet-fc", 1).weights == 266_200


@pytest.mark.parametrize(
    ("model", "split", "fatten"),
    [
        ("lenet-fc", 1, 0.0),
        ("lenet", 4, 0.0),
        ("cifarnet", 8, 0.4),
        ("resnet18", 8, 0.0),
        ("resnet50", 8, 0.4),
        ("mobilenet", 8, 0.0),
        ("alexnetv2", 8, 0.0),
        ("vgg16", 8, 0.0),
        ("vgg-s", 8, 0.0),
    ],
)
def test_keras_model_of_the_same_layout_has_as_many_parameters(model, split, fatten) -> None:
    from exporter.graph import layer_graph
    from exporter.zoo.build import keras_model

    found = split_counts(model, split, fatten=fatten)
    branch, head = keras_model(found.branch), keras_model(found.head)
    trained = [sum(v.shape.num_elements() for v in m.trainable_variables) for m in (branch, head)]

    assert split * trained[0] + trained[1] == found.params
    scales = sum(step.macs or step.op == "scale" for step in found.branch.steps)
    assert scales > 0
    if model != "cifarnet":  # a scale is a 1 x 1 convolution there
        assert layer_graph(branch).macs == found.branch.macs


def test_cifarnet_with_batch_norm_differs_by_the_norms_alone() -> None:
    width = narrow(8, 0.4, "round")
    plain, normed = NETWORKS["cifarnet"].trunk(width), CIFARNET_BN.trunk(width)
    assert normed.weights == plain.weights
    assert normed.macs == plain.macs
    assert normed.parameters - plain.parameters == 2 * (2 * 11) - 2 * 2


def test_unequal_widths_round_and_never_vanish() -> None:
    halves = narrow(8, 0.0, "halve")
    assert [halves(w) for w in (6, 16, 120, 84)] == [1, 2, 15, 10]
    assert [narrow(3, 0.0, "round")(w) for w in (64, 10, 1)] == [21, 3, 1]
    assert narrow(8, 0.4, "floor")(80) == 14
    assert narrow(8, 0.0, "floor", minimum=4)(16) == 4


def test_merge_decides_the_head_alone() -> None:
    concat, summed = (split_counts("resnet18", 8, merge=m) for m in (Fusion.CONCAT, Fusion.SUM))
    assert concat.branch.parameters == summed.branch.parameters
    assert concat.params - summed.params == (512 - 64) * 1000


def test_command_prints_counts_without_tensorflow() -> None:
    code = (
        "import sys; from exporter.cli import counts; from click.testing import CliRunner\n"
        "r = CliRunner().invoke(counts, sys.argv[1:]); print(r.output)\n"
        "assert not {'tensorflow', 'keras'} & set(sys.modules), 'TensorFlow was loaded'"
    )
    arguments = "lcp --model lenet --split 4 --fatten 0 --classes 10 --merge concat --json"
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments.split()],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["params"] == 16_094
    assert told["macs"] == 133_760
    assert told["per_branch_params"] == (16_094 - (84 + 1) * 10) // 4
    assert sum(row["params"] * row["times"] for row in told["layers"]) == told["params"]
    assert sum(row["macs"] * row["times"] for row in told["layers"]) == told["macs"]


def test_command_speaks_to_people_too() -> None:
    told = CliRunner().invoke(counts, ["lcp", "--model", "cifarnet", "--split", "8"])
    assert told.exit_code == 0
    assert "conv1" in told.output and "8 x" in told.output


def test_impossible_splits_are_refused_all_at_once() -> None:
    with pytest.raises(DataError, match=r"(?s)split.*fatten.*classes"):
        split_counts("lenet", 0, fatten=-0.1, classes=1)
    with pytest.raises(DataError) as caught:
        split_counts("lennet", 2)
    assert "lenet" in str(caught.value.hint)
