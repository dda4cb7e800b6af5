import gc
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections import deque
from uuid import uuid4

import pytest
from hypothesis import given
from hypothesis import strategies as st

import agent.link
from agent.link import (
    OUT_QUEUE_BYTES,
    BrokerAddress,
    FaultKind,
    Link,
    Message,
    NewestWins,
    topic_matches,
)
from agent.protocol.errors import DeviceUnreachable
from tests.support import eventually

broker_test = pytest.mark.broker


@pytest.fixture
def links(mosquitto):
    made = []

    def make(broker=mosquitto, client_id=None, **options):
        faults = []
        user, password = options.pop("credentials", (None, None))
        address = BrokerAddress(
            broker.host, broker.port, user, password, options.pop("ca_file", None)
        )
        link = Link(address, client_id or uuid4().hex, on_fault=faults.append, **options)
        link.faults = faults
        made.append(link)
        return link

    yield make
    for link in made:
        link.stop()


@pytest.fixture
def fresh_topic():
    return f"test/{uuid4().hex}"


@pytest.fixture
def watch(links):
    """Messages that a second client sees under a filter."""

    def start(topic_filter, broker=None):
        seen = []
        link = links(broker) if broker else links()
        link.subscribe(topic_filter, lambda topic, payload: seen.append((topic, payload)), qos=1)
        link.start(5)
        return seen

    return start


@broker_test
def test_messages_reach_the_handlers_of_their_topic(links, fresh_topic):
    seen = []
    link = links()
    link.subscribe(f"{fresh_topic}/a", lambda t, p: seen.append(("exact", p)))
    link.subscribe(f"{fresh_topic}/+/b", lambda t, p: seen.append(("wildcard", p)))
    link.start(5)
    assert link.publish(f"{fresh_topic}/a", b"1")
    assert link.publish(f"{fresh_topic}/x/b", b"2", qos=1)
    assert link.publish(f"{fresh_topic}/nobody", b"3", qos=1)
    assert eventually(lambda: len(seen) == 2)
    assert seen == [("exact", b"1"), ("wildcard", b"2")]
    assert link.stats.received == 2
    assert link.stats.sent == 3


@broker_test
def test_overlapping_filters_each_see_a_message_once(links, fresh_topic):
    seen = []
    link = links()
    for name, topic_filter in (("exact", "a/b"), ("plus", "a/+"), ("hash", "#")):
        link.subscribe(f"{fresh_topic}/{topic_filter}", lambda t, p, name=name: seen.append(name))
    done = threading.Event()
    link.subscribe(f"{fresh_topic}-end", lambda t, p: done.set())
    link.start(5)
    link.publish(f"{fresh_topic}/a/b", b"")
    link.publish(f"{fresh_topic}-end", b"")
    assert done.wait(5)
    assert sorted(seen) == ["exact", "hash", "plus"]


@broker_test
def test_filter_added_to_a_running_link_may_overlap_an_older_one(links, fresh_topic):
    seen = []
    link = links()
    link.subscribe(f"{fresh_topic}/a", lambda t, p: seen.append(("old", p)))
    link.start(5)
    link.publish(f"{fresh_topic}/a", b"1", retain=True)
    assert eventually(lambda: seen == [("old", b"1")])
    link.subscribe(f"{fresh_topic}/#", lambda t, p: seen.append(("new", p)))
    assert eventually(lambda: ("new", b"1") in seen)
    link.publish(f"{fresh_topic}/a", b"2")
    assert eventually(lambda: len(seen) == 4)
    assert sorted(seen) == [("new", b"1"), ("new", b"2"), ("old", b"1"), ("old", b"2")]


@broker_test
def test_subscribing_on_a_running_link_takes_effect(links, fresh_topic):
    link = links()
    link.start(5)
    seen = threading.Event()
    link.subscribe(fresh_topic, lambda t, p: seen.set())
    link.publish(fresh_topic, b"")
    assert seen.wait(5)


