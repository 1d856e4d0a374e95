"""What is untrusted is looked at in a process of its own."""

from types import SimpleNamespace

import pytest
from transformers.integrations import deepspeed

from crow.limits import limited


def test_a_model_is_looked_at_without_zero_3(monkeypatch: pytest.MonkeyPatch) -> None:
    config = SimpleNamespace(is_zero3=lambda: True)
    monkeypatch.setattr(deepspeed, "_hf_deepspeed_config_weak_ref", lambda: config)
    assert not limited(deepspeed.is_deepspeed_zero3_enabled)
    assert deepspeed.is_deepspeed_zero3_enabled()


def test_what_is_no_exception_is_told_like_one() -> None:
    class Panic(BaseException): ...

    def panic() -> None:
        raise Panic("retry-limit-in-match over")

    with pytest.raises(RuntimeError, match="^retry-limit-in-match over$"):
        limited(panic)
