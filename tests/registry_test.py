"""A wrong name is answered with the right one."""

import pytest

from mlm.registry import Registry, nearest


def test_a_known_name_is_a_plain_lookup():
    registry = Registry("optimizer", adafactor=1, adamw=2)
    registry["muon"] = 3
    assert registry["adafactor"] == 1
    assert sorted(registry) == ["adafactor", "adamw", "muon"]


def test_a_typo_raises_with_the_kind_and_the_nearest_name():
    registry = Registry("optimizer", adafactor=1, adamw=2)
    with pytest.raises(KeyError, match=r"no optimizer named 'adafctor'; did you mean 'adafactor'\?"):
        registry["adafctor"]


def test_a_name_near_nothing_lists_all():
    registry = Registry("schedule", cosine=1, linear=2)
    with pytest.raises(KeyError, match=r"known: cosine, linear"):
        registry["zzzz"]


def test_an_empty_registry_says_so():
    assert nearest("anything", []) == "known: none"


def test_a_long_list_is_cut_with_its_count():
    shown = nearest("zzzz", [f"task_{i:03d}" for i in range(90)])
    assert "task_039" in shown
    assert "task_040" not in shown
    assert "(90 in all)" in shown


def test_the_nearest_comes_first():
    assert nearest("mt5_smal", ["mt5_base", "mt5_small", "tiny"]).startswith("did you mean 'mt5_small'")
