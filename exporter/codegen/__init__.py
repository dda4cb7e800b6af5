"""Int8 .tflite files as C99, ahead of time: no interpreter, no allocation.

What the generated code computes equals TensorFlow Lite for Microcontrollers byte for byte.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from exporter.codegen.emit import GeneratedPiece, generate, prefix_of, write_piece

__all__ = ["GeneratedPiece", "generate", "prefix_of", "write_piece"]


def __getattr__(name: str) -> Any:
    """Load the generator when it is first used: `shoal --help` loads this package, not numpy."""
    if name in __all__:
        from exporter.codegen import emit

        return getattr(emit, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
