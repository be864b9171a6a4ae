"""Whether a whole model is in training or in evaluation, found in less time than putting it there takes.

Room: walking modules.
"""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

# These change nothing in a module that is in the mode already; what another class's does is its own affair.
_PLAIN = (nn.Module.train, PreTrainedModel.train)


def stays_in_mode(module: nn.Module, training: bool) -> bool:
    """Whether `train(training)` would change nothing in what is inside the module, nor in the module's own mode.

    Trainers call it in each step, and for the several hundred modules of a model with adapters it takes as long as a
    GPU for some of its blocks, which wait for it.
    """
    if module.training is not training:
        return False
    kinds: set[type[nn.Module]] = set()
    level = [*module.children()]
    while level:
        if {one.training for one in level} != {training}:
            return False
        kinds.update(map(type, level))
        level = [child for one in level for child in one._modules.values() if child is not None]
    return all(kind.train in _PLAIN for kind in kinds)
