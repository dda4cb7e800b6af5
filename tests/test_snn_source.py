"""Cached results are of this very source: whatever alters it alters their keys."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from exporter.methods.snn import retrain
from exporter.methods.snn.candidates import prune_one
from exporter.methods.snn.source import source_key

PACKAGE = {
    "__init__.py": "",
    "work.py": '''\
"""What is computed."""

from exporter_copy.deep import part
from . import aside


def result(x):
    """Say it."""
    from exporter_copy import late

    return part(x) + aside.ONE + late.TWO
''',
    "deep.py": "import numpy as np\n\n\ndef part(x):\n    return np.add(x, 1)\n",
    "aside.py": "ONE = 1\n",
    "late.py": "TWO = 2\n",
    "other.py": "THREE = 3\n",
}


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "exporter_copy"
    folder.mkdir()
    for name, text in PACKAGE.items():
        (folder / name).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("exporter.methods.snn.source.OURS", frozenset({"exporter_copy"}))
    for name in [name for name in sys.modules if name.startswith("exporter_copy")]:
        monkeypatch.delitem(sys.modules, name)
    return folder


def key() -> str:
    source_key.cache_clear()
    return source_key("exporter_copy.work")


@pytest.mark.parametrize("name", ["work.py", "deep.py", "aside.py", "late.py"])
def test_key_changes_with_every_module_that_is_imported_anywhere(package, name):
    before = key()
    altered = PACKAGE[name].replace("1", "7").replace("2", "8").replace(" + aside", " - aside")
    (package / name).write_text(altered)

    assert key() != before


def test_key_does_not_change_with_what_computes_nothing(package):
    before = key()
    (package / "other.py").write_text("THREE = 4\n")
    altered = (
        PACKAGE["work.py"].replace("Say it.", "Tell it.").replace("return", "# so\n    return")
    )
    (package / "work.py").write_text(altered.replace("part(x) + aside", "part(x)  +  aside"))

    assert key() == before


def test_source_of_a_function_is_its_own():
    source_key.cache_clear()
    assert source_key(prune_one) != source_key(retrain._lesson)
    assert source_key(prune_one) == source_key(prune_one)


def test_module_without_source_is_an_error():
    with pytest.raises(ModuleNotFoundError, match=r"exporter\.nowhere"):
        source_key("exporter.nowhere")


def test_keys_of_results_hold_the_source(monkeypatch):
    """Of search, lessons and retraining: another source gives another key."""
    from keras import Input, Model, layers

    from exporter.methods.snn.candidates import Pruning
    from exporter.methods.snn.distill import DistillOptions
    from exporter.methods.snn.options import Snn, SnnOptions
    from exporter.methods.snn.profile import make_profile
    from exporter.methods.snn.prune import PrunedSnn, PruneOptions

    image = Input((4,), name="image")
    base = Model(image, layers.Dense(2, name="logits")(image))
    frames = np.eye(4, dtype=np.float32)
    profile = make_profile(base, frames, np.array([0, 1, 0, 1]))
    pruned = PrunedSnn((0,), {}, (0, 1), 0, 0, 1.0, 1.0, 1.0, ())

    def keys() -> list[str]:
        lessons = retrain._Lessons(base, DistillOptions(), frames, (1.0,), (0.0,))
        work = retrain._Retraining(base, SnnOptions(), frames, lessons, ())
        snn = Snn("snn-a", None, pruned, (0, 1))  # type: ignore[arg-type]
        return [
            Pruning(profile, PruneOptions(target_ratio=0.5), frames).key((0,)),
            lessons.key(0),
            work.key(snn),
        ]

    before = keys()
    assert keys() == before
    for module in ("candidates", "retrain"):
        monkeypatch.setattr(f"exporter.methods.snn.{module}.source_key", lambda *_: "altered")
    assert not set(keys()) & set(before)
