"""The table of recipes: pipelines, whole. A new one is one file and one line here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from onnx_lowrank.config import Config
from onnx_lowrank.planning.candidate_sets import Policy
from onnx_lowrank.planning.planner import Planner
from onnx_lowrank.recipes import automatic_rank, default, joint_svd, orthogonal, vbmf_cp
from onnx_lowrank.search.bench import Attempt, Bench
from onnx_lowrank.types import Plan, member_of


@dataclass(frozen=True)
class Recipe:
    """A pipeline.

    Parameters
    ----------
    configure
        What it makes of the options: it lays down some, and refuses those that contradict it.
    policy
        How plans are made under these options.
    search
        Finds the plan to end with.
    plan
        The plan by itself, without a model made or measured; None where it is only known at the end.
    """

    configure: Callable[[Config], Config]
    policy: Callable[[Config], Policy]
    search: Callable[[Planner, Bench], Attempt]
    plan: Callable[[Planner], Plan] | None = None


RECIPES: dict[str, Recipe] = {
    "default": Recipe(default.configure, default.policy, default.search, default.plan_of),
    "joint_svd": Recipe(joint_svd.configure, joint_svd.policy, joint_svd.search, joint_svd.plan_of),
    "vbmf_cp": Recipe(vbmf_cp.configure, vbmf_cp.policy, vbmf_cp.search),
    "orthogonal": Recipe(orthogonal.configure, orthogonal.policy, orthogonal.search),
    "automatic_rank": Recipe(automatic_rank.configure, automatic_rank.policy, automatic_rank.search, default.plan_of),
}

__all__ = ["RECIPES", "Recipe", "find_recipe"]


def find_recipe(name: str) -> Recipe:
    """The member called `name`.

    Raises
    ------
    LowRankError
        For a name that is not in the table.
    """
    return member_of(RECIPES, "recipe", name)
