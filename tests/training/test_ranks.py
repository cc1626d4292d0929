"""What a program says while it waits."""

from __future__ import annotations

import time

from lorapre_dist.training.run import ranks


def test_a_long_wait_is_explained_once_on_rank_0(monkeypatch, capsys):
    monkeypatch.setattr(ranks, "PATIENCE", 0.02)
    with ranks.saying("for the hub: dataset c4"):
        time.sleep(0.2)
    assert capsys.readouterr().err == "waiting    for the hub: dataset c4\n"
    monkeypatch.setenv("RANK", "1")
    with ranks.saying("for the hub: dataset c4"):
        time.sleep(0.1)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(ranks, "PATIENCE", 60.0)
    with ranks.saying("for the hub: dataset c4"):
        pass
    assert capsys.readouterr().err == ""
