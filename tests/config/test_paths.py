"""Paths of a recipe: relative to it, expanded, and told where they lead nowhere."""

import pytest

from megagap.config import load_recipe
from tests.config.good import faults_of


def test_source_paths_are_relative_to_the_recipe_and_globs_expand(recipe, tmp_path):
    for shard in ("b", "a"):
        (tmp_path / f"web_{shard}_text_document.idx").touch()
    settings = load_recipe(
        recipe(data__sources=[{"path": "web_*"}, {"path": "x/fr_text_document", "name": "français"}])
    )
    web, french = settings.data.sources
    assert web.paths == [str(tmp_path / f"web_{shard}_text_document") for shard in "ab"]
    assert french.paths == [str(tmp_path / "x/fr_text_document")] and french.name == "français"


@pytest.mark.parametrize("ending", ["", ".bin", ".idx"])
def test_a_source_may_be_named_by_one_of_its_files(recipe, tmp_path, ending):
    for shard in ("b", "a"):
        (tmp_path / f"web_{shard}_text_document.idx").touch()
    settings = load_recipe(recipe(data__sources=[{"path": f"web_*{ending}"}, {"path": f"fr_text_document{ending}"}]))
    web, french = settings.data.sources
    assert web.paths == [str(tmp_path / f"web_{shard}_text_document") for shard in "ab"]
    assert french.paths == [str(tmp_path / "fr_text_document")] and french.name == "fr"


def test_a_source_named_by_a_file_is_noted_so_that_the_ending_is_left_out(recipe, tmp_path):
    sources = [{"path": "fr_text_document.bin"}, {"path": ["en_text_document.idx", "de_text_document"]}]
    for settings in (load_recipe(recipe(data__sources=sources)), load_recipe(recipe(data__validation=sources))):
        assert settings.notes == (
            "the source fr_text_document.bin is named by one of its files: leave .bin out, the prefix names the pair",
            "the source en_text_document.idx is named by one of its files: leave .idx out, the prefix names the pair",
        )
    (tmp_path / "odd.bin.idx").touch()  # a pair whose prefix ends so
    assert load_recipe(recipe(data__sources=[{"path": "odd.bin"}])).notes == ()


def test_a_folder_with_brackets_in_its_name_is_no_pattern(recipe, tmp_path):
    for folder in ("e1", "e[1]"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "fr_text_document.idx").touch()
    path = recipe().rename(tmp_path / "e[1]" / "recipe.toml")
    assert load_recipe(path).data.sources[0].paths == [str(tmp_path / "e[1]" / "fr_text_document")]


def test_a_tokenizer_that_is_nowhere_is_a_fault_with_the_place_looked_at(recipe, tmp_path):
    for given in ("bpe/tokenizer.json", "hf:bpe", "bpe" + "x" * 5000):
        message = faults_of(recipe(data__tokenizer=given))
        assert f"{tmp_path}/bpe" in message and "does not exist" in message
    (tmp_path / "bpe").mkdir()
    assert load_recipe(recipe(data__tokenizer="hf:bpe")).data.tokenizer == f"hf:{tmp_path / 'bpe'}"
    assert load_recipe(recipe(data__tokenizer="none"), needs_data=False).data.tokenizer == f"{tmp_path / 'none'}"


def test_paths_that_cannot_be_made_absolute_are_faults(recipe, tmp_path, monkeypatch):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    path = recipe()
    assert "run.dir" in faults_of(path, [f"run.dir={tmp_path}/loop/x"])
    odd = tmp_path / "\udcff"
    odd.mkdir()
    path.rename(odd / "recipe.toml")
    assert "is not valid UTF-8" in faults_of(odd / "recipe.toml")
    (odd / "recipe.toml").rename(path)
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert "the working directory was removed" in faults_of(path)
