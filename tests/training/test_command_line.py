# Copyright 2026 The FlowBP for diffusers authors
# SPDX-License-Identifier: Apache-2.0
"""Options come from the command line, else the recipe, else the defaults; every error is one line with exit code 2."""

import argparse
from pathlib import Path

import pytest
from training_scripts import ROOT, backbone_of, load_script

from flowbp.training import TrainingConfig
from flowbp.training.command_line import find_recipe, json_object, parse_args_with_config
from flowbp.training.train_command_line import parse_training_config


def even(text: str) -> int:
    value = int(text)
    if value % 2:
        raise argparse.ArgumentTypeError(f"an even number expected, got {value}")
    return value


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="train_x.py", allow_abbrev=False)
    parser.add_argument("--config")
    parser.add_argument("--model", required=True)
    parser.add_argument("--learning_rate", type=float, default=1e-4)
    parser.add_argument("--max-train-steps", type=int, default=100)
    parser.add_argument("--even", type=even, default=2)
    parser.add_argument("--method", choices=["sparse", "bridge"], default="sparse")
    parser.add_argument("--size", type=int, choices=[1, 2])
    parser.add_argument("--dirichlet", type=float, nargs=3)
    parser.add_argument("--layers", nargs="+", default=["a"])
    parser.add_argument("--push", action="store_true")
    parser.add_argument("--no_ema", dest="ema", action="store_false")
    parser.add_argument("--unconditional_gradient", action=argparse.BooleanOptionalAction, default=None)
    parser.add_argument("--tag", action="append")
    parser.add_argument("--quantization", "--bnb_quantization", type=Path)
    parser.add_argument("--arguments", type=json_object)
    return parser


@pytest.fixture
def parse(tmp_path):
    """Parses a command line with a recipe of the given text."""

    def run(recipe: str | bytes, *argv: str) -> argparse.Namespace:
        path = tmp_path / "recipe.yaml"
        path.write_bytes(recipe.encode() if isinstance(recipe, str) else recipe)
        return parse_args_with_config(make_parser(), ["--config", str(path), *argv])

    return run


def test_help_has_the_defaults_that_its_texts_do_not_have(capsys: pytest.CaptureFixture) -> None:
    parser = argparse.ArgumentParser(prog="train_x.py", allow_abbrev=False)
    parser.add_argument("--config", help="recipe")
    parser.add_argument("--rank", type=int, default=4, help="of the LoRA")
    parser.add_argument("--start", type=int, default=0, help="first step")
    parser.add_argument("--lr", type=float, default=0.5, help="learning rate (by default the paper's)")
    parser.add_argument("--push", action="store_true", help="to the Hub")
    parser.add_argument("--paths", nargs="+", default=[], help="folders")
    with pytest.raises(SystemExit) as caught:
        parse_args_with_config(parser, ["--help"])
    assert caught.value.code == 0
    printed = capsys.readouterr().out
    assert printed.count("default:") == 2
    assert "of the LoRA (default: 4)" in printed and "first step (default: 0)" in printed


def refusal(capsys: pytest.CaptureFixture, call, *args) -> str:
    with pytest.raises(SystemExit) as caught:
        call(*args)
    out, err = capsys.readouterr()
    assert caught.value.code == 2
    assert out == "" and err.startswith("train_x.py: error: ") and err.endswith("\n") and err.count("\n") == 1
    return err


def test_command_line_wins_over_file_and_file_over_defaults(parse) -> None:
    args = parse("model: m\nlearning_rate: 1e-5\nmax_train_steps: 7\n", "--max-train-steps", "9")
    assert (args.model, args.learning_rate, args.max_train_steps, args.method) == ("m", 1e-5, 9, "sparse")


def test_without_a_file_it_is_argparse() -> None:
    argv = ["--model", "m", "--dirichlet", "1", "2", "3", "--push", "--tag", "a", "--tag", "b"]
    assert parse_args_with_config(make_parser(), argv) == make_parser().parse_args(argv)


