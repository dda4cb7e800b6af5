"""Int8 .tflite files as C99, ahead of time: no interpreter, no allocation.

What the generated code computes equals TensorFlow Lite for Microcontrollers byte for byte.
"""

from exporter.codegen.emit import GeneratedPiece, generate, write_piece

__all__ = ["GeneratedPiece", "generate", "write_piece"]
