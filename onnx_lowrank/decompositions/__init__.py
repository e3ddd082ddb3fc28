"""The table of decompositions. A new one is one file and one line here."""

from __future__ import annotations

from onnx_lowrank.decompositions.channel_svd import SVD, ChannelSVD, ChannelSVDIn
from onnx_lowrank.decompositions.cp import CP3, CP4
from onnx_lowrank.decompositions.joint_svd import JointBoth, JointLeft, JointRight, JointSVD
from onnx_lowrank.decompositions.separable import Separable
from onnx_lowrank.decompositions.spatial_svd import SpatialSVD
from onnx_lowrank.decompositions.tucker2 import Tucker2
from onnx_lowrank.types import Decomposition, member_of

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

__all__ = ["DECOMPOSITIONS", "find_decomposition", "is_joint"]


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
