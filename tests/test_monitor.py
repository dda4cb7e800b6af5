"""The monitor: any traffic becomes events and a state, and the state can be seen."""

import io
import json
import os
import select
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from agent.cli import main
from agent.link import BrokerAddress, Link
from agent.monitor.events import (
    Connection,
    Event,
    Names,
    Rejected,
    as_json,
    as_text,
    read_event,
)
from agent.monitor.state import (
    KEPT_DECISIONS,
    MAX_STRANGERS,
    FleetState,
    Rate,
    apply,
    apply_all,
    initial,
    snapshot,
)
from agent.monitor.view import render
from agent.monitor.watch import Watcher
from agent.protocol.fleet import parse_fleet
from agent.protocol.messages import (
    Answer,
    Blank,
    Choice,
    Decision,
    DeviceInfo,
    DeviceStats,
    Escalation,
    Header,
    Latency,
    MessageKind,
    Request,
    Status,
    TensorPart,
    encode,
    encode_text,
)
from agent.protocol.scores import Vote
from agent.protocol.topics import Topics
from agent.target import Target
from tests.support import eventually

TOPICS = Topics("reef")
FLEET_TEXT = """
shoal: 1
fleet: reef
aggregator: desk
devices:
  - {id: pi-a, kind: pi-4}
  - {id: mcu-b, kind: mcu}
  - {id: desk, kind: pi-5, tier: edge}
"""
FLEET = parse_fleet(FLEET_TEXT)
PLAN = 0x1A2B3C4D
NAMES = Names(
    plan=f"{PLAN:08x}",
    nodes=(("snn-a", "snn-b", "fuse"),),
    classes=("cat", "dog", "eel"),
    device_of={"snn-a": "pi-a", "snn-b": "mcu-b", "fuse": "desk"},
)
T0 = 1_700_000_000.0


def header(request: int = 7, node: int | None = 0) -> Header:
    return Header(PLAN, request, 0xB0071, 0, node)


def answer(request: int = 7, known: bool = True) -> Answer:
    return Answer(header(request), 1, known, 0.25 if known else 1.0, 0.9, 120, 3400)


def decision(
    request: int = 7, missing: tuple[str, ...] = (), label: str | None = "dog"
) -> Decision:
    return Decision(
        plan=NAMES.plan,
        request=f"{request:016x}",
        boot="000b0071",
        label=label,
        best_guess="dog",
        entropy=0.2 if label else 1.0,
        tier=1,
        strategy="all",
        entropies={"snn-a": 0.25},
        contributors=("snn-a",),
        missing=missing,
        bytes_received=52,
        latency=Latency(total_ms=12.5, queue_ms=1, inference_ms=9, wire_ms=2, fusion_ms=0.5),
    )


def info(device: str = "pi-a", simulated: bool = False, plan: str = NAMES.plan) -> DeviceInfo:
    nodes = tuple(node for node, runs_on in NAMES.device_of.items() if runs_on == device)
    return DeviceInfo(
        device=device, boot="000b0071", plan=plan, version="0.1.0", runtime="litert", nodes=nodes,
        piece_sha256={}, simulated=simulated, pid=4242,
    )  # fmt: skip


def stats(device: str = "pi-a") -> DeviceStats:
    return DeviceStats(
        device=device, boot="000b0071", requests=5, answers=5, dropped=0, rejected=1,
        inference_ms_p50=3.4, memory_bytes=62_000_000, uptime_s=60.0,
    )  # fmt: skip


def choice(request: int = 7, *, late: bool = False, answered: str | None = "e5-server") -> Choice:
    return Choice(
        plan=NAMES.plan, request=f"{request:016x}", boot="000b0071", strategy="e5-server",
        answered=answered, limit_ms=100.0, round_trip_ms=None if answered is None else 80.0,
        late=late, bits_per_s=1.5e6,
    )  # fmt: skip


def seen(topic: str, payload: bytes, at_s: float = T0) -> Event:
    return read_event(TOPICS, topic, payload, at_s)


