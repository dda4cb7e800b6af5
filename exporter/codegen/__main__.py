"""`python -m exporter.codegen`: the same as `shoal codegen`."""

from exporter.codegen.command import codegen

codegen()
