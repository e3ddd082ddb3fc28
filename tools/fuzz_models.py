"""Random models, decomposed: many more of those that the tests draw.

    python -m tools.fuzz_models [--examples 2000] [--seed 0]

Stops at the first that fails, made as small as it can be, and prints it as ONNX text.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter

import hypothesis
import onnx
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers import Feeds
from tests.random_models import METHODS, check, models


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    seen: Counter[str] = Counter()
    start = time.monotonic()

    @hypothesis.seed(args.seed)
    @settings(
        max_examples=args.examples, deadline=None, database=None, suppress_health_check=list(hypothesis.HealthCheck)
    )
    @given(models(), st.sampled_from(METHODS), st.sampled_from([0.3, 0.6, 0.9]))
    def each(case: tuple[onnx.ModelProto, Feeds], method: str, budget: float) -> None:
        seen["models"] += 1
        seen["decomposed"] += check(case, method, budget) > 0

    each()
    print(f"{seen['models']} models, {seen['decomposed']} of them decomposed, {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