def started() -> FleetState:
    return initial(FLEET, NAMES, T0)


def shown(state: FleetState, width: int = 160) -> str:
    text = io.StringIO()
    Console(file=text, width=width).print(render(state, T0 + 1))
    return text.getvalue()


# Events.


@pytest.mark.parametrize(
    ("topic", "payload", "content"),
    [
        (TOPICS.device("pi-a", "status"), b"online", Status.ONLINE),
        (TOPICS.device("pi-a", "info"), encode_text(info()), info()),
        (TOPICS.device("pi-a", "stats"), encode_text(stats()), stats()),
        (TOPICS.device("pi-a", "res"), encode(answer()), None),
        (TOPICS.escalation, encode(Escalation(header(), 1)), Escalation(header(), 1)),
        (
            TOPICS.device("pi-a", "feat"),
            encode(Blank(header(), MessageKind.FEATURES)),
            Blank(header(), MessageKind.FEATURES),
        ),
        (TOPICS.decision, encode_text(decision()), decision()),
        (TOPICS.last_decision, encode_text(decision()), decision()),
        (TOPICS.choice, encode_text(choice()), choice()),
    ],
)
def test_message_is_decoded_by_its_topic(topic, payload, content):
    event = seen(topic, payload)

    assert not isinstance(event.content, Rejected)
    assert content is None or event.content == content
    assert event.size_bytes == len(payload)


@pytest.mark.parametrize(
    ("topic", "payload", "reason"),
    [
        (TOPICS.device("pi-a", "status"), b"onlin", "not a status"),
        (TOPICS.device("pi-a", "res"), encode(answer())[:-1], "checksum"),
        (TOPICS.device("pi-a", "res"), encode(Escalation(header(), 1)), "escalation on a topic"),
        (
            TOPICS.device("pi-a", "res"),
            encode(Blank(header(), MessageKind.SCORES)),
            "scores on a topic for ANSWER",
        ),
        (TOPICS.device("pi-a", "info"), encode_text(info("mcu-b")), "device 'mcu-b' on the topic"),
        (TOPICS.device("pi-a", "req"), encode(answer()), "no topic"),
        (f"{TOPICS.root}/res", encode(answer()), "no topic"),
        ("elsewhere/infer/req", b"", "no topic"),
    ],
)
def test_payload_that_is_no_message_of_its_topic_is_rejected_with_a_reason(topic, payload, reason):
    event = seen(topic, payload)

    assert isinstance(event.content, Rejected)
    assert reason in event.content.reason


def test_answer_is_printed_with_names_of_node_and_class():
    event = seen(TOPICS.device("pi-a", "res"), encode(answer()))

    text, fields = as_text(event, NAMES), as_json(event, NAMES)

    assert "snn-a: 'dog' entropy 0.250" in text
    assert (fields["node"], fields["label"], fields["inference_ms"]) == ("snn-a", "dog", 3.4)


def test_vote_is_printed_with_the_name_of_its_class():
    voting = replace(answer(known=False), vote=Vote(2, 0x8000))
    event = seen(TOPICS.device("pi-a", "res"), encode(voting))

    assert "don't know, perhaps 'dog'" in as_text(event, NAMES)
    assert "if not its own 'eel' 0.500" in as_text(event, NAMES)
    assert as_json(event, NAMES)["vote"] == {
        "class_index": 2, "label": "eel", "confidence": pytest.approx(0.5, abs=1e-4)
    }  # fmt: skip
    silent = seen(TOPICS.device("pi-a", "res"), encode(answer()))
    assert as_json(silent, NAMES)["vote"] is None


def test_answer_of_another_plan_is_printed_with_numbers():
    event = seen(TOPICS.device("pi-a", "res"), encode(answer()))

    fields = as_json(event, replace(NAMES, plan="ffffffff"))

    assert (fields["node"], fields["label"]) == ("#0", "#1")


