"""Claims of jepa_hf/evaluation/progress.py."""

import logging

import pytest

from jepa_hf.evaluation import progress


@pytest.mark.parametrize(("interval", "lines"), [(1000, 0)])
def test_without_a_terminal_progress_is_a_line_now_and_then(
    interval: int,
    lines: int,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """None for short work, and nothing of a bar's control characters."""
    monkeypatch.setattr(progress, "_LINE_INTERVAL_S", interval)
    with caplog.at_level(logging.INFO, "jepa_hf"), progress.progress_bar(6000, "model", "samples") as bar:
        for _ in range(3):
            bar.update(2000)
    expected = [f"model: {count} of 6000 samples" for count in (0, 2000, 4000, 6000)][:lines]
    assert [message.partition(",")[0] for message in caplog.messages] == expected
    assert "\r" not in capfd.readouterr().err


def test_nothing_is_shown_unless_asked_for(capfd: pytest.CaptureFixture[str]) -> None:
    with progress.progress_bar(2, "model", "samples", show=False) as bar:
        bar.update(2)
    assert capfd.readouterr() == ("", "")
