"""What a command said on standard error, which it breaks into lines wherever they end."""

from __future__ import annotations

import pytest


def complaint(capsys: pytest.CaptureFixture[str]) -> str:
    """In one line, so that a test can look for words."""
    return " ".join(capsys.readouterr().err.split())