def test_tensors_are_printed_with_shape_and_on_request_with_values():
    part = TensorPart(MessageKind.FEATURES, header(), np.array([[True, False]]), 1, 2)
    event = seen(TOPICS.device("pi-a", "feat"), encode(part))

    assert "1x2 bool" in as_text(event, NAMES)
    assert "values" not in as_json(event, NAMES)
    assert as_json(event, NAMES, values=True)["values"] == [[True, False]]


def test_values_that_json_cannot_hold_are_null():
    part = TensorPart(MessageKind.SCORES, header(), np.array([1.5, np.nan, np.inf], "f4"), 1, 2)
    event = seen(TOPICS.device("pi-a", "scores"), encode(part))

    assert as_json(event, NAMES, values=True)["values"] == [1.5, None, None]


# State.

_TENSOR = np.arange(6, dtype=np.float32).reshape(2, 3)
_DEVICES = st.sampled_from(["pi-a", "mcu-b", "desk", "stranger"]) | st.from_regex(
    r"[a-z0-9][a-z0-9-]{0,8}", fullmatch=True
)
_LEAVES = st.sampled_from(["status", "info", "stats", "res", "scores", "feat", "cmd"])
_U32 = st.integers(0, 2**32 - 1)
_HEADERS = st.builds(
    Header,
    st.just(PLAN) | _U32,
    st.integers(0, 9),
    _U32,
    st.integers(0, 255),
    st.none() | st.integers(0, 0xFFFE),
)
_UNIT = st.floats(0, 1, width=32)
_PAYLOADS = st.one_of(
    st.sampled_from([status.value.encode() for status in Status]),
    st.builds(encode_text, st.builds(info, _DEVICES, st.booleans())),
    st.builds(encode_text, st.builds(stats, _DEVICES)),
    st.builds(encode_text, st.builds(choice, st.integers(0, 9), late=st.booleans())),
    st.builds(
        encode_text,
        st.builds(
            decision,
            st.integers(0, 9),
            st.lists(st.sampled_from(["snn-a", "snn-b", "ghost"])).map(tuple),
            st.sampled_from([None, "cat", "[red]not markup[/red]"]),
        ),
    ),
    st.builds(
        encode,
        st.builds(Answer, _HEADERS, st.integers(0, 0xFFFF), st.just(True), _UNIT, _UNIT, _U32, _U32)
        | st.builds(Request, _HEADERS, st.integers(1, 9), st.none() | st.just(_TENSOR))
        | st.builds(
            TensorPart,
            st.sampled_from([MessageKind.SCORES, MessageKind.FEATURES]),
            _HEADERS,
            st.just(_TENSOR),
            _U32,
            _U32,
        )
        | st.builds(Escalation, _HEADERS, st.integers(0, 255))
        | st.builds(Blank, _HEADERS, st.just(MessageKind.SCORES)),
    ),
    st.binary(max_size=60),
)
_TOPICS = st.one_of(
    st.builds(TOPICS.device, _DEVICES, _LEAVES),
    st.sampled_from(
        [
            TOPICS.request,
            TOPICS.escalation,
            TOPICS.decision,
            TOPICS.last_decision,
            TOPICS.choice,
            "other/topic",
        ]
    ),
)
_EVENTS = st.builds(seen, _TOPICS, _PAYLOADS, st.floats(T0 - 10, T0 + 100)) | st.builds(
    Event,
    st.just(T0),
    st.just(""),
    st.none(),
    st.just(0),
    st.builds(Connection, st.booleans(), st.text()),
)


@settings(max_examples=150, deadline=None)
@given(st.lists(_EVENTS, max_size=30))
def test_any_history_gives_a_state_that_can_be_shown(events):
    state = started()
    before = snapshot(state, T0)

    after = apply_all(events, state)

    assert snapshot(state, T0) == before
    assert {"pi-a", "mcu-b", "desk"} <= set(after.devices)
    assert len(after.decisions) <= KEPT_DECISIONS
    assert len(after.devices) <= 3 + MAX_STRANGERS
    json.dumps(snapshot(after, T0 + 1), allow_nan=False)
    assert shown(after)
    for event in events:
        assert as_text(event, NAMES) or isinstance(event.content, Connection)
        json.dumps(as_json(event, NAMES, values=True), allow_nan=False)


