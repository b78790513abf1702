"""Compilation of operators: nothing is compiled on the user's machine."""

from deepspeed._features import not_built_module

not_built_module("deepspeed.ops.op_builder", "compilation of operators on this machine")
