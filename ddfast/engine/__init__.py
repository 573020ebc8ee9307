"""The class-batched gradient engine: weight gradients of all classes at once, and their matching.

One pass over the images of all classes serves every class, because only the sum over images knows
classes apart; and the gradient of a distance between weight gradients needs no graph of a gradient.
"""

from __future__ import annotations

from ddfast.engine.features import Features, features, images_at_once
from ddfast.engine.gradients import class_gradients, match_gradients, segment_gradients
from ddfast.engine.segments import weight_names
from ddfast.engine.student import Student, Tangent

__all__ = [
    "Features",
    "Student",
    "Tangent",
    "class_gradients",
    "features",
    "images_at_once",
    "match_gradients",
    "segment_gradients",
    "weight_names",
]
