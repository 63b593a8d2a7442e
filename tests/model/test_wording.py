from __future__ import annotations

from model.wording import counted, in_one_line


def test_a_noun_follows_its_number() -> None:
    assert [counted(n, "trial") for n in (0, 1, 2000)] == ["0 trials", "1 trial", "2,000 trials"]
    assert [counted(n, "GPU") for n in (0.5, 1.0, 8.0)] == ["0.5 GPUs", "1 GPU", "8 GPUs"]
    assert counted(2, "loss", "losses") == "2 losses"


def test_what_an_error_says_fits_a_line() -> None:
    assert in_one_line(ValueError("two\n  lines")) == "two lines"
    assert in_one_line(EOFError()) == "EOFError"
