"""``python -m benchmarks.recipes`` trains by each recipe, and evaluates θ on validation classes."""

import pytest

from benchmarks import recipes
from benchmarks.recipes import RECIPES, Recipe, Stage


def test_the_stages_of_every_recipe_share_the_time():
    for recipe in RECIPES.values():
        assert sum(stage.share for stage in recipe.stages) == 1


def test_a_stage_changes_only_its_own_settings():
    one, other = Stage().preset(0, 100), Stage(tasks=16, queries=5, final_fraction=1.0).preset(0, 100)
    assert (one.outer.tasks, one.outer.queries, one.outer.final_fraction) == (8, 15, 0.0)
    assert (other.outer.tasks, other.outer.queries, other.outer.final_fraction) == (16, 5, 1.0)
    assert one.strength == other.strength == 0.5 and one.validation == other.validation


def test_the_table_has_the_best_recipe_first():
    common = {"interval": 0.01, "meta_steps": 10, "tasks": 80, "seconds": 5.0}
    rows = [{"recipe": name, "accuracy": value} | common for name, value in (("a", 0.8), ("b", 0.9), ("a", 0.7))]
    first, second = recipes.table(rows).splitlines()
    assert first.startswith("b ") and "90.0 %" in first
    assert second.startswith("a ") and "75.0 %  (80.0 ± 1.0, 70.0 ± 1.0)" in second


@pytest.mark.slow("trains in two stages, and times each")
def test_a_recipe_of_two_stages_with_a_mean_is_run(omniglot_directory, quick_compilation, monkeypatch):
    monkeypatch.setattr(recipes, "CHANGED", recipes.CHANGED | {"network.filters": 4})
    monkeypatch.setattr(recipes, "VALIDATION_TASKS", 20)
    stages = Stage(0.5, tasks=2, queries=1), Stage(0.5, tasks=1, queries=1)
    found = recipes.run(Recipe(stages, average=True), 0, 2.0, omniglot_directory)
    assert found["meta_steps"] >= 4 and found["meta_steps"] < found["tasks"] < 2 * found["meta_steps"]
    assert 0 <= found["accuracy"] <= 1 and found["interval"] > 0 and found["seconds"] > 0