@broker_test
def test_handler_may_publish(links, fresh_topic):
    answer = threading.Event()
    link = links()
    link.subscribe(f"{fresh_topic}/q", lambda t, p: link.publish(f"{fresh_topic}/a", p, qos=1))
    link.subscribe(f"{fresh_topic}/a", lambda t, p: answer.set())
    link.start(5)
    link.publish(f"{fresh_topic}/q", b"")
    assert answer.wait(5)


@broker_test
def test_link_works_where_the_system_has_no_poll(links, fresh_topic, monkeypatch):
    monkeypatch.delattr(agent.link.select, "poll")
    answer = threading.Event()
    large = bytes(3_000_000)  # more than the socket takes at once
    link = links()
    link.subscribe(f"{fresh_topic}/q", lambda t, p: link.publish(f"{fresh_topic}/a", p))
    link.subscribe(f"{fresh_topic}/a", lambda t, p: answer.set() if p == large else None)
    link.start(5)
    link.publish(f"{fresh_topic}/q", large)
    assert answer.wait(10)


@broker_test
def test_handler_and_publisher_may_share_a_lock(links, fresh_topic):
    lock = threading.Lock()
    seen = []

    def handler(topic, payload):
        with lock:
            seen.append(payload)

    link = links()
    link.subscribe(fresh_topic, handler)
    link.start(5)
    for number in range(500):
        with lock:
            assert link.publish(fresh_topic, b"%d" % number)
    assert eventually(lambda: len(seen) == 500)


@broker_test
def test_exception_in_a_handler_is_reported_and_later_messages_still_arrive(links, fresh_topic):
    seen = []

    def handler(topic, payload):
        if payload == b"bad":
            raise ZeroDivisionError("on purpose")
        seen.append(payload)

    link = links()
    link.subscribe(fresh_topic, handler)
    link.start(5)
    for payload in (b"1", b"bad", b"2"):
        link.publish(fresh_topic, payload)
    assert eventually(lambda: seen == [b"1", b"2"])
    assert link.stats.handler_errors == 1
    assert [fault.kind for fault in link.faults] == [FaultKind.HANDLER_FAILED]
    assert isinstance(link.faults[0].error, ZeroDivisionError)
    assert fresh_topic in link.faults[0].message
    assert link.connected


@broker_test
def test_exception_in_the_fault_callback_does_not_end_the_link(mosquitto, fresh_topic):
    def explode(*_):
        raise RuntimeError("on purpose")

    with Link(BrokerAddress(mosquitto.host, mosquitto.port), uuid4().hex, on_fault=explode) as link:
        link.subscribe(fresh_topic, explode)
        link.start(5)
        link.publish(fresh_topic, b"")
        assert eventually(lambda: link.stats.handler_errors == 1)
        link.publish(fresh_topic, b"")
        assert eventually(lambda: link.stats.handler_errors == 2)


@broker_test
@pytest.mark.parametrize("kill", [False, True])
def test_births_and_subscriptions_return_after_a_broker_restart(mosquitto, links, kill):
    with mosquitto.start() as broker:
        seen = []
        births = [Message("dev/a/status", b"online", 1, True)]
        link = links(broker, births=lambda: births)
        link.subscribe("dev/+/status", lambda t, p: seen.append(p))
        link.start(5)
        assert eventually(lambda: seen == [b"online"])
        births = [Message("dev/a/status", b"updating", 1, True)]
        broker.restart(kill=kill)
        assert eventually(lambda: seen == [b"online", b"updating"])
        assert eventually(lambda: link.connected)
        assert link.stats.reconnects == 1
        assert link.faults[0].kind is FaultKind.CONNECTION_LOST
        assert not link.faults[0].final