def test_every_kind_of_option_gets_what_the_command_line_would_give(parse) -> None:
    recipe = """
        model: "42"
        even: 4
        method: bridge
        size: 2
        dirichlet: [2.5, 6, -2]
        layers: [b, "-c"]
        push: true
        no_ema: true
        unconditional_gradient: true
    """
    args = parse(recipe)
    assert (args.model, args.even, args.method, args.size, args.dirichlet) == ("42", 4, "bridge", 2, [2.5, 6.0, -2.0])
    assert [type(x) for x in args.dirichlet] == [float] * 3
    assert (args.layers, args.push, args.ema, args.unconditional_gradient) == (["b", "-c"], True, False, True)
    args = parse("model: m\npush: false\nno_ema: false\nunconditional_gradient: false\nsize: null\n")
    assert (args.push, args.ema, args.unconditional_gradient, args.size) == (False, True, False, None)


def test_command_line_replaces_lists_and_flags_of_the_file(parse) -> None:
    recipe = "model: m\nlayers: [b, c]\nunconditional_gradient: true\n"
    args = parse(recipe, "--layers", "d", "--no-unconditional_gradient")
    assert (args.layers, args.unconditional_gradient) == (["d"], False)


def test_required_option_stays_required_without_a_value(parse, capsys) -> None:
    assert "the following arguments are required: --model" in refusal(capsys, parse, "size: 1\n")
    parser = make_parser()
    refusal(capsys, parse_args_with_config, parser, [])
    assert parse_args_with_config(parser, ["--model", "m"]).model == "m"


@pytest.mark.parametrize(
    ("recipe", "expected"),
    [
        ("learning_rat: 1", "unknown key learning_rat: did you mean learning_rate?"),
        ("max-train-steps: 1", "unknown key max-train-steps: did you mean max_train_steps?"),
        ("no_unconditional_gradient: true", "did you mean unconditional_gradient?"),
        ("config: other.yaml", "unknown key config"),
        ("help: true", "unknown key help"),
        ("1: 2", "unknown key 1"),
        ("learning_rate: fast", "learning_rate: float expected, got 'fast'"),
        ("max_train_steps: 1.5", "max_train_steps: int expected, got 1.5"),
        ("max_train_steps: true", "max_train_steps: int expected, got True"),
        ("max_train_steps: [1]", "max_train_steps: a single value expected, got a list"),
        ("model: 42", "model: text expected, got 42: put it in quotes"),
        ("size: 1\nsize: 2", "key size stands twice: keep one of them"),
        ("quantization: a\nbnb_quantization: a", "bnb_quantization stands twice, the other time by another name"),
        ("arguments: '[1]'", "arguments: a JSON object expected, got [1]"),
        ("arguments: '{'", "arguments: json_object expected, got '{'"),
        ("model: {a: b}", "model: a single value expected, got a mapping"),
        ("model: null", "model: a value expected, got null"),
        ("learning_rate:", "learning_rate: a value expected, got null"),
        ("even: 3", "even: an even number expected, got 3"),
        ("method: brige", "method: one of sparse, bridge expected, got 'brige'"),
        ("size: 3", "size: one of 1, 2 expected, got 3"),
        ("dirichlet: 2.5", "dirichlet: a list expected, got 2.5"),
        ("dirichlet: [1, 2]", "dirichlet: a list of 3 expected, got 2"),
        ("dirichlet: [1, 2, [3]]", "dirichlet: a single value expected, got a list"),
        ("layers: []", "layers: a list of at least one expected"),
        ("push: 1", "push: true or false expected, got 1"),
        ("push: 'yes'", "push: true or false expected, got 'yes'"),
        ("tag: a", "tag: this option can be given on the command line only"),
        ("- model", "expected option names with values, got a list"),
        ("", "expected option names with values, got nothing"),
        ("model: [", "not valid YAML in UTF-8"),
        (b"model: \xff", "not valid YAML in UTF-8"),
        ("model: !!python/object/apply:os.getcwd []", "not valid YAML in UTF-8"),
    ],
)
def test_bad_recipe_is_refused_naming_file_and_key(recipe: str | bytes, expected: str, parse, capsys) -> None:
    message = refusal(capsys, parse, recipe, "--model", "m")
    assert expected in message and "recipe.yaml: " in message


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--learing_rate", "1"], "unknown argument --learing_rate: did you mean --learning_rate?"),
        (["--learn", "1"], "unknown argument --learn"),
        (["--conf", "x.yaml"], "unknown argument --conf: did you mean --config?"),
        (["stray"], "unknown argument stray"),
        (["--learning_rate", "x"], "invalid float value: 'x'"),
        (["--config", "/no/such.yaml"], "--config /no/such.yaml: cannot be read: No such file or directory"),
        (["--config", "/"], "--config /: cannot be read: Is a directory"),
        (["--config"], "expected one argument"),
    ],
)
def test_bad_command_line_is_one_line(argv: list[str], expected: str, capsys) -> None:
    assert expected in refusal(capsys, parse_args_with_config, make_parser(), ["--model", "m", *argv])