def test_garbage_from_many_names_does_not_fill_memory():
    events = [seen(TOPICS.device(f"x{i}", "status"), b"online") for i in range(1000)]

    state = apply_all(events, started())

    assert len(state.devices) == 3 + MAX_STRANGERS


def test_decision_counts_who_was_missing_by_device():
    event = seen(TOPICS.decision, encode_text(decision(missing=("snn-b",))))

    state = apply(event, started())

    assert state.devices["mcu-b"].missed == 1
    assert state.devices["pi-a"].missed == 0
    assert (state.decided, state.incomplete, state.unknown) == (1, 1, 0)


def test_node_of_a_device_is_learnt_from_the_device_where_no_bundle_is():
    events = [
        seen(TOPICS.device("mcu-b", "info"), encode_text(info("mcu-b"))),
        seen(TOPICS.decision, encode_text(decision(missing=("snn-b",)))),
    ]

    state = apply_all(events, initial(FLEET, Names(), T0))

    assert state.devices["mcu-b"].missed == 1


def test_repeated_decision_and_its_retained_copy_count_once():
    payload = encode_text(decision(missing=("snn-b",)))
    events = [seen(topic, payload) for topic in (TOPICS.decision, TOPICS.last_decision)]

    state = apply_all([*events, *events], started())

    assert (state.decided, len(state.decisions), state.devices["mcu-b"].missed) == (1, 1, 1)


def test_decision_from_before_is_shown_but_not_counted():
    state = apply(seen(TOPICS.last_decision, encode_text(decision())), started())

    assert (state.decided, len(state.decisions)) == (0, 1)


def test_choices_are_counted_and_shown_with_bandwidth_and_misses():
    told = [choice(1), choice(2, late=True), choice(3, answered="e1-device")]
    told.append(choice(4, late=True, answered=None))

    state = apply_all([seen(TOPICS.choice, encode_text(x)) for x in told], started())

    found = snapshot(state, T0 + 1)["choices"]
    assert (found["told"], found["late"], found["answered_by_another"]) == (4, 2, 1)
    assert found["strategies"] == {"e5-server": 4}
    assert found["bits_per_s"] == 1.5e6
    text = shown(state)
    for what in ("1.5 Mbit/s", "2 of 4 late", "1 answered by another", "e1-device", "nobody"):
        assert what in text
    assert "e5-server, answered by nobody of 100 ms, late, link 1.5 Mbit/s" in as_text(
        seen(TOPICS.choice, encode_text(told[-1])), NAMES
    )


def test_rate_is_the_mean_of_the_last_seconds():
    rate = Rate(T0 - 100)
    for i in range(100):
        rate = rate.add(T0 + i / 10)

    assert rate.per_second(T0 + 9.99) == pytest.approx(10, rel=0.02)
    assert rate.per_second(T0 + 60) == 0


def test_rate_of_a_fresh_watcher_is_not_thinned_by_time_before_it():
    rate = Rate(T0)
    for i in range(20):
        rate = rate.add(T0 + i / 10)

    assert rate.per_second(T0 + 2) == pytest.approx(10)


def test_rate_survives_a_clock_that_goes_back():
    rate = Rate(T0).add(T0 + 5).add(T0)

    assert rate.buckets == ((int(T0) + 5, 2),)


def test_lost_connection_is_the_states_problem_until_it_is_back():
    lost = Event(T0, "", None, 0, Connection(False, "broker gone"))
    back = Event(T0, "", None, 0, Connection(True, "broker back"))

    state = apply(lost, started())

    assert state.problem == "broker gone"
    assert "broker gone" in shown(state)
    assert apply(back, state).problem is None


# View.


