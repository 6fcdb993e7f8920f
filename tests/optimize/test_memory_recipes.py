"""The recipes of ``docs/memory.md`` are counted, and those that are promised to fit do."""

import pytest
from memory_recipes import PAGE, RECIPES, Recipe, line, written


def name(recipe: Recipe) -> str:
    return "-".join((recipe.model, recipe.gpus, *recipe.options)).replace("--", "").replace(" ", "=")


@pytest.mark.parametrize(
    "recipe",
    [
        pytest.param(recipe, id=name(recipe), marks=[pytest.mark.slow] if number != 2 else [])
        for number, recipe in enumerate(RECIPES)
    ],
)
def test_the_page_says_what_is_counted(recipe: Recipe) -> None:
    assert written(recipe, PAGE.read_text(encoding="utf-8")) == line(recipe)


@pytest.mark.parametrize(
    ("model", "gpus", "tokens"),
    [
        ("Llama-3.1-8B", "1xH100-80GB", "2 x 2,048"),
        ("Qwen3-4B", "1xA100-40GB", "2 x 2,048"),
        ("Qwen2.5-7B", "1xH100-80GB", "2 x 32,768"),
    ],
)
def test_there_is_a_recipe_that_fits(model: str, gpus: str, tokens: str) -> None:
    rows = [written(recipe, PAGE.read_text(encoding="utf-8")) or "" for recipe in RECIPES]
    assert any(row.startswith(f"| {model}, {tokens} tokens | {gpus} |") and "| yes |" in row for row in rows)
