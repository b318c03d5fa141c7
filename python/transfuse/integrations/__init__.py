"""transfuse inside other people's models: Hugging Face's attention dispatch, and modules exchanged in place."""

from __future__ import annotations

from transfuse.integrations.patching import PatchReport, patch, patched, unpatch
from transfuse.integrations.transformers_attention import register_with_transformers

__all__ = ["PatchReport", "patch", "patched", "register_with_transformers", "unpatch"]
