"""Some hostile requests beside ordinary ones; `python -m tests.fuzz` sends thousands."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fuzz import fuzz


@pytest.mark.long
def test_hostile_requests_change_no_answer_and_end_nothing(model_dir: Path, tmp_path: Path) -> None:
    findings = fuzz(model_dir, tmp_path, seed=5, num_requests=300, seconds=300)
    assert not findings.lines
    assert findings.counts["200"] > 30  # it is not all refused at the door
    assert findings.counts["ordinary compressed"] + findings.counts["ordinary reused"] > 8