def test_view_shows_devices_rates_decisions_and_who_was_missing():
    events = [
        seen(TOPICS.device("pi-a", "status"), b"online"),
        seen(TOPICS.device("pi-a", "info"), encode_text(info())),
        seen(TOPICS.device("pi-a", "stats"), encode_text(stats())),
        seen(TOPICS.device("pi-a", "res"), encode(answer())),
        seen(TOPICS.device("mcu-b", "status"), b"offline"),
        seen(TOPICS.device("mcu-b", "info"), encode_text(info("mcu-b", simulated=True))),
        seen(TOPICS.decision, encode_text(decision(missing=("snn-b",)))),
        seen(TOPICS.decision, encode_text(decision(8, label=None))),
    ]

    text = shown(apply_all(events, started()))

    assert "reef plan 1a2b3c4d" in text
    assert "1 of 3 devices online" in text
    assert "8.0 messages/s" in text
    assert "2 decisions · 1 don't know · 1 with someone missing" in text
    [pi, mcu, desk] = [
        next(line for line in text.splitlines() if line.strip().startswith(name))
        for name in ("pi-a", "mcu-b", "desk")
    ]
    assert "online" in pi and "3.40 ms" in pi and "62.0 MB" in pi and "'dog' 0.250" in pi
    assert "offline" in mcu and "(simulated)" in mcu
    assert "never seen" in desk
    assert "'dog'" in text and "snn-a 0.25" in text and "12.5 ms" in text
    assert "don't know (perhaps 'dog')" in text


def test_view_marks_strangers_other_plans_and_garbage():
    events = [
        seen(TOPICS.device("stranger", "status"), b"online"),
        seen(TOPICS.device("pi-a", "info"), encode_text(info(plan="deadbeef"))),
        seen(TOPICS.device("pi-a", "res"), b"garbage"),
    ]

    text = shown(apply_all(events, started()), width=200)

    assert "not in the fleet file" in text
    assert "other plan deadbeef" in text
    assert "1 rejected; last: dev/pi-a/res" in text


def test_names_on_the_wire_are_not_read_as_markup():
    event = seen(TOPICS.decision, encode_text(decision(missing=("[red]x[/red]",), label="[b]y")))
    device = seen(TOPICS.device("[b]z", "status"), b"online")

    text = shown(apply_all([event, device], started()), width=200)

    assert "[red]x[/red]" in text and "'[b]y'" in text and "[b]z" in text


def test_names_on_the_wire_cannot_steer_the_terminal():
    decided = seen(TOPICS.decision, encode_text(decision(missing=("\x1b[2J",), label="\x9b2J")))
    device = seen(TOPICS.device("\x1b[31m", "status"), b"online\x1b")

    text = shown(apply_all([decided, device], started()), width=200)
    lines = as_text(decided, NAMES) + as_text(device, NAMES)

    assert not {"\x1b", "\x9b"} & set(text + lines)


# Over a real broker.


@pytest.fixture
def fleet_file(tmp_path, mosquitto):
    name = f"reef-{tmp_path.name[-20:].lower().replace('_', '-')}"
    text = FLEET_TEXT.replace("reef", name) + f"broker: {{port: {mosquitto.port}}}\n"
    path = tmp_path / "fleet.yaml"
    path.write_text(text)
    return path


@pytest.fixture
def topics(fleet_file):
    return Topics(parse_fleet(fleet_file.read_text()).fleet)


@pytest.fixture
def agent(mosquitto, topics):
    address = BrokerAddress(mosquitto.host, mosquitto.port)
    with Link(address, f"agent-of-{topics.fleet}") as link:
        link.start(5.0)
        link.publish(topics.device("pi-a", "info"), encode_text(info()), qos=1, retain=True)
        link.publish(topics.device("pi-a", "status"), b"online", qos=1, retain=True)
        yield link
        for leaf in ("info", "status"):
            link.publish(topics.device("pi-a", leaf), b"", qos=1, retain=True)


