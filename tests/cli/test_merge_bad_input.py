"""Recipes and plans that cannot be carried out: an error with the place, a hint, and a store that stays as it was."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mergepipe.store import Store
from support.checkpoints import raw, write_checkpoint
from support.family import base_weights, fine_tune, write_model
from support.stores import object_files, state_of, writers_left

TIES = """\
merge_method: ties
base_model: base
models:
  - model: expert0
    parameters:
      weight: 0.5
      density: 0.5
  - model: expert1
    parameters: {weight: 0.3}
"""
TASK = TIES.replace("ties", "task_arithmetic")


@pytest.fixture
def fails(call: Callable[..., Any], filled: Path) -> Callable[..., str]:
    """Runs a command that must fail without a trace: what it says. ``loosely``: it may keep statistics."""

    def run(*words: object, code: int = 4, loosely: bool = False) -> str:
        with Store.open(filled) as store:
            before, files = state_of(store), object_files(store)
            answer = call(*words, code=code)
            assert answer.out == ""
            assert answer.err.startswith("error: ")
            assert "\nhint: " in answer.err
            assert len(answer.err) < 1000
            again = call(*words, "--json", code=code)
            assert again.out == ""
            assert again.error["hint"]
            after = state_of(store)
            for database in ("refs", "commits", "objects", "results") if loosely else before["rows"]:  # type: ignore
                assert after["rows"][database] == before["rows"][database]  # type: ignore[index]
            assert object_files(store) == files
            assert writers_left(store) == []
        return str(answer.err)

    return run


@pytest.fixture
def recipe(fails: Callable[..., str], filled: Path) -> Callable[..., str]:
    """Merges a recipe that must fail."""

    def run(text: str | bytes, *options: object, **how: Any) -> str:
        path = filled / "recipe.yml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        said = fails("merge", "recipe.yml", "--as", "new", *options, **how)
        assert fails("plan", "recipe.yml", *options, **how) == said
        return said

    return run


def edited(old: str, new: str, text: str = TIES) -> str:
    assert old in text
    return text.replace(old, new)


BAD = {
    "an unknown method": (edited("ties", "teis"), 1, "no method 'teis'", "'ties'"),
    "an unknown parameter": (edited("density", "densty"), 7, "no parameter 'densty'", "'density'"),
    "an unknown parameter of the merge": (TIES + "parameters: {lamda: 1}\n", 10, "no parameter 'lamda'", "'lambda'"),
    "a parameter of the merge at one model": (edited("weight: 0.5", "lambda: 0.5"), 6, "one value for all", "Move it"),
    "NaN": (edited("0.3", ".nan"), 9, "'weight' is nan", "finite"),
    "infinity": (edited("0.3", "-.inf"), 9, "'weight' is -inf", "finite"),
    "more than float32 holds": (edited("0.3", "1e39"), 9, "weight is 1e+39", "how much"),
    "a huge integer": (edited("0.3", "9" * 90), 9, "weight is 999", "how much"),
    "an integer of many digits": (edited("0.3", "9" * 9000), 9, "weight is '999", "how much"),
    "text for a number": (edited("0.3", "heavy"), 9, "weight is 'heavy'", "how much"),
    "a density over 1": (edited("density: 0.5", "density: 1.5"), 7, "density is 1.5", "share"),
    "a density under 0": (edited("density: 0.5", "density: -0.1"), 7, "density is -0.1", "share"),
    "a gradient that leaves the range": (edited("density: 0.5", "density: [0.5, 2]"), 7, "density is 2", "share"),
    "a rule out of range": (
        edited("density: 0.5", "density: [{filter: nothing, value: 3}, {value: 1}]"), 7, "density is 3", "share",
    ),
    "a number for a switch": (TIES + "parameters:\n  normalize: 2\n", 11, "true or false", "divide"),
    "an unknown model": (edited("expert1", "expret1"), 8, "'expret1' is no ref", "'expert1'"),
    "an unknown model of a hub": (edited("expert1", "org/Nothing-7B"), 8, "no folder", "mp ingest"),
    "an unknown base": (edited("base_model: base", "base_model: basis"), 2, "'basis'", "'base'"),
    "a revision": (edited("expert1", "expert1@main"), 8, "revision 'main'", "mp ingest"),
    "a name with a zero": (edited("expert1", '"a\\0b"'), 8, "a\\x00b", "mp ingest"),
    "a name that moves the cursor": (edited("expert1", '"a\\e[2Jb"'), 8, "no folder", "mp ingest"),
    "a name too long for the system": (edited("expert1", "x" * 9000), 8, "no folder", "mp ingest"),
    "a file that is no model": (edited("expert1", "/etc/passwd"), 8, "neither", "config.json"),
    "no models": ("merge_method: ties\nbase_model: base\nmodels: []\n", 3, "nothing to merge", "model"),
    "neither models nor slices": ("merge_method: ties\n", 1, "exactly one of models, slices", "Keep or add"),
    "only the base": ("merge_method: ties\nbase_model: base\nmodels:\n- model: base\n", 1, "beside its base", "Name"),
    "no base": (edited("base_model: base\n", ""), 1, "ties needs a base", "base_model"),
    "the same model twice": (edited("expert1", "expert0"), 8, "stands twice", "sum of both"),
    "a circle": (
        "name: a\nmerge_method: linear\nmodels:\n- model: b\n---\nname: b\nmerge_method: linear\nmodels:\n- model: a\n",
        1, "needs its own result", "documents",
    ),
    "a merge of itself": ("name: a\nmerge_method: linear\nmodels:\n- model: a\n", 1, "its own result", "documents"),
    "an error in a later document": (
        "name: a\nmerge_method: linear\nmodels:\n- model: base\n---\nmerge_method: ties\nbase_model: a\nmodels:\n"
        "- model: expret0\n", 9, "'expret0'", "'expert0'",
    ),
    "an unknown field": (TIES + "colour: red\n", 10, "no field 'colour'", "Known"),
    "two models for slerp": (
        "merge_method: slerp\nbase_model: base\nparameters: {t: 0.5}\nmodels:\n- model: expert0\n- model: expert1\n",
        1, "takes 1 expert", "mp methods",
    ),
    "slerp without t": (
        "merge_method: slerp\nbase_model: base\nmodels:\n- model: expert0\n", 1, "t has to be given", "how far",
    ),
    "weights that sum to zero": (
        "merge_method: linear\nparameters: {weight: 0}\nmodels:\n- model: expert0\n", 1, "sum to zero", "normalize",
    ),
    "layers that are not there": (
        "merge_method: passthrough\nslices:\n- sources:\n  - model: expert0\n    layer_range: [0, 9]\n",
        4, "which has 3 layers", "at most",
    ),
    "more layers than any": (
        f"merge_method: passthrough\nslices:\n- sources:\n  - model: base\n    layer_range: [0, {'9' * 40}]\n",
        4, "which has 3 layers", "at most",
    ),
    "a type that cannot be written": (TIES + "dtype: int8\n", 10, "'int8'", "bfloat16"),
    "a chat template": (TIES + "chat_template: auto\n", 10, "chat_template", "Take the line out"),
    "a tokenizer that cannot be read": (TIES + "tokenizer_source: union\n", 10, "tokenizer.json", "save_pretrained"),
    "an unknown field of the tokenizer": (TIES + "tokenizer: {sauce: base}\n", 10, "'sauce'", "'source'"),
    "a tag": ("merge_method: linear\nmodels: !!python/object/apply:os.system ['touch x']\n", 2, "tag", "plain data"),
    "aliases that explode": (
        "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
            f"{new}: &{new} [{','.join(['*' + old] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
        ), 6, "aliases unfolded", "Split",
    ),
    "an alias into itself": ("a: &a [*a]\n", 1, "inside itself", "Write"),
    "more than a recipe has": ("#" * (5 << 20), 1, "larger than 4 MiB", "kilobytes"),
    "nested too deeply": ("a: " + "[" * 60 + "]" * 60, 1, "levels deep", "nests"),
    "bytes": (bytes(range(256)), 2, "not UTF-8", "UTF-8"),
    "a program": (b"\x7fELF" + bytes(2000), 1, "control characters", "printable"),
    "nothing": ("", 1, "the recipe is empty", "merge_method"),
    "a list": ("- a\n", 1, "must be a mapping", "fields"),
    "no YAML": ("merge_method: [ties\nmodels: }\n", 2, "not valid YAML", "brackets"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_recipes(recipe: Callable[..., str], name: str) -> None:
    text, line, message, hint = BAD[name]
    said = recipe(text)
    first, _, last = said.partition("\nhint: ")
    assert first.startswith(f"error: recipe.yml:{line}: ")
    assert message in first
    assert hint in last
    assert "\033" not in said


def test_a_million_entries(fails: Callable[..., str], filled: Path) -> None:
    (filled / "recipe.yml").write_text("merge_method: linear\nmodels:\n" + "- m\n" * 1_000_000)
    said = fails("merge", "recipe.yml", "--as", "new")
    assert said.startswith("error: recipe.yml:199998: more than 200000 values")


def test_a_model_whose_shapes_do_not_match(call, recipe: Callable[..., str], filled: Path) -> None:
    weights = base_weights()
    name = "model.layers.1.mlp.up_proj.weight"
    weights[name] = weights[name][:, :32]
    call("ingest", write_model(filled / "odd", weights))
    said = recipe(edited("expert1", "odd"), loosely=True)
    for part in ("'odd'", name, "[128, 32]", "[128, 64]", "mp diff"):
        assert part in said


def test_a_model_that_lacks_tensors(call, recipe: Callable[..., str], filled: Path) -> None:
    weights = fine_tune(base_weights(), 7)
    for layer in range(3):
        del weights[f"model.layers.{layer}.input_layernorm.weight"]
    del weights["lm_head.weight"]
    call("ingest", write_model(filled / "short", weights))
    said = recipe(edited("expert1", "short"))
    for part in ("model.layers.0.input_layernorm.weight (short)", "and 1 more", "--allow-missing"):
        assert part in said
    call("merge", "recipe.yml", "--as", "new", "--allow-missing")
    for options in (["--expert", "short", "--expert", "expert0"], ["--expert", "short"]):
        said = call("plan", "--base", "base", "--method", "ties", *options, code=4).err
        assert "'short'" in said
        assert "--allow-missing" in said


def test_a_file_where_the_recipe_names_a_broken_model(recipe: Callable[..., str], filled: Path) -> None:
    """The line, and the file of the model; no model before it is ingested where one after it is unknown."""
    folder = write_checkpoint(filled / "cut", {"w": raw(base_weights()["model.norm.weight"])})
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    said = recipe(edited("expert1", "cut"))
    assert said.startswith("error: recipe.yml:8: ")
    assert "model.safetensors" in said
    write_model(filled / "fine", fine_tune(base_weights(), 8))
    recipe(edited("expert1", "nowhere", edited("expert0", "./fine")))


def test_no_store_is_left_behind(call, here: Path, family: Path) -> None:
    for text in (edited("ties", "teis"), edited("expert1", "nowhere")):
        (here / "recipe.yml").write_text(text)
        for words in (["merge", "--as", "new"], ["plan"], ["merge", "--dry-run"]):
            call(words[0], "recipe.yml", *words[1:], code=4)
            assert not (here / ".mp").exists()
    (here / "recipe.yml").write_text(
        TIES.replace("model: ", f"model: {family}/").replace("l: base", f"l: {family}/base")
    )
    assert "made a store" in call("merge", "recipe.yml", "--as", "new").err


@pytest.mark.parametrize(
    ("words", "code", "message", "hint"),
    [
        (["recipe.yml"], 2, "--as NAME is missing", "--as"),
        ([], 2, "a recipe or --plan", "mp merge recipe.yml"),
        (["recipe.yml", "--plan", "p.json", "--as", "new"], 2, "one of them", "mp merge recipe.yml"),
        (["recipe.yml", "--as", "../new"], 2, "'../new'", "letters"),
        (["recipe.yml", "--as", "new", "--budget", "lots"], 2, "'lots' is not a size", "2GiB"),
        (["recipe.yml", "--as", "new", "--budget", "200%"], 2, "'200%' is not a share", "100%"),
        (["recipe.yml", "--as", "new", "--budget", "1", "--max-error", "1"], 2, "exclude each other", "one"),
        (["recipe.yml", "--as", "new", "--device", "warp"], 2, "'warp'", "cpu"),
        (["nothing.yml", "--as", "new"], 3, "nothing.yml", "path"),
        (["nothing/at/all.yml", "--as", "new"], 3, "all.yml", "path"),
        ([".", "--as", "new"], 4, "not a file", ".yml"),
        (["p.json", "--as", "new"], 4, "p.json: a plan, and no recipe", "--plan p.json"),
        (["--plan", "recipe.yml", "--as", "new"], 4, "recipe.yml: not valid JSON", "without --plan"),
        (["--plan", ".", "--as", "new"], 4, "not a file", "mp plan"),
        (["--plan", "nothing.json", "--as", "new"], 3, "nothing.json", "mp plan"),
        (["--plan", "p.json", "--as", "new", "--budget", "10%"], 2, "--budget belongs to `mp plan`", "another plan"),
        (["--plan", "p.json", "--as", "new", "--max-error", "0.1"], 2, "--max-error belongs to", "another plan"),
        (["--plan", "p.json", "--dry-run", "--allow-missing"], 2, "--allow-missing belongs to", "another plan"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_usage(call, fails, filled: Path, words: list[str], code: int, message: str, hint: str) -> None:
    (filled / "recipe.yml").write_text(TIES)
    call("plan", "recipe.yml", "-o", "p.json")
    first, _, last = fails("merge", *words, code=code).partition("\nhint: ")
    assert message in first
    assert hint in last


@pytest.mark.usefixtures("filled")
def test_a_merge_of_no_experts(fails: Callable[..., str]) -> None:
    assert "at least one expert" in fails("plan", "--base", "base", "--method", "ties", code=2)
    assert "needs a base" in fails("plan", "--method", "ties", "--expert", "expert0", code=2)


@pytest.fixture
def plan(call, filled: Path) -> Callable[..., Any]:
    """The JSON of a plan of a recipe, or of its options."""

    def make(text: str | None = None, *options: object) -> Any:
        (filled / "plan-recipe.yml").write_text(text or TASK.replace("      density: 0.5\n", ""))
        call("plan", "plan-recipe.yml", *options, "-o", "made.json")
        return json.loads((filled / "made.json").read_text())

    return make


UP = "model.layers.0.mlp.up_proj.weight"
STRANGER = "0" * 64
EDITS: dict[str, tuple[tuple[Any, ...], Any, int, str]] = {
    "an unknown field": (("colour",), "red", 4, "'colour' is unknown"),
    "an unknown field of a tensor": (("tensors", UP, "colour"), 1, 4, f"tensors['{UP}']: field 'colour'"),
    "another format": (("format",), 99, 4, "format 99"),
    "an unknown commit": (("experts", 0, "commit"), STRANGER, 3, "000000000000"),
    "an unknown base": (("base", "commit"), STRANGER, 3, "000000000000"),
    "no id": (("experts", 0, "commit"), "abc", 4, "'abc'"),
    "fewer reads": (("tensors", UP, "reads"), ["", ""], 4, UP),
    "reads of blocks that are not there": (("tensors", UP, "reads"), ["0-3", "0-400"], 4, UP),
    "too many reads": (("tensors", UP, "reads"), ["0-9999999999", ""], 4, "more blocks"),
    "reads that are none": (("tensors", UP, "reads"), ["x", ""], 4, "'x'"),
    "a setting that is not there": (("tensors", UP, "setting"), 9, 4, "setting is 9"),
    "sources that are not there": (("tensors", UP, "sources"), [UP, UP, "nothing"], 4, "nothing is missing"),
    "too few sources": (("tensors", UP, "sources"), [UP], 4, "source"),
    "a bound": (("tensors", UP, "bound"), 0.5, 4, UP),
    "a bound that is no number": (("bound", "absolute"), float("nan"), 4, "NaN"),
    "pinned coefficients": (("tensors", UP, "pinned"), {"thresholds": [1, 2]}, 4, "thresholds"),
    "an unknown parameter": (("variants", 0, "parameters", "x"), 1.0, 4, "'x'"),
    "a parameter out of range": (("variants", 0, "own", 0, "density"), 7.0, 4, "density is 7.0"),
    "a parameter that is missing": (("variants", 0, "own", 0), {}, 4, "parameters"),
    "an expert that is not there": (("variants", 0, "experts"), [1, 9], 4, "9"),
    "a reference that is not there": (("variants", 0, "reference"), 9, 4, "reference is 9"),
    "an unknown method": (("method",), "teis", 4, "'teis'"),
    "another version": (("method_version",), 77, 4, "version 77"),
    "an unknown change of the config": (("config",), {"auto_map": "x.py"}, 4, "'auto_map'"),
    "files of nobody": (("files",), 3, 4, "files is 3"),
    "other costs": (("costs", "computed_blocks"), 1, 4, "computed_blocks"),
    "a smaller budget": (("budget_bytes",), 1, 7, "budget of 1"),
    "a negative budget": (("budget_bytes",), -1, 4, "budget_bytes"),
    "a type that cannot be written": (("dtype",), "I8", 4, "'I8'"),
    "an adapter that is none": (("experts", 0, "kind"), "adapter", 4, "adapter"),
    "an unknown kind": (("experts", 0, "kind"), "pickle", 4, "experts[0].kind"),
    "no experts": (("experts",), [], 4, "experts"),
    "a base with parameters": (("base", "parameters"), {"weight": 1.0}, 4, "base"),
    "not all tensors": (("complete",), False, 4, "tensors"),
    "no tensors": (("tensors",), {}, 4, "computed_blocks"),
}


@pytest.mark.parametrize("name", EDITS)
def test_edited_plans(fails: Callable[..., str], plan: Callable[..., Any], filled: Path, name: str) -> None:
    path, value, code, message = EDITS[name]
    found = place = plan()
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    (filled / "edited.json").write_text(json.dumps(found))
    for words in (["--as", "new"], ["--dry-run"]):
        assert message in fails("merge", "--plan", "edited.json", *words, code=code)


@pytest.mark.parametrize("part", ["absolute", "update", "estimate", "relative"])
def test_a_certificate_cannot_be_improved_by_hand(
    fails: Callable[..., str], plan: Callable[..., Any], filled: Path, part: str
) -> None:
    found = plan(None, "--budget", "50%")
    assert found["bound"][part] > 0
    found["bound"][part] *= 0.9
    (filled / "edited.json").write_text(json.dumps(found))
    assert f"bound {part}" in fails("merge", "--plan", "edited.json", "--as", "new")


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"[" * 100_000, "nested"), (b'{"format": 2, "format": 2}', "twice"), (bytes(range(256)), "UTF-8"),
     (b'{"format": ' + b"9" * 5000 + b"}", "JSON"), (b"", "JSON"), (b"[]", "must be an object")],
    ids=["nested", "a key twice", "bytes", "digits", "empty", "a list"],
)  # fmt: skip
def test_what_is_no_plan(fails: Callable[..., str], filled: Path, content: bytes, message: str) -> None:
    (filled / "bad.json").write_bytes(content)
    said = fails("merge", "--plan", "bad.json", "--as", "new")
    assert said.startswith("error: bad.json: ")
    assert message in said


def test_a_plan_of_another_store(call, plan: Callable[..., Any], filled: Path, family: Path) -> None:
    """Ids are of content: a store with the same commits carries it out, one without says which is missing."""
    plan()
    call("init", "elsewhere")
    answer = call("merge", "--plan", filled / "made.json", "--as", "new", "--store", "elsewhere", code=3)
    assert "which is not in this store" in answer.err
    assert "Ingest it here first" in answer.err
    call("ingest", family / "base", "--store", "elsewhere")  # another time makes another commit of the same model
    call("merge", "--plan", filled / "made.json", "--as", "new", "--store", "elsewhere", code=3)
    assert call("ls", "--store", "elsewhere", "--json").json[0]["ref"] == "base"


def test_a_hand_made_number_of_layers_is_harmless(call, plan: Callable[..., Any], filled: Path) -> None:
    """It reaches one number of config.json, or is refused; weights are what the inputs make them."""
    text = "merge_method: passthrough\nslices:\n- sources:\n  - model: expert0\n    layer_range: [0, 2]\n"
    found = plan(text)
    assert found["config"]["num_hidden_layers"] == 2
    call("merge", "--plan", "made.json", "--as", "honest")
    found["config"]["num_hidden_layers"] = 400
    (filled / "edited.json").write_text(json.dumps(found))
    from mergepipe.cli.app import main

    if main(["merge", "--plan", "edited.json", "--as", "edited"]) == 0:
        with Store.open(filled) as store:
            assert store.snapshot("edited").tensors == store.snapshot("honest").tensors


def test_budgets_that_adapters_cannot_meet(call, fails: Callable[..., str], filled: Path) -> None:
    """Low-rank factors are read whole; so a budget below them is none. One of 1 byte reads nothing where it can."""
    from support.adapters import CONFIG, factors, write_adapter

    module = "model.layers.0.mlp.up_proj"
    (filled / "lora").mkdir()
    write_adapter(filled / "lora", factors(module, 128, 64), CONFIG)
    call("ingest", "lora")
    words = ["plan", "--base", "base", "--method", "task_arithmetic", "--expert", "lora:0.5"]
    assert "adapters alone" in fails(*words, "--budget", "1", code=7, loosely=True)
    call(*words, "--budget", "100%")
    found = call("plan", "--base", "base", "--method", "linear", "--expert", "expert0", "--budget", "1", "--json").json
    assert found["expert_bytes"] == 0
    assert found["bound"]["absolute"] == found["bound"]["update"] > 0


def test_an_expert_that_is_the_base(call, filled: Path) -> None:
    """Is nothing to add, and costs nothing; a name twice on the command line counts twice."""
    from mergepipe.merge.executor import execute
    from mergepipe.merge.plan_file import read_plan

    words = ["plan", "--base", "base", "--method", "task_arithmetic"]
    assert call(*words, "--expert", "base", "--json").json["expert_bytes_full"] == 0
    trees = []
    for experts in (["expert0:0.5", "expert0:0.25"], ["expert0:0.75"], ["expert0:0.75", "base"]):
        call(*words, *(word for expert in experts for word in ("--expert", expert)), "-o", "p.json")
        with Store.open(filled) as store:
            execute(store, read_plan(filled / "p.json"), "merged")
            trees.append(store.commit(store.resolve("merged")).tree)
    assert trees[1] == trees[2]