@broker_test
def test_unacknowledged_publication_is_sent_again_after_the_births(mosquitto, links):
    with mosquitto.start() as broker:
        link = links(broker, births=lambda: [Message("status", b"newer", 1, True)])
        link.start(5)
        os.kill(broker.pid, signal.SIGSTOP)
        assert link.publish("event", b"kept", qos=1, retain=True)
        assert link.publish("status", b"stale", qos=1, retain=True)
        broker.restart(kill=True)
        assert eventually(lambda: link.stats.reconnects == 1)
        seen = {}
        other = links(broker)
        other.subscribe("#", seen.__setitem__)
        other.start(5)
        assert eventually(lambda: {"event", "status"} <= seen.keys())
        assert seen["event"] == b"kept"
        assert seen["status"] == b"newer"


@broker_test
def test_will_is_delivered_when_the_process_is_killed(mosquitto, watch, fresh_topic):
    seen = watch(f"{fresh_topic}/status")
    program = (
        "import sys, time; from agent.link import *; topic = sys.argv[1]\n"
        f"link = Link(BrokerAddress({mosquitto.host!r}, {mosquitto.port}), topic[5:],\n"
        "    will=Message(topic, b'offline', 1, True),\n"
        "    births=lambda: [Message(topic, b'online', 1, True)])\n"
        "link.start(10)\n"
        "time.sleep(60)\n"
    )
    command = [sys.executable, "-c", program, f"{fresh_topic}/status"]
    with subprocess.Popen(command) as process:
        assert eventually(lambda: [p for _, p in seen] == [b"online"], 15)
        process.kill()
    assert eventually(lambda: [p for _, p in seen] == [b"online", b"offline"])


@broker_test
def test_stop_says_goodbye_itself(links, watch, fresh_topic):
    seen = watch(fresh_topic)
    link = links(will=Message(fresh_topic, b"offline", 1, True))
    link.start(5)
    link.stop()
    assert eventually(lambda: seen == [(fresh_topic, b"offline")])
    assert not link.connected
    assert not link.publish(fresh_topic, b"late")


@broker_test
def test_stop_inside_a_handler_ends_the_link(links, watch, fresh_topic):
    seen = watch(f"{fresh_topic}/status")
    link = links(will=Message(f"{fresh_topic}/status", b"offline", 1, True))
    link.subscribe(f"{fresh_topic}/stop", lambda t, p: link.stop())
    link.start(5)
    link.publish(f"{fresh_topic}/stop", b"")
    assert eventually(lambda: seen == [(f"{fresh_topic}/status", b"offline")])


@broker_test
def test_wrong_password_is_named_and_not_retried(mosquitto, links):
    with mosquitto.start(credentials=("ann", "right")) as broker:
        link = links(broker, credentials=("ann", "wrong"))
        with pytest.raises(DeviceUnreachable) as caught:
            link.start(10)
        text = str(caught.value)
        assert broker.host in text
        assert str(broker.port) in text
        assert "'ann'" in text
        assert "Not authorized" in text
        assert "mosquitto_passwd" in text
        assert "wrong" not in text
        assert link.faults[0].final
        assert broker.log().count("not authorised") + broker.log().count("not authorized") <= 1
        welcome = links(broker, credentials=("ann", "right"))
        welcome.start(5)
        assert welcome.connected


@broker_test
def test_missing_user_is_named_as_anonymous(mosquitto, links):
    with (
        mosquitto.start(credentials=("ann", "right")) as broker,
        pytest.raises(DeviceUnreachable, match="anonymous"),
    ):
        links(broker).start(10)


def test_refused_connection_names_host_port_and_cause(links):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = BrokerAddress("127.0.0.1", unused.getsockname()[1])
        with pytest.raises(DeviceUnreachable, match=rf"port {address.port} .*refused") as caught:
            Link(address, "a").start(0.3)
    assert caught.value.hint


@pytest.mark.parametrize("host", ["no-such-host.invalid", "x" * 70])
def test_unknown_name_is_a_dns_failure(host):
    with pytest.raises(DeviceUnreachable, match="does not resolve"):
        Link(BrokerAddress(host), "a").start(0.3)


