"""A network divided layer by layer in int8: the fleet is its pieces to the bit, not the one model.

Each part has scales of its own, finer than those of the undivided int8 network, and partial sums
are rounded before they are added. So the two differ by some steps, but are equally near to float.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Mosquitto
from export_cases import home, model_file, shoal
from numpy.typing import NDArray
from test_layerwise_fleet import DEVICES, FLEET

from agent.ask import Asker
from agent.device import RunningDevice
from agent.fuse import fuse_tensors
from agent.link import BrokerAddress
from agent.protocol.fleet import load_fleet
from agent.protocol.manifest import Manifest, read_manifest
from agent.protocol.plan import FRAME
from agent.protocol.quantization import dequantize
from agent.protocol.scores import normalized_entropy, softmax
from agent.runtime import load_piece

pytestmark = pytest.mark.broker
ASKED = 16

Floats = NDArray[np.float32]


@dataclass
class Case:
    """Logits of held-out frames (N, 6): one float network, the same in int8, the parts' in int8."""

    bundle: Path
    manifest: Manifest
    frames: NDArray[np.uint8]
    whole: Floats
    single: Floats
    divided: Floats
    step: float


@pytest.fixture(scope="module", params=["plain", "residual"])
def case(request: Any, tmp_path_factory: Any) -> Iterator[Case]:
    import keras

    from exporter.data import load_data
    from exporter.quantize import convert, infer, tensors

    folder: Path = tmp_path_factory.mktemp("divided")
    (folder / "fleet.yaml").write_text(FLEET)
    path, source = model_file(request.param), home() / "digits.npz"
    said = shoal(
        "export", path, "--data", source, "--fleet", folder / "fleet.yaml",
        "--method", "layerwise", "-o", folder / "bundle",
    )  # fmt: skip
    assert said.exit_code == 0, said.output
    manifest = read_manifest(folder / "bundle")
    data = load_data(str(source), image_shape=(8, 8, 1))
    inputs = data.inputs(data.held_out.frames)
    base = keras.models.load_model(path)
    tflite = convert(base, inputs, dtype="int8", metadata={})
    (output,) = tensors(tflite).outputs
    frames = data.held_out.frames.astype(np.uint8)
    yield Case(
        folder / "bundle",
        manifest,
        frames,
        base.predict(inputs, verbose=0),
        output.dequantize(infer(tflite, inputs, "litert")[output.name]),
        walked(folder / "bundle", manifest, frames),
        output.scale,
    )


def walked(bundle: Path, manifest: Manifest, frames: NDArray[np.uint8]) -> Floats:
    """What the pieces say, run here one after the other."""
    (strategy,) = manifest.plan.strategies
    fleet = load_fleet(bundle / "fleet.yaml")
    pieces = {}
    for node in strategy.nodes:
        if node.piece is not None:
            entry = manifest.entry(node.piece)
            frame = manifest.frame if FRAME in manifest.plan.piece(node.piece).inputs else None
            runtime = fleet.device(node.device).runtime
            pieces[node.name] = load_piece(bundle, entry, frame, runtime)
    rows = []
    for image in frames:
        has: dict[str, NDArray[Any]] = {}
        for node in sorted(strategy.nodes, key=lambda node: node.tier):
            x: Any = image
            if node.fusion is not None:
                heard = [has[name] for name in node.listens_to]
                x = fuse_tensors(node.fusion, dict(enumerate(heard)), [h.shape for h in heard])
            if node.name in pieces:
                assert node.piece is not None
                stored = pieces[node.name].run_stored(x)
                x = dequantize(stored, manifest.entry(node.piece).output)
            has[node.name] = x
        rows.append(has[strategy.aggregator.name].reshape(-1))
    return np.stack(rows)


def test_agents_say_to_the_bit_what_the_pieces_say(case: Case, mosquitto: Mosquitto) -> None:
    with mosquitto.start() as broker:
        address = BrokerAddress(broker.host, broker.port)
        devices = [
            RunningDevice(case.bundle, name, address, stop=threading.Event()) for name in DEVICES
        ]
        for device in devices:
            device.start()
        fleet = load_fleet(case.bundle / "fleet.yaml")
        with Asker(case.manifest, fleet, address) as asker:
            decisions = [asker.ask(frame) for frame in case.frames[:ASKED]]
        for device in devices:
            device.close()
    for decision, logits in zip(decisions, case.divided, strict=False):
        assert decision.missing == ()
        assert decision.best_guess == case.manifest.plan.classes[int(logits.argmax())]
        assert decision.entropy == float(normalized_entropy(softmax(logits)))


def test_parts_round_otherwise_than_the_undivided_network(case: Case) -> None:
    steps = np.abs(case.divided - case.single) / case.step
    assert 1 < steps.mean() < 6
    assert (case.divided.argmax(1) == case.single.argmax(1)).mean() >= 0.98


def test_parts_are_as_near_to_float_as_the_undivided_network(case: Case) -> None:
    apart = np.abs(case.divided - case.whole).mean()
    together = np.abs(case.single - case.whole).mean()
    assert apart < 1.5 * together
