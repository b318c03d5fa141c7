"""Modules on the fused ops: norms, feed-forward, attention and positions."""
import importlib
_WHERE = {"ActivatedLinear": "feed_forward", "FeedForward": "feed_forward", "Attention": "attention", "LayerNorm": "norm", "RMSNorm": "norm", "RelativePositionBias": "positions", "SinusoidalPositions": "positions", "RopeScaling": "rotary", "RotaryEmbedding": "rotary", "apply_rotary": "rotary"}
def __getattr__(name):
    if name in _WHERE: return getattr(importlib.import_module("transfuse.nn." + _WHERE[name]), name)
    raise AttributeError(name)
