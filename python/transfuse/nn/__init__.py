"""Modules on the fused ops: norms, feed-forward, attention and positions."""
