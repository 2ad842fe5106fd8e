import pytest

from metatrain.malloc import MALLOC, with_malloc


def test_a_setting_that_is_there_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in MALLOC:
        monkeypatch.delenv(name, raising=False)
    assert with_malloc() == {"env_vars": MALLOC}
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.arena_max=1")
    assert with_malloc() == {}
