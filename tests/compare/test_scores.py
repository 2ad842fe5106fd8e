"""Scores in a file: what is read is what was written, of the very checkpoint and protocol."""

from __future__ import annotations

import numpy as np
from made_up import PARTITION, draw, run

from metatrain.compare.scores import key_of, load, save
from metatrain.config import EvaluateConfig


def test_read_back_and_only_under_their_key(tmp_path):
    url = str(tmp_path / "a.npz")
    scores = run("a", 0, draw(0.7, 1), draw(0.9, 2)).scores
    key = key_of(100, "fingerprint", EvaluateConfig())
    assert load(key, url) is None
    save(scores, key, url)
    found = load(key, url)
    assert (found.dataset, found.checkpoint, found.partitions, found.notes, found.facts) == (
        scores.dataset, scores.checkpoint, scores.partitions, scores.notes, scores.facts,
    )  # fmt: skip
    for name in ("values", "by_support_size"):
        written, read = getattr(scores.values[PARTITION], name), getattr(found.values[PARTITION], name)
        assert list(written) == list(read)
        assert all(np.array_equal(written[k], read[k], equal_nan=True) for k in written)
    assert found.values[PARTITION].tasks.tolist() == scores.values[PARTITION].tasks.tolist()
    for other in (
        key_of(101, "fingerprint", EvaluateConfig()),
        key_of(100, "another", EvaluateConfig()),
        key_of(100, "fingerprint", EvaluateConfig(draws=2)),
    ):
        assert load(other, url) is None
    assert load(key_of(100, "fingerprint", EvaluateConfig(tasks_per_batch=7)), url) is not None
    (tmp_path / "a.npz").write_bytes((tmp_path / "a.npz").read_bytes()[:200])
    assert load(key, url) is None
