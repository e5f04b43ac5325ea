"""How soft a soft label is."""

import math
from collections.abc import Sequence


def softmax_entropy(scores: Sequence[float], temperature: float) -> float:
    """Entropy of softmax(scores / temperature), in nats: 0 for a hard label, log(number of scores) for equal scores."""
    largest = max(scores)
    weights = [math.exp((score - largest) / temperature) for score in scores]
    total = sum(weights)
    return math.log(total) - sum(w * math.log(w) for w in weights if w > 0) / total
