"""Local losses: how a block is told what to do. One file for each, all behind one protocol.

class Local(bpfx.losses.LocalLoss):            # registered with @bpfx.losses.register
    name = "mine"
    def head(self, boundary):                  # once for every boundary, at conversion
        return MyHead(boundary.feature)        # names, shapes, kind: image, tokens or vector

class MyHead(bpfx.losses.Head):                # a module; its parameters are trained with the block
    uses_task = True                           # what it needs beside the features
    def forward(self, given):                  # at every step
        return given.judged(self.linear(self.pool(given.feature)))   # a scalar
"""

from bpfx.losses.auglocal import AugLocal
from bpfx.losses.dgl import DGL
from bpfx.losses.feature_reconstruction import FeatureReconstruction
from bpfx.losses.forward_forward import ForwardForward, LengthNorm
from bpfx.losses.gim import GIM
from bpfx.losses.infopro import InfoPro
from bpfx.losses.loco import LoCo
from bpfx.losses.predsim import PredSim
from bpfx.losses.protocol import Boundary, Feature, Given, Head, LocalLoss, Predictor, Target
from bpfx.losses.registry import Assignment, Choice, Weighted, get, names, register
from bpfx.losses.supervised import LinearHead, Supervised, TailHead
from bpfx.losses.tied_readout import TiedReadout
from bpfx.losses.views import Views

for _loss in (
    Supervised,
    TiedReadout,
    DGL,
    AugLocal,
    PredSim,
    InfoPro,
    LoCo,
    GIM,
    ForwardForward,
    FeatureReconstruction,
):
    register(_loss)

__all__ = [
    "DGL",
    "GIM",
    "AugLocal",
    "FeatureReconstruction",
    "ForwardForward",
    "InfoPro",
    "LengthNorm",
    "LoCo",
    "PredSim",
    "Assignment",
    "Boundary",
    "Choice",
    "Feature",
    "Given",
    "Head",
    "LinearHead",
    "LocalLoss",
    "Predictor",
    "Supervised",
    "TailHead",
    "Target",
    "TiedReadout",
    "Views",
    "Weighted",
    "get",
    "names",
    "register",
]
