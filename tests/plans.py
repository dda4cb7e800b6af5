"""Hypothesis strategies that make valid plans."""

from __future__ import annotations

from hypothesis import strategies as st

from agent.protocol.plan import FRAME, AnswerRule, Exit, Fusion, Node, Output, Piece, Plan, Strategy


@st.composite
def answer_rules(draw: st.DrawFn, classes: int) -> AnswerRule:
    """A rule over some of `classes` classes, with foreign rows or a rest row in any order."""
    own = draw(st.lists(st.integers(0, classes - 1), min_size=1, max_size=5, unique=True))
    foreign = [c for c in range(classes) if c not in own and draw(st.booleans())]
    rest = ["rest"] if draw(st.booleans()) or len(own) + len(foreign) < 2 else []
    rows = draw(st.permutations([*own, *foreign, *rest]))
    return AnswerRule.model_validate(
        {"classes": own, "logits": rows, "dont_know_threshold": draw(st.floats(0, 1))}
    )


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    """Any number of devices with a piece each, up to two tiers above them."""
    labels = draw(st.lists(st.text(max_size=6), min_size=2, max_size=6, unique=True))
    count = draw(st.integers(1, 4))
    pieces = []
    for i in range(count):
        output = draw(st.sampled_from(Output))
        rule = draw(answer_rules(len(labels))) if output is Output.ANSWER else None
        pieces.append(Piece(name=f"piece-{i}", inputs=(FRAME,), outputs=(output,), answer=rule))
    leaves = [Node(name=f"n{i}", device=f"d{i}", tier=0, piece=f"piece-{i}") for i in range(count)]
    heard = tuple(leaf.name for leaf in leaves)
    if fronted := draw(st.booleans()):
        pieces.append(
            Piece(name="rest", inputs=tuple(p.name for p in pieces), outputs=(Output.SCORES,))
        )
    fusions = st.sampled_from([fusion for fusion in Fusion if fusion is not Fusion.ENTROPY_MLP])
    strategies = []
    for s in range(draw(st.integers(1, 3))):
        nodes = list(leaves)
        above = draw(st.integers(1, 2))
        for tier in range(1, above + 1):
            top = tier == above
            nodes.append(
                Node(
                    name=f"t{tier}",
                    device="desk",
                    tier=tier,
                    piece="rest" if top and fronted else None,
                    listens_to=heard if tier == 1 else (*heard, "t1"),
                    fusion=draw(fusions),
                )
            )
        early = draw(st.lists(st.integers(0, above - 1), unique=True).map(sorted))
        exits = [Exit(tier=tier, threshold=draw(st.floats(0, 1))) for tier in early]
        strategies.append(
            Strategy(
                name=f"s{s}", nodes=tuple(nodes), exits=(*exits, Exit(tier=above, threshold=1.0))
            )
        )
    return Plan(
        method="made-up",
        classes=tuple(labels),
        pieces=tuple(pieces),
        strategies=tuple(strategies),
    )
