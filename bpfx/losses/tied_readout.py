"""The model's own last layers as a frozen readout at every boundary."""

from __future__ import annotations

from bpfx.errors import BpfxError
from bpfx.losses.protocol import Boundary, LocalLoss, Predictor


class TiedReadout(LocalLoss):
    """The task loss on what the model's own norm and unembedding make of a block's output.

    Nothing is copied and nothing of the readout is trained by it: a block learns to write what the model's last layers
    already read. It costs no parameters, and suits pretrained language models, whose blocks all write to one stream.

    Source: the logit lens (nostalgebraist, 2020), used as a local loss.
    """

    name = "tied_readout"

    def head(self, boundary: Boundary) -> Predictor:
        if boundary.tail is None:
            shapes = ", ".join(f"{f.name} {f.shape}" for f in boundary.features)
            raise BpfxError(
                f"tied_readout reads a block's output with the model's own last layers, but what crosses behind block "
                f"{boundary.index} ({shapes}) is no input that they take; use 'supervised' there"
            )
        return boundary.tail(False)
