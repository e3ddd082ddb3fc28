"""The table of decompositions. A new one is one file and one line here."""

from __future__ import annotations

from onnx_lowrank.decompositions.channel_svd import SVD, ChannelSVD, ChannelSVDIn
from onnx_lowrank.decompositions.cp import CP3, CP4
from onnx_lowrank.decompositions.joint_svd import JointBoth, JointLeft, JointRight, JointSVD
from onnx_lowrank.decompositions.separable import Separable
from onnx_lowrank.decompositions.spatial_svd import SpatialSVD
from onnx_lowrank.decompositions.tucker2 import Tucker2
from onnx_lowrank.types import Decomposition, LayerStatistics, member_of

DECOMPOSITIONS: dict[str, Decomposition] = {
    member.name: member
    for member in (
        SVD(),
        ChannelSVD(),
        ChannelSVDIn(),
        SpatialSVD(),
        Tucker2(),
        CP3(),
        CP4(),
        Separable(),
        JointLeft(),
        JointRight(),
        JointBoth(),
    )
}

__all__ = ["DECOMPOSITIONS", "find_decomposition", "fits_to", "is_joint"]


def fits_to(name: str, seen: LayerStatistics | None) -> bool:
    """Whether a member can be fitted to what layers have `seen`: patches too long for a moment take one that goes by outputs."""
    return seen is not None and (seen.patches is None or goes_by_outputs(name))


def goes_by_outputs(name: str) -> bool:
    """Whether the fit of a member to samples needs no more than the covariance of the outputs."""
    return bool(getattr(find_decomposition(name), "by_outputs", False))


def is_joint(name: str) -> bool:
    """Whether a member decomposes several layers at once."""
    return isinstance(find_decomposition(name), JointSVD)


def find_decomposition(name: str) -> Decomposition:
    """The member called `name`.

    Raises
    ------
    LowRankError
        For a name that is not in the table.
    """
    return member_of(DECOMPOSITIONS, "decomposition", name)
