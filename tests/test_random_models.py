"""Models drawn at random: decomposed whole they compute what they did, and at any lower rank they stay valid."""

from __future__ import annotations

from collections import Counter

import hypothesis
import onnx
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers import Feeds
from tests.random_models import METHODS, check, models


def test_a_random_model_is_the_same_at_full_rank_and_valid_at_any() -> None:
    seen: Counter[str] = Counter()

    @settings(
        max_examples=120,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @given(models(), st.sampled_from(METHODS), st.sampled_from([0.3, 0.6, 0.9]))
    def each(case: tuple[onnx.ModelProto, Feeds], method: str, budget: float) -> None:
        seen["models"] += 1
        seen["decomposed"] += check(case, method, budget) > 0

    each()
    assert seen["decomposed"] > seen["models"] / 4, seen
