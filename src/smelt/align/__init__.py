"""Preference objectives: what makes a policy prefer the chosen answer to the rejected one.

A pure function of summed log-probabilities of the answers (prompt tokens never count), read by parameter name:

    policy_chosen, policy_rejected         [b]  log pi(y | x), with gradient
    reference_chosen, reference_rejected   [b]  log pi_ref(y | x), without

It returns one loss per pair, [b]; the loop divides the sum by the number of pairs of the whole effective batch.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

__all__ = ["READS", "Preference"]

READS = ("policy_chosen", "policy_rejected", "reference_chosen", "reference_rejected")


class Preference(Protocol):
    def __call__(self, *log_probabilities: Tensor) -> Tensor: ...