def test_later_errors_of_the_script_are_one_line_too(capsys) -> None:
    parser = make_parser()
    parse_args_with_config(parser, ["--model", "m"])
    assert "first second" in refusal(capsys, parser.error, "first\nsecond")


# Files and names.


def test_a_file_that_a_recipe_names_lies_beside_it(parse, tmp_path: Path) -> None:
    (tmp_path / "nf4.json").touch()
    assert parse("model: m\nquantization: nf4.json\n").quantization == tmp_path / "nf4.json"
    # Not what the command line names, nor what is not there.
    assert parse("model: m\n", "--quantization", "nf4.json").quantization == Path("nf4.json")
    assert parse("model: m\nbnb_quantization: int8.json\n").quantization == Path("int8.json")


def test_a_mapping_is_one_of_a_recipe_or_json(parse) -> None:
    expected = {"scale": 4.0, "words": ["a", None]}
    assert parse("model: m\narguments: {scale: 4.0, words: [a, null]}\n").arguments == expected
    text = '{"scale": 4.0, "words": ["a", null]}'
    assert parse(f"model: m\narguments: '{text}'\n").arguments == expected
    assert parse("model: m\n", "--arguments", text).arguments == expected


def test_a_bundled_recipe_is_found_by_its_name(tmp_path: Path) -> None:
    recipes = tmp_path / "recipes"
    recipes.mkdir()
    (recipes / "short.yaml").touch()
    assert find_recipe("short", recipes) == recipes / "short.yaml"
    for path in ("short.yaml", "folder/short", str(recipes / "short.yaml")):
        assert find_recipe(path, recipes) == Path(path)
    assert find_recipe("short", None) == Path("short")
    with pytest.raises(ValueError, match="--config shart: neither a file nor a recipe of flowbp: did you mean short?"):
        find_recipe("shart", recipes)


def test_a_file_wins_over_a_bundled_recipe_of_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "short.yaml").touch()
    (tmp_path / "short").touch()
    monkeypatch.chdir(tmp_path)
    assert find_recipe("short", tmp_path) == Path("short")


# Sizes, of which the command line and a recipe may each have another form.


@pytest.fixture(scope="module")
def flux():
    return backbone_of(load_script("train_flowbp_flux"))


def config_of(flux, *words: str) -> TrainingConfig:
    required = ["--pretrained_model_name_or_path", "m", "--prompts", "p.txt", "--reward", "ocr"]
    return parse_training_config(flux, "", [*required, *words], ROOT / "training" / "recipes")


@pytest.mark.parametrize(
    ("recipe", "words", "sizes"),
    [
        ("resolution: 64", [], ((64, 64),)),
        ("resolution: 64", ["--height", "32", "16", "--width", "16"], ((32, 16), (16, 16))),
        ("resolution: 64", ["--width=32"], ((512, 32),)),
        ("resolution: 64", ["--resolution", "32", "16"], ((32, 32), (16, 16))),
        ("height: 64\nwidth: [32, 16]", ["--resolution=16"], ((16, 16),)),
        ("height: 64\nwidth: 32", ["--height", "16"], ((16, 32),)),
    ],
)
def test_the_size_of_the_command_line_wins_in_any_form(
    flux, tmp_path: Path, recipe: str, words: list[str], sizes: tuple[tuple[int, int], ...]
) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe)
    assert config_of(flux, "--config", str(path), *words).sizes == sizes


@pytest.mark.parametrize("words", [["--resolution", "8", "--height", "8"], ["--config", "RECIPE"]])
def test_both_forms_of_a_size_in_one_place_are_refused(
    flux, tmp_path: Path, words: list[str], capsys: pytest.CaptureFixture
) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("resolution: 8\nwidth: 8\n")
    with pytest.raises(SystemExit):
        config_of(flux, *(str(path) if word == "RECIPE" else word for word in words))
    assert "--resolution sets height and width; leave it out" in capsys.readouterr().err


def test_a_recipe_by_its_name_with_the_file_that_it_names(flux) -> None:
    config = config_of(flux, "--config", "flux_24gb")
    assert config.quantization_config_path == ROOT / "training" / "recipes" / "nf4.json"
