"""mergekit recipes: YAML in, what each output tensor is made from out. Pure: no store, no weights."""

from mergepipe.merge.recipe.document import Document, InputModel, OutputSlice, Recipe, parse_recipe, read_recipe
from mergepipe.merge.recipe.outline import Outline, OutputTensor, Source
from mergepipe.merge.recipe.reference import ModelReference
from mergepipe.merge.recipe.tokenizer import ModelToken, Token, Tokenizer

__all__ = [
    "Document",
    "InputModel",
    "ModelReference",
    "ModelToken",
    "Outline",
    "OutputSlice",
    "OutputTensor",
    "Recipe",
    "Source",
    "Token",
    "Tokenizer",
    "parse_recipe",
    "read_recipe",
]
