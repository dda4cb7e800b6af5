"""Every command of README and docs/methods.md is run, or checked as far as one machine can.

How, says tests/readme.py.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.readme import ReadmeError, Session, blocks, check_unrun
from tests.toy_fleet import copy_bundle

ROOT = Path(__file__).parent.parent
PAGES = (ROOT / "README.md", ROOT / "docs" / "methods.md")

SAMPLE = """\
# Sample

<!-- test: expect no mistakes -->
```sh
$ shoal check fleet.yaml
device  kind
pi-door pi-4
```

Start it, and ask:

<!-- test: needs bundle -->
```sh
$ shoal up --bundle bundle \\
    --broker 127.0.0.1:1883
```

1. Then:

   <!-- test: needs digit.npy -->
   <!-- test: expect node-1 -->
   ```sh
   $ shoal monitor --bundle bundle --broker 127.0.0.1:1883
   $ shoal infer digit.npy --bundle bundle --broker 127.0.0.1:1883 2>&1 | tee said.txt
   $ grep entropies said.txt
   ```

<!-- test: exit 2 -->
<!-- test: expect did you mean 'check'? -->
```sh
$ shoal chekc
```

```yaml
shoal: 1
```

<!-- test: skip takes a Raspberry Pi -->
```sh
$ scp -r bundle pi@heron:
$ ssh pi@heron 'shoal run --device heron --bundle bundle'
```

```sh
$ make demo ARGS=--json
$ pip install 'shoal[exporter,dask]'
```
"""


@pytest.mark.broker
def test_sample_is_followed_from_its_first_command_to_its_last(
    tmp_path: Path, mosquitto: object
) -> None:
    with Session(tmp_path, {"bundle": copy_bundle}) as session:
        for block in blocks(SAMPLE):
            session.follow(block)

        assert "entropy" in (session.folder / "said.txt").read_text()


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("```sh\n$ shoal check nowhere.yaml\n```", "line 2: .*ended with 2, not 0"),
        ("```sh\n$ true\n$ false | cat\n$ true\n```", "line 3: .*ended with 1"),
        ("<!-- test: expect blue -->\n```sh\n$ echo green\n```", "line 2: .*lacks 'blue'"),
        ("<!-- test: exit 2 -->\n```sh\n$ true\n```", "line 3: .*ended with 0, not 2"),
        ("<!-- test: needs a.wav -->\n```sh\n$ true\n```", "line 2: .*make a.wav"),
        ("```sh\n$ shoal up --bundle nowhere\n```", "line 2: .*ended with 2:"),
    ],
)
def test_readme_that_does_not_do_what_it_says_fails_with_its_line(
    tmp_path: Path, text: str, problem: str
) -> None:
    with Session(tmp_path) as session, pytest.raises(ReadmeError, match=f"(?s){problem}"):
        for block in blocks(text):
            session.follow(block)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("<!-- test: skipp it -->\n```sh\n$ true\n```", "line 1: no such marker"),
        ("<!-- test: skip -->\n```sh\n$ true\n```", "line 1: no such marker"),
        ("<!-- test: exit 2 -->\nwords\n```sh\n$ true\n```", "line 1: .*without an sh block"),
        ("```console\n$ true\n```", "line 2: .*not marked sh"),
        ("```sh\nshoal up\n```", "line 1: .*without a command"),
        ("```sh\n$ true\n", "line 1: .*does not end"),
    ],
)
def test_command_that_no_test_would_see_is_refused(text: str, problem: str) -> None:
    with pytest.raises(ReadmeError, match=problem):
        blocks(text)


@pytest.mark.parametrize(
    ("command", "problem"),
    [
        ("shoal chekc", "did you mean 'check'"),
        ("shoal run --devise heron", "--devise"),
        ("shoal run", "--device"),
        ("ssh heron shoal run --device heron --brokr x", "--brokr"),
        ("ssh heron 'pip install shoal && shoal upp'", "did you mean 'up'"),
        ("make demmo", "no target 'demmo'"),
        ("sudo pip install 'shoal[gpu]'", "no such extra: gpu"),
        ("python -m benchmarks.nothing", "no module"),
        ("python -m benchmarks.demo --jsno", "no --jsno"),
        ("frobnicate --all", "nothing is known"),
    ],
)
def test_command_that_cannot_be_run_is_checked_all_the_same(command: str, problem: str) -> None:
    with pytest.raises(ReadmeError, match=f"(?s){re.escape(problem)}"):
        check_unrun(7, command)


@pytest.mark.parametrize(
    "command",
    [
        "shoal run --device heron --bundle bundle --broker 10.0.0.5:1883",
        "shoal export model.keras --data data.npz --fleet fleet.yaml -o bundle",
        "ssh heron",
        "python3 -m venv .venv && source .venv/bin/activate",
        "make test ARGS=-x",
        "pip install '.[exporter,dev]'",
    ],
)
def test_right_command_that_cannot_be_run_passes(command: str) -> None:
    check_unrun(7, command)


@pytest.mark.broker
@pytest.mark.timeout(900)
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_of_the_page_does_what_it_says(
    tmp_path: Path, mosquitto: object, page: Path
) -> None:
    with Session(tmp_path) as session:
        for block in blocks(page.read_text(encoding="utf-8")):
            session.follow(block)


@pytest.mark.parametrize("target", ["demo", "test", "test-pi", "bench", "lint"])
def test_makefile_has_the_targets_that_the_project_promises(target: str) -> None:
    check_unrun(0, f"make {target}")