@pytest.mark.broker
def test_monitor_once_shows_what_the_broker_retains(fleet_file, agent):
    shown_text = CliRunner().invoke(main, ["monitor", "--once", "--fleet", str(fleet_file)])
    printed = CliRunner().invoke(main, ["monitor", "--once", "--json", "--fleet", str(fleet_file)])

    assert shown_text.exit_code == printed.exit_code == 0, shown_text.output + printed.output
    assert "1 of 3 devices online" in shown_text.stdout
    snapshot_now = json.loads(printed.stdout)
    devices = {device["id"]: device for device in snapshot_now["devices"]}
    assert snapshot_now["messages_per_s"] == devices["pi-a"]["messages_per_s"] == 0
    assert devices["pi-a"]["status"] == "online"
    assert devices["pi-a"]["info"]["runtime"] == "litert"
    assert devices["mcu-b"]["status"] is None


@pytest.mark.broker
def test_sub_decodes_the_binary_plane(fleet_file, agent, topics):
    command = [sys.executable, "-m", "agent", "sub", "--json", "--count", "4"]
    with subprocess.Popen(
        [*command, "--fleet", str(fleet_file)], stdout=subprocess.PIPE, text=True
    ) as process:
        # The retained messages say that it listens.
        kinds = [json.loads(process.stdout.readline())["kind"] for _ in range(2)]
        agent.publish(topics.device("pi-a", "res"), encode(answer()))
        agent.publish(topics.device("pi-a", "feat"), b"\xff" * 40)
        result, bad = (json.loads(line) for line in process.stdout)

    assert process.returncode == 0
    assert sorted(kinds) == ["info", "status"]
    assert (result["kind"], result["class_index"], result["entropy"]) == ("answer", 1, 0.25)
    assert (bad["kind"], bad["device"]) == ("rejected", "pi-a")
    assert "version 255" in bad["reason"]


@pytest.mark.broker
def test_interrupted_monitor_ends_with_130(fleet_file, agent):
    command = [sys.executable, "-m", "agent", "monitor", "--json", "--fleet", str(fleet_file)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline()
        process.send_signal(signal.SIGINT)
        _, talk = process.communicate(timeout=20)

    assert process.returncode == 130
    assert talk.strip() == "interrupted"


@pytest.mark.broker
def test_live_view_follows_the_fleet_on_a_terminal(fleet_file, agent, topics):
    terminal, process_side = os.openpty()
    command = [sys.executable, "-m", "agent", "monitor", "--fleet", str(fleet_file)]
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "200", "LINES": "40"}
    with subprocess.Popen(
        command, stdin=process_side, stdout=process_side, stderr=process_side, env=environment
    ) as process:
        os.close(process_side)
        screen = bytearray()

        def shows(words: bytes) -> bool:
            if select.select([terminal], [], [], 0.05)[0]:
                screen.extend(os.read(terminal, 65536))
            return words in screen

        assert eventually(lambda: shows(b"1 of 3 devices online"), 20.0), screen
        agent.publish(topics.decision, encode_text(decision(missing=("snn-b",))), qos=1)
        assert eventually(lambda: shows(b"1 with someone missing"), 20.0), screen
        process.send_signal(signal.SIGINT)
        assert eventually(lambda: shows(b"interrupted"), 20.0), screen
    os.close(terminal)

    assert process.returncode == 130
    assert screen.count(b"\x1b[?25l") == screen.count(b"\x1b[?25h")  # the cursor is back


@pytest.mark.broker
def test_watcher_tells_of_a_broker_that_goes_and_comes_back(mosquitto):
    with mosquitto.start() as broker:
        target = Target(FLEET, None, BrokerAddress(broker.host, broker.port))
        with Watcher(target) as watcher:
            changes = []

            def connection_events():
                events = watcher.take(0.0)
                changes.extend(e.content.up for e in events if isinstance(e.content, Connection))
                return changes

            broker.halt()
            assert eventually(lambda: connection_events() == [False], 10.0)
            broker.launch(10.0)
            assert eventually(lambda: connection_events() == [False, True], 15.0)


def test_state_keeps_up_with_a_busy_fleet():
    event = seen(TOPICS.device("pi-a", "res"), encode(answer()))
    begin_s = time.process_time()

    apply_all([event] * 2000, started())

    # 10 devices at 50 requests/s are 600 messages/s; this is a guard against quadratic growth.
    assert time.process_time() - begin_s < 1.0
