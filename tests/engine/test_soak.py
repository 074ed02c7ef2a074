"""A sixtieth of the soak of examples/soak.py: everything goes wrong, and nothing is left behind."""

import pytest
import soak


@pytest.mark.slow
def test_a_short_soak(capsys):
    soak.main(["--requests", "1700", "--seats", "2", "--seed", "1"])
    printed = capsys.readouterr().out
    assert " requests in " in printed
    for what in ("answered", "refused", "left", "cancelled", "(reloads)", "files are gone"):
        assert f"'{what}'" in printed