def test_server_that_never_answers_connect_is_named(silent_server):
    with pytest.raises(DeviceUnreachable, match="no answer to MQTT CONNECT"):
        Link(BrokerAddress("127.0.0.1", silent_server), "a").start(0.3)


@pytest.fixture
def silent_server():
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


# paho leaves the socket of a failed handshake to the garbage collector.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@broker_test
def test_tls_against_a_plain_port_is_a_tls_failure(mosquitto, links, certificate):
    with pytest.raises(DeviceUnreachable, match="TLS failed"):
        links(ca_file=str(certificate / "cert.pem")).start(1)


@pytest.fixture(scope="session")
def certificate(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tls")
    command = (
        "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 "
        "-subj /CN=localhost -addext subjectAltName=DNS:localhost,IP:127.0.0.1 "
        "-keyout key.pem -out cert.pem"
    )
    try:
        subprocess.run(command.split(), cwd=folder, check=True, capture_output=True)
    except FileNotFoundError:
        pytest.skip("openssl is not installed")
    return folder


@broker_test
def test_tls_link_carries_messages_larger_than_a_tls_record(mosquitto, certificate):
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    lines = [
        f"listener {port} 127.0.0.1",
        f"certfile {certificate}/cert.pem",
        f"keyfile {certificate}/key.pem",
    ]
    with mosquitto.start(extra_config=lines):
        address = BrokerAddress("127.0.0.1", port, ca_file=str(certificate / "cert.pem"))
        seen = []
        with Link(address, "a") as link:
            link.subscribe("x", lambda t, p: seen.append(p))
            link.start(5)
            payload = bytes(range(256)) * 1000
            for _ in range(3):
                link.publish("x", payload)
            assert eventually(lambda: len(seen) == 3)
        assert seen == [payload] * 3


@broker_test
def test_of_two_links_with_one_id_the_newer_stays_and_the_older_says_so(links, fresh_topic):
    name = uuid4().hex
    older = links(client_id=name, births=lambda: [Message(fresh_topic, b"older", 1, True)])
    older.start(5)
    newer = links(client_id=name, births=lambda: [Message(fresh_topic, b"newer", 1, True)])
    newer.start(5)
    assert eventually(lambda: older.faults and older.faults[-1].final, 10)
    assert older.faults[-1].kind is FaultKind.TAKEN_OVER
    assert name in older.faults[-1].message
    assert "another client" in older.faults[-1].message
    assert not older.connected
    assert eventually(lambda: newer.connected)
    assert not any(fault.final for fault in newer.faults)
    state = []
    reader = links()
    reader.subscribe(fresh_topic, lambda t, p: state.append(p))
    reader.start(5)
    assert eventually(lambda: state == [b"newer"])


def test_session_taken_over_reason_stops_the_link():
    with ScriptedBroker(answer_to_evict=b"\xe0\x02\x8e\x00") as broker:
        faults = []
        link = Link(broker.address, "twin", on_fault=faults.append)
        link.start(5)
        link.publish("evict", b"")
        assert eventually(lambda: faults)
        link.stop()
    assert [(fault.kind, fault.final) for fault in faults] == [(FaultKind.TAKEN_OVER, True)]
    assert "twin" in faults[0].message
    assert broker.connections == 1


def test_refused_subscription_fails_the_start_and_names_topic_and_reason():
    with ScriptedBroker(suback=b"\x87") as broker:
        faults = []
        link = Link(broker.address, "a", on_fault=faults.append)
        link.subscribe("secret/#", lambda t, p: None)
        with pytest.raises(DeviceUnreachable, match=r"secret/#: Not authorized"):
            link.start(5)
    assert faults[0].kind is FaultKind.SUBSCRIBE_REFUSED


class ScriptedBroker:
    """Sends what no installed broker can be made to send: MQTT v5 reason codes."""

    def __init__(self, suback=b"\x00", answer_to_evict=b""):
        self.suback = suback
        self.answer_to_evict = answer_to_evict
        self.connections = 0

    def __enter__(self):
        self.server = socket.create_server(("127.0.0.1", 0))
        self.address = BrokerAddress("127.0.0.1", self.server.getsockname()[1])
        self.thread = threading.Thread(target=self._serve, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.server.shutdown(socket.SHUT_RDWR)
        self.server.close()
        self.thread.join(5)

    def _serve(self):
        while True:
            try:
                client, _ = self.server.accept()
            except OSError:
                return
            self.connections += 1
            with client, client.makefile("rb") as stream:
                while header := stream.read(2):
                    body = stream.read(header[1])
                    kind = header[0] >> 4
                    if kind == 1:
                        client.sendall(b"\x20\x03\x00\x00\x00")
                    elif kind == 3 and body[2:].startswith(b"evict"):
                        client.sendall(self.answer_to_evict)
                        break
                    elif kind == 8:
                        client.sendall(struct.pack(">BB2sB", 0x90, 4, body[:2], 0) + self.suback)


@broker_test
def test_publication_refused_by_the_access_list_is_a_fault(mosquitto, links):
    with mosquitto.start(access_list="topic read #\ntopic write open/#\n") as broker:
        link = links(broker)
        link.start(5)
        assert link.publish("open/x", b"", qos=1)
        assert link.publish("closed/x", b"", qos=1)
        assert eventually(lambda: link.faults)
        assert [fault.kind for fault in link.faults] == [FaultKind.PUBLISH_REFUSED]
        assert "closed/x" in link.faults[0].message
        assert "Not authorized" in link.faults[0].message


@broker_test
def test_publishing_while_disconnected_is_counted_and_keeps_nothing(mosquitto, links):
    with mosquitto.start() as broker:
        link = links(broker)
        link.start(5)
        broker.halt()
        assert eventually(lambda: not link.connected)
        before = link.stats
        payload = bytes(3000)
        held = len(gc.get_objects())
        for qos in (0, 1):
            for _ in range(5000):
                assert not link.publish("x", payload, qos=qos)
        gc.collect()
        assert len(gc.get_objects()) - held < 1000
        assert link.stats.dropped - before.dropped == 10_000
        assert link.stats.sent == before.sent


@broker_test
@pytest.mark.parametrize("qos", [0, 1])
def test_publishing_to_a_frozen_broker_is_bounded(mosquitto, links, qos):
    with mosquitto.start() as broker:
        link = links(broker)
        link.start(5)
        os.kill(broker.pid, signal.SIGSTOP)
        payload = bytes(100_000)
        accepted = sum(link.publish("x", payload, qos=qos) for _ in range(2000))
        os.kill(broker.pid, signal.SIGCONT)
        # What the two socket buffers hold comes on top of our own queue.
        assert accepted * len(payload) < OUT_QUEUE_BYTES + 16_000_000
        assert link.stats.dropped == 2000 - accepted
        assert eventually(lambda: link.publish("x", payload, qos=qos))


@broker_test
def test_nodelay_is_set_on_the_socket(links):
    link = links()
    link.start(5)
    sock = link._connection.client.socket()
    assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) != 0


@broker_test
def test_many_threads_publish_through_one_link_without_loss(links, fresh_topic):
    seen = []
    link = links()
    link.subscribe(fresh_topic, lambda t, p: seen.append(p))
    link.start(5)

    def work(number):
        for count in range(100):
            link.publish(fresh_topic, b"%d %d" % (number, count) + bytes(2000))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert eventually(lambda: len(seen) == 800)
    for number in range(8):
        own = [p for p in seen if p.startswith(b"%d " % number)]
        assert own == [b"%d %d" % (number, count) + bytes(2000) for count in range(100)]


def test_address_never_shows_the_password():
    address = BrokerAddress("h", 1883, "ann", "s3cret")
    assert "s3cret" not in f"{address} {address!r}"
    assert str(address) == "mqtt://ann@h:1883"


@pytest.mark.parametrize("bad", ["", "a/#/b", "a+/b", "a#", "$share/group/a"])
def test_a_malformed_filter_is_rejected_at_once(bad):
    with pytest.raises(ValueError):
        Link(BrokerAddress("h"), "a").subscribe(bad, lambda t, p: None)


def test_a_second_handler_for_one_filter_is_rejected():
    link = Link(BrokerAddress("h"), "a")
    link.subscribe("x", lambda t, p: None)
    with pytest.raises(ValueError, match="already"):
        link.subscribe("x", lambda t, p: None)


@pytest.mark.parametrize(
    ("topic_filter", "topic", "covered"),
    [
        ("a/b", "a/b", True),
        ("a/+", "a/b", True),
        ("a/+", "a", False),
        ("a/+", "a/b/c", False),
        ("+/+", "/b", True),
        ("a/#", "a", True),
        ("a/#", "a/b/c", True),
        ("#", "a/b", True),
        ("#", "$SYS/x", False),
        ("+/x", "$SYS/x", False),
        ("$SYS/#", "$SYS/x", True),
    ],
)
def test_filters_cover_the_topics_of_the_mqtt_specification(topic_filter, topic, covered):
    assert topic_matches(topic_filter, topic) is covered


levels = st.lists(st.sampled_from(["a", "b", ""]), min_size=1, max_size=4)
filters = st.builds(
    lambda head, tail: head + tail,
    st.lists(st.sampled_from(["a", "b", "+", ""]), min_size=1, max_size=3),
    st.sampled_from([[], ["#"]]),
)


@given(first=filters, second=filters, topic=levels)
def test_filters_that_share_a_topic_overlap(first, second, topic):
    both = all(topic_matches("/".join(f), "/".join(topic)) for f in (first, second))
    assert agent.link._filters_overlap(first, second) or not both
    assert agent.link._filters_overlap(first, second) == agent.link._filters_overlap(second, first)


@pytest.mark.parametrize(
    ("first", "second"), [("a/b", "a/c"), ("a/+", "b/+"), ("a/+", "a/b/c"), ("a", "a/b")]
)
def test_filters_without_a_common_topic_do_not_overlap(first, second):
    assert not agent.link._filters_overlap(first.split("/"), second.split("/"))


def test_reconnect_delay_is_capped_and_jittered():
    delays = [agent.link.reconnect_delay_s(attempt) for attempt in range(200)]
    assert max(delays) <= agent.link.RECONNECT_CAP_S
    assert min(delays) > 0
    assert len(set(delays[50:])) > 100


@given(
    capacity=st.integers(1, 5),
    steps=st.lists(st.one_of(st.integers(), st.just("get")), max_size=60),
)
def test_newest_wins_keeps_the_newest_in_order(capacity, steps):
    queue = NewestWins(capacity)
    model = deque(maxlen=capacity)
    lost = 0
    for step in steps:
        if step == "get":
            assert queue.get(0) == (model.popleft() if model else None)
        else:
            expected = model[0] if len(model) == capacity else None
            lost += len(model) == capacity
            model.append(step)
            assert queue.put(step) == expected
        assert len(queue) == len(model) <= capacity
        assert queue.dropped == lost


def test_newest_wins_wakes_a_waiting_worker():
    queue = NewestWins(1)
    got = []
    worker = threading.Thread(target=lambda: got.append(queue.get(10)))
    worker.start()
    queue.put("frame")
    worker.join(5)
    assert got == ["frame"]


def test_newest_wins_closed_releases_workers_and_drops_new_items():
    queue = NewestWins(2)
    queue.put("held")
    results = []
    queue.close()
    worker = threading.Thread(target=lambda: results.extend([queue.get(10), queue.get(10)]))
    worker.start()
    worker.join(5)
    assert results == ["held", None]
    assert queue.put("late") == "late"
    assert queue.dropped == 1
    assert queue.closed
