"""Direct preference optimization: learn from pairs of answers without a reward model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from annotated_types import Ge, Gt, Lt
from torch import Tensor
from torch.nn.functional import logsigmoid

from smelt.spec import Paper

__all__ = ["DPO"]


@dataclass(frozen=True)
class DPO:
    """loss = -(1 - e) log sigma(h) - e log sigma(-h), h = b ((w - w_ref) - (l - l_ref)); nats per pair, b `beta`, e `smoothing`.

    w, l: summed log-probabilities of the chosen and the rejected answer under the policy, w_ref, l_ref under the
    frozen reference; [b] each -> [b]. Log 2 at policy = reference. Gradient: dL/dw = -b (sigma(-h) - e) = -dL/dl:
    only the difference is pushed, so w may fall while l falls faster. beta is the weight of the KL divergence to
    the reference in the problem this solves: larger stays nearer. `smoothing` is the share of pairs believed to be
    labelled the wrong way round (conservative DPO); with it the loss has its minimum at sigma(h) = 1 - e.

    Cost: one forward and backward of the policy and one forward of the reference over both answers.

    Differs from the paper: nothing at smoothing = 0, the default; smoothing is the authors' later note on noisy labels.
    """

    paper: ClassVar = Paper("Direct Preference Optimization", "arXiv:2305.18290", "eq. 7")
    beta: Annotated[float, Gt(0)] = 0.1
    smoothing: Annotated[float, Ge(0), Lt(0.5)] = 0.0

    def __call__(self, policy_chosen: Tensor, policy_rejected: Tensor, reference_chosen: Tensor, reference_rejected: Tensor) -> Tensor:
        h = self.beta * ((policy_chosen - reference_chosen) - (policy_rejected - reference_rejected))
        return -(1 - self.smoothing) * logsigmoid(h) - self.smoothing * logsigmoid(-h)
