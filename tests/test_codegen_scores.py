"""Scores in C say what agent/protocol/scores.py says: the same class, entropy and decision."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from agent.protocol.errors import ScoreError
from agent.protocol.plan import AnswerRule
from agent.protocol.scores import answer, normalized_entropy, outcome_probabilities
from exporter.codegen.forms import WARNINGS
from exporter.codegen.scores import ONE, scores_source

if shutil.which("gcc") is None:
    pytest.skip("gcc is not installed", allow_module_level=True)

RULES = {
    "all classes": AnswerRule(logits=tuple(range(10)), classes=tuple(range(10)),
                              dont_know_threshold=0.4),
    "some, and the rest of them": AnswerRule(logits=tuple(range(10)), classes=(3, 7),
                                             dont_know_threshold=0.35),
    "one, and a row for the rest": AnswerRule(logits=(4, "rest"), classes=(4,),
                                              dont_know_threshold=0.6),
}  # fmt: skip
SCALES = (0.004, 0.05, 0.2)


class _Answer(ctypes.Structure):
    _fields_ = tuple(
        (name, ctypes.c_uint32) for name in ("class_position", "entropy", "confidence", "known")
    )


def reader(rule: AnswerRule, scale: float, folder: Path):
    for name, text in scores_source(rule, scale, "p").items():
        (folder / name).write_text(text)
    library = folder / "scores.so"
    sources = [str(folder / "p_scores.c"), str(folder / "shoal_scores.c")]
    flags = ["-std=c99", "-O1", *WARNINGS.split(), "-fsanitize=undefined", "-fPIC", "-shared"]
    subprocess.run(["gcc", *flags, *sources, "-o", str(library)], check=True)
    loaded = ctypes.CDLL(str(library))
    loaded.shoal_scores_answer.restype = _Answer
    table = ctypes.c_char.in_dll(loaded, "p_scores")
    return lambda row: loaded.shoal_scores_answer(ctypes.byref(table), row.ctypes.data_as(
        ctypes.c_void_p))  # fmt: skip


def rows_of_scores(count: int, width: int) -> np.ndarray:
    rng = np.random.default_rng(5)
    spread = rng.choice([2, 10, 40, 128], count)
    rows = np.clip(rng.normal(0, 1, (count, width)) * spread[:, None], -128, 127)
    rows[0], rows[1] = 0, 127
    rows[2] = -128
    rows[2, 0] = 127
    return rows.astype(np.int8)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", RULES)
def test_c_and_python_agree_on_every_row(tmp_path: Path, name: str, scale: float) -> None:
    rule = RULES[name]
    stored = rows_of_scores(2000, len(rule.logits))
    logits = stored.astype(np.float64) * scale
    said = answer(logits, rule)
    entropies = normalized_entropy(outcome_probabilities(logits, rule))
    read = reader(rule, scale, tmp_path)
    found = [read(row) for row in stored]
    assert [rule.classes[a.class_position] for a in found] == said.classes.tolist()
    np.testing.assert_allclose([a.entropy / ONE for a in found], entropies, atol=1e-5)
    np.testing.assert_allclose([a.confidence / ONE for a in found], said.confidences, atol=1e-6)
    # On the threshold itself the two may round apart; nowhere else.
    clear = np.abs(entropies - rule.dont_know_threshold) > 1e-5
    assert clear.mean() > 0.99
    assert (np.array([bool(a.known) for a in found]) == said.known)[clear].all()


def test_more_rows_than_a_byte_counts_are_refused() -> None:
    rows = tuple(range(256))
    rule = AnswerRule(logits=rows, classes=rows, dont_know_threshold=0.5)
    with pytest.raises(ScoreError, match="256 rows"):
        scores_source(rule, 0.1, "p")
