"""Plans as JSON, in and out. Edit ``decomposition`` and ``rank`` of ``choices``; everything else is there to be read.

``sensitivity`` holds what each layer could have become, by every method and rank: its cost and the damage foretold.
"""

from __future__ import annotations

import json
import operator
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from onnx_lowrank.candidates import Group, group_of, price
from onnx_lowrank.decompositions import DECOMPOSITIONS, is_joint
from onnx_lowrank.types import DENSE, Candidate, LowRankError, Plan

FORMAT = 1


def plan_to_dict(plan: Plan) -> dict[str, Any]:
    """`plan` as JSON holds it."""
    chosen = {(choice.layers, choice.decomposition, choice.rank) for choice in plan.choices}
    return {
        "format": FORMAT,
        "fitted": plan.fitted,
        "dropped_channels": plan.dropped,
        "original": plan.original.__dict__,
        "planned": plan.cost.__dict__,
        "choices": [{"layers": list(choice.layers), **_candidate(choice)} for choice in plan.choices],
        "sensitivity": [
            {
                "layers": list(candidates[0].layers),
                "candidates": [
                    _candidate(c) | {"chosen": (c.layers, c.decomposition, c.rank) in chosen} for c in candidates
                ],
            }
            for candidates in plan.candidates
        ],
        "skips": [skip.__dict__ for skip in plan.skips],
        "notes": list(plan.notes),
    }


def _candidate(candidate: Candidate) -> dict[str, Any]:
    return {
        "decomposition": candidate.decomposition,
        "rank": list(candidate.rank),
        "macs": candidate.cost.macs,
        "params": candidate.cost.params,
        "latency_ms": candidate.cost.latency_ms,
        "error": candidate.error,
    }


def read_plan(source: str | Path) -> dict[str, Any]:
    """The JSON of a saved plan.

    Raises
    ------
    LowRankError
        Where the file is missing or holds no plan.
    """
    try:
        data = json.loads(Path(source).read_text())
    except OSError as error:
        raise LowRankError(f"{source} cannot be read ({error.strerror}): a saved plan was expected") from error
    except (ValueError, RecursionError) as error:
        raise LowRankError(f"{source} is not JSON ({error}): a plan saved with --plan was expected") from error
    if not isinstance(data, dict) or not isinstance(data.get("choices"), list):
        raise LowRankError(f"{source} has no list of 'choices': a plan saved with --plan was expected")
    return data


def check_dropped(data: Mapping[str, Any], dropped: int) -> None:
    """See that a saved plan is of a model with as many dead channels left out as it is carried out on.

    Raises
    ------
    LowRankError
        Where it is not.
    """
    before = data.get("dropped_channels", 0)
    if before != dropped:
        raise LowRankError(
            f"the plan is of the model less {before} dead channel(s), and here it is less {dropped}: give what it was made with "
            f"(drop_dead_channels, and the same align and calibrate)"
        )


def read_choices(data: Mapping[str, Any], groups: Sequence[Group]) -> tuple[Candidate, ...]:
    """The choices of a saved plan for the layers of a model, priced anew; layers that it does not name stay dense.

    Raises
    ------
    LowRankError
        Where it names a layer that the model does not have, one twice, or a rank that a layer cannot have.
    """
    by_layer = {name: group for group in groups for name in group.names}
    chosen: dict[str, Candidate] = {}
    for number, entry in enumerate(data["choices"]):
        where = f"choice {number} of the plan"
        try:
            names, method = [str(name) for name in _listed(entry["layers"])], str(entry["decomposition"])
            rank = tuple(map(operator.index, _listed(entry.get("rank", []))))
            error = float(entry.get("error", 0.0))
        except (TypeError, KeyError, ValueError, AttributeError) as problem:
            raise LowRankError(
                f"{where} cannot be read ({problem!r}): layers, decomposition and rank were expected"
            ) from problem
        unknown = [name for name in names if name not in by_layer]
        if unknown or not names:
            raise LowRankError(
                f"{where} names layer '{(unknown or [''])[0]}', which the model does not have: see inspect"
            )
        group = by_layer[names[0]]
        if method in DECOMPOSITIONS and is_joint(method):
            group = _together(where, names, by_layer)
        elif set(names) != set(group.names):
            raise LowRankError(
                f"{where} names {', '.join(names)}: these layers share a kernel and are decided together: {', '.join(group.names)}"
            )
        twice = [name for name in group.names if name in chosen]
        if twice:
            raise LowRankError(f"{where} decides layer '{twice[0]}' a second time: once was expected")
        choice = group.dense if method == DENSE else price(group, method, rank, error)
        chosen |= dict.fromkeys(group.names, choice)
    each = [chosen.get(name, group.dense) for group in groups for name in group.names]
    return tuple(dict.fromkeys(each))


def _together(where: str, names: Sequence[str], by_layer: Mapping[str, Group]) -> Group:
    """Layers that are decomposed at once, each with a kernel of its own."""
    tied = [name for name in names if len(by_layer[name].layers) > 1]
    if tied:
        raise LowRankError(f"{where} joins layer '{tied[0]}', which shares its kernel already: leave it out")
    return group_of(names, by_layer)


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]
