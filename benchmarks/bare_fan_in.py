"""The floor of `fleet_latency`: the same fan-in written with bare paho-mqtt, as short as it gets.

python -m benchmarks.bare_fan_in PORT responder NUMBER ANSWER_BYTES
python -m benchmarks.bare_fan_in PORT collector RESPONDERS DECISION_BYTES

MQTT v5, paho's own network thread (`loop_start`), everything inside `on_message`, TCP_NODELAY.
Nothing is checked: no checksum, no plan, no boot, no deadline, no state but a count a request.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
from collections.abc import Callable
from typing import Any

import paho.mqtt.client as mqtt
from paho.mqtt.enums import CallbackAPIVersion

ROOT = "bare/fan_in"
REQUEST, DECISION, READY = f"{ROOT}/req", f"{ROOT}/decision", f"{ROOT}/ready"
ID_BYTES = 8
DECISION_QOS = 1
"""As in Shoal: the broker forwards a decision at once, its acknowledgement comes after that."""


def client(port: int, name: str, topic: str, on_message: Callable[[bytes], None]) -> mqtt.Client:
    """A connected client whose network thread runs; one subscription, QoS 0."""
    made = mqtt.Client(CallbackAPIVersion.VERSION2, client_id=name, protocol=mqtt.MQTTv5)
    subscribed = threading.Event()

    def on_open(_client: Any, _data: Any, sock: Any) -> None:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def on_connect(*_: Any) -> None:
        made.subscribe(topic, 0)

    made.on_socket_open = on_open
    made.on_message = lambda _client, _data, message: on_message(bytes(message.payload))
    made.on_connect = on_connect
    made.on_subscribe = lambda *_: subscribed.set()
    made.connect("127.0.0.1", port)
    made.loop_start()
    if not subscribed.wait(30):
        raise TimeoutError(f"{name}: no subscription")
    return made


def respond(port: int, number: int, answer_bytes: int) -> mqtt.Client:
    """Answer every request with its id and as many bytes as a Shoal answer has."""
    topic = f"{ROOT}/res/{number}"
    filler = os.urandom(answer_bytes - ID_BYTES)

    def on_request(payload: bytes) -> None:
        me.publish(topic, payload[:ID_BYTES] + filler)

    me = client(port, f"bare-{number}", REQUEST, on_request)
    return me


def collect(port: int, responders: int, decision_bytes: int) -> mqtt.Client:
    """Count the answers to each request; publish a JSON decision when all have come."""
    counts: dict[bytes, int] = {}
    filler = "x" * (decision_bytes - len(json.dumps({"request": "0" * 2 * ID_BYTES, "text": ""})))

    def on_answer(payload: bytes) -> None:
        request = payload[:ID_BYTES]
        count = counts.get(request, 0) + 1
        if count < responders:
            counts[request] = count
            return
        del counts[request]
        me.publish(DECISION, json.dumps({"request": request.hex(), "text": filler}), DECISION_QOS)

    me = client(port, "bare-collector", f"{ROOT}/res/+", on_answer)
    return me


class Requester:
    """Asks, and waits for the decision that names the request.

    Args:
        port: The broker's.
        request_bytes: Payload size of a request.
    """

    def __init__(self, port: int, request_bytes: int) -> None:
        self._filler = os.urandom(request_bytes - ID_BYTES)
        self._waiting = ""
        self._decided = threading.Event()
        self._count = 0
        self._client = client(port, "bare-requester", DECISION, self._on_decision)

    def ask(self, timeout_s: float = 5.0) -> None:
        """One request. Raises TimeoutError without a decision in time."""
        self._count += 1
        request = self._count.to_bytes(ID_BYTES, "big")
        self._waiting = request.hex()
        self._decided.clear()
        self._client.publish(REQUEST, request + self._filler)
        if not self._decided.wait(timeout_s):
            raise TimeoutError("the bare fan-in did not decide")

    def stop(self) -> None:
        """Disconnect."""
        self._client.disconnect()
        self._client.loop_stop()

    def _on_decision(self, payload: bytes) -> None:
        if json.loads(payload)["request"] == self._waiting:
            self._decided.set()


def main() -> None:
    """Run one process of the fan-in until its standard input closes."""
    port, role, number, size = int(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    me = respond(port, number, size) if role == "responder" else collect(port, number, size)
    print("ready", flush=True)
    sys.stdin.read()
    me.disconnect()
    me.loop_stop()


if __name__ == "__main__":
    main()
