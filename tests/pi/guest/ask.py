"""Runs inside a userland: publish a question over MQTT and print the answer, in hex.

Arguments: PORT QUESTION_HEX. Subscribes to `answer`, publishes to `question`, both QoS 1.
"""

from __future__ import annotations

import queue
import sys

import paho.mqtt.client as mqtt

DEADLINE_S = 30.0


def main(port: int, question: bytes) -> None:
    """Ask once; no answer in time is an error."""
    answers: queue.Queue[bytes] = queue.Queue()
    client = mqtt.Client(mqtt.CallbackAPIVersion.VERSION2)
    client.on_connect = lambda client, *_: client.subscribe("answer", qos=1)
    client.on_subscribe = lambda client, *_: client.publish("question", question, qos=1)
    client.on_message = lambda _client, _userdata, message: answers.put(message.payload)
    client.connect("127.0.0.1", port)
    client.loop_start()
    try:
        print(answers.get(timeout=DEADLINE_S).hex())
    finally:
        client.disconnect()
        client.loop_stop()


if __name__ == "__main__":
    main(int(sys.argv[1]), bytes.fromhex(sys.argv[2]))
