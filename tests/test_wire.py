import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.wire import Wire


def publish(topic, payload, *, v5=True, properties=b"", flags=0x30, identifier=b""):
    body = len(topic).to_bytes(2, "big") + topic + identifier
    body += (bytes([len(properties)]) + properties if v5 else b"") + payload
    return packet(flags, body)


def packet(first, body):
    length, encoded = len(body), bytearray()
    while True:
        length, low = length >> 7, length & 0x7F
        encoded.append(low | (0x80 if length else 0))
        if not length:
            return bytes([first]) + encoded + body


class Pair:
    """A wire and its peer; `pump` reads as the link does."""

    def __init__(self, v5=True):
        self.peer, sock = socket.socketpair()
        sock.setblocking(False)
        self.wire = Wire(sock, v5=v5)
        self.published, self.handed_over = [], []

    def pump(self):
        self.wire.receive()
        while True:
            while (taken := self.wire.take()) is not None:
                self.published.append(taken)
            if not self.wire.granted:
                return
            self.handed_over.append(b"")
            with pytest.raises(BlockingIOError):
                while True:
                    self.handed_over[-1] += self.wire.recv(3)

    def close(self):
        self.peer.close()
        self.wire.close()


@pytest.fixture
def pair():
    made = Pair()
    yield made
    made.close()


TOPICS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=100)
PUBLICATIONS = st.tuples(TOPICS, st.binary(max_size=300) | st.just(bytes(20_000)))
OTHERS = st.sampled_from(
    [
        packet(0xD0, b""),
        packet(0x40, b"\0\1"),
        packet(0x90, b"\0\1\0\0" + bytes(200)),
        publish(b"t", b"x", flags=0x32, identifier=b"\0\1"),
        publish(b"t", b"x", properties=b"\x0b\x01"),
        publish(b"", b"x"),
        publish(b"\xff", b"x"),
        packet(0x30, b""),
        packet(0x30, b"\xff\xff"),
        packet(0x30, b"\0\1t"),
    ]
)


@given(
    sequence=st.lists(PUBLICATIONS | OTHERS, max_size=8), cuts=st.lists(st.integers(1, 400)),
)  # fmt: skip
def test_publications_are_taken_and_the_rest_is_the_clients_however_the_stream_is_cut(
    sequence, cuts
):
    pair = Pair()
    stream = b"".join(publish(x[0].encode(), x[1]) if isinstance(x, tuple) else x for x in sequence)
    for cut in cuts:
        pair.peer.sendall(stream[:cut])
        stream = stream[cut:]
        pair.pump()
    pair.peer.sendall(stream)
    pair.pump()
    pair.pump()  # more than one read may hold
    pair.pump()
    assert pair.published == [x for x in sequence if isinstance(x, tuple)]
    assert pair.handed_over == [x for x in sequence if not isinstance(x, tuple)]
    pair.close()


@given(topic=TOPICS, payload=st.binary(max_size=40_000))
@pytest.mark.parametrize("v5", [True, False])
def test_what_one_wire_publishes_another_takes(v5, topic, payload):
    pair = Pair(v5)
    other = Pair(v5)
    assert pair.wire.publish(topic.encode(), payload, retain=True)
    expected = publish(topic.encode(), payload, v5=v5, flags=0x31)
    received = b""
    while len(received) < len(expected):
        received += pair.peer.recv(65_536)
    assert received == expected
    other.peer.sendall(received)
    other.pump()
    assert other.published == [(topic, payload)]
    pair.close()
    other.close()


def test_publication_that_does_not_fit_the_socket_goes_first_when_there_is_room(pair):
    large = bytes(4_000_000)
    assert pair.wire.publish(b"t", large, retain=False)
    assert pair.wire.unsent
    assert not pair.wire.publish(b"t", b"second", retain=False)
    with pytest.raises(BlockingIOError):
        pair.wire.send(b"the client's")
    expected = publish(b"t", large) + b"the client's"
    received = b""
    while len(received) < len(expected):
        received += pair.peer.recv(1_000_000)
        if pair.wire.flush() and not received.endswith(b"s"):
            pair.wire.send(b"the client's")
            received += pair.peer.recv(5_000_000)
    assert received == expected


def test_nothing_is_published_amid_a_packet_of_the_client(pair):
    large = bytes(4_000_000)
    sent = pair.wire.send(large)
    assert 0 < sent < len(large)
    assert not pair.wire.publish(b"t", b"", retain=False)
    while sent < len(large):
        pair.peer.recv(1_000_000)
        sent += pair.wire.send(large[sent:])
    assert pair.wire.publish(b"t", b"", retain=False)


def test_what_no_packet_can_hold_is_not_written(pair):
    assert not pair.wire.publish(b"", b"", retain=False)
    assert not pair.wire.publish(bytes(65_536), b"", retain=False)


def test_client_sees_the_end_of_the_connection_after_all_that_came_before_it(pair):
    pair.peer.sendall(publish(b"t", b"last") + b"\x30")
    pair.peer.close()
    pair.pump()
    pair.pump()
    assert pair.published == [("t", b"last")]
    assert pair.wire.ended
    assert pair.wire.recv(1) == b""


def test_client_gets_to_see_a_length_that_is_no_length(pair):
    pair.peer.sendall(b"\x30\xff\xff\xff\xff\xff\xff")
    pair.pump()
    assert pair.handed_over == [b"\x30\xff\xff\xff\xff\xff\xff"]


def test_publishing_to_a_closed_peer_is_left_to_the_client(pair):
    pair.peer.close()
    assert not pair.wire.publish(b"t", b"", retain=False)
