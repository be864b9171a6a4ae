"""From flags and a YAML file to checked dataclasses, and back to a YAML file that repeats the run.

Room: parsing only.  The parser is TRL's; this file adds that a YAML value is checked like a flag, and that everything
that is wrong is reported at once instead of one thing a run.
"""

from __future__ import annotations

import argparse
import difflib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml
from trl import TrlParser

from qkernels.errors import UserError

from .arguments import TrainingArguments


class Parser(TrlParser):
    """TRL's parser; reports by `UserError` instead of printing usage and ending the process."""

    def __init__(self, dataclass_types: Sequence[Any], prog: str, **kwargs: Any) -> None:
        super().__init__(list(dataclass_types), prog=prog, allow_abbrev=False, **kwargs)
        self.add_argument("--config", metavar="FILE.yaml", help="YAML file of the flags below, without the dashes.")

    def error(self, message: str) -> NoReturn:
        raise UserError(
            "command line", expected="valid flags", got=message, remedy=f"See `{self.prog} --help` for all flags."
        )


def parse(
    parser: Parser, argv: Sequence[str], check: Callable[[argparse.Namespace], list[str]] = lambda _: []
) -> tuple[Any, ...]:
    """Flags and the YAML file that --config names, as the parser's dataclasses; a flag wins over the file.

    Args:
        parser: parser over dataclasses.
        argv: the flags.
        check: given all values, returns what is wrong with them, one sentence each.

    Raises:
        UserError: everything that is wrong, in one message.
    """
    problems: list[str] = []
    words = [*_words_of_file(parser, argv, problems), *argv]
    try:
        values, unknown = parser.parse_known_args(words)
    except UserError as error:
        raise _as_one([*problems, str(error.got)], parser) from error
    problems += [_unknown(parser, word) for word in unknown if word.startswith("-")]
    if unknown and not problems:
        problems.append(f"{unknown[0]!r} belongs to no flag")
    problems += check(values)
    if problems:
        raise _as_one(problems, parser)
    count = len(list(parser.dataclass_types))  # after them comes a namespace with --config
    try:
        return tuple(parser.parse_args_into_dataclasses(words, look_for_args_file=False)[:count])
    except UserError:
        raise
    except (ValueError, ImportError) as error:  # the checks of combinations and packages in transformers and TRL
        raise _as_one([" ".join(str(error).split())], parser) from error


def _words_of_file(parser: Parser, argv: Sequence[str], problems: list[str]) -> list[str]:
    """The settings of the YAML file as command-line words, so that one parser checks both alike."""
    first = Parser([], prog=parser.prog, add_help=False)
    path = first.parse_known_args(list(argv))[0].config
    if path is None:
        return []
    words = []
    for key, value in _read_yaml(Path(path)).items():
        try:
            words += _words_of_setting(parser, key, value)
        except UserError as error:
            problems.append(f"{path}: {error.got}")
    return words


def _words_of_setting(parser: Parser, key: str, value: Any) -> list[str]:
    """One setting of the file as command-line words; none for a null that is the default anyway.

    Raises:
        UserError: no such setting, or the value is none for it.
    """
    action = parser._option_string_actions.get(f"--{key}")
    if action is None:
        parser.error(_unknown(parser, f"--{key}"))
    takes_list = action.nargs == "+"
    if value is None:
        if action.default is None:
            return []
        if takes_list or action.type is str:  # it would be the word "none"
            parser.error(f"{key} cannot be null")
    if not isinstance(value, list):
        words = [f"--{key}={_word(value)}"]
    elif not takes_list:
        parser.error(f"{key} takes one value, not a list")
    else:
        words = [f"--{key}", *(_word(item) for item in value)]
        for item, word in zip(value, words[1:], strict=True):
            if item is None or isinstance(item, dict | list):
                parser.error(f"{key}: {word} is not one text or number (put quotes around a text)")
            if parser._parse_optional(word):
                parser.error(f"{key}: {word!r} in the list would be read as a flag")
    parser.parse_known_args(words)
    return words


class _Loader(yaml.SafeLoader):
    """Refuses a key that is there twice, where PyYAML would take the last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value} is there twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        settings = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)  # a SafeLoader
    except (OSError, UnicodeDecodeError) as error:
        raise UserError("--config", expected="a YAML file", got=str(error), remedy="Check the path.") from error
    except yaml.YAMLError as error:
        text = " ".join(str(error).split())
        raise UserError("--config", expected=f"YAML in {path}", got=text, remedy="Mend the file there.") from error
    if not isinstance(settings, dict):
        raise UserError(
            "--config",
            expected=f"lines of the form `flag: value` in {path}",
            got=f"a {type(settings).__name__}" if settings is not None else "an empty file",
            remedy="Write for example `learning_rate: 2e-4`.",
        )
    return {str(key): value for key, value in settings.items()}


def _word(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    return json.dumps(value) if isinstance(value, dict) else str(value)


def _flags(parser: Parser) -> list[str]:
    # TRL's parser knows every flag with hyphens too; the form with underscores is the one that YAML files use.
    return [action.option_strings[0] for action in parser._actions]


def _unknown(parser: Parser, flag: str) -> str:
    name = flag.split("=")[0]
    near = [flag.lstrip("-") for flag in difflib.get_close_matches(name, _flags(parser), n=2)]
    return f"unknown setting {name.lstrip('-')!r}" + (f" (did you mean {' or '.join(near)}?)" if near else "")


def _as_one(problems: list[str], parser: Parser) -> UserError:
    got = problems[0] if len(problems) == 1 else " ".join(f"({i}) {text};" for i, text in enumerate(problems, 1))[:-1]
    return UserError(
        "configuration", expected="valid settings", got=got, remedy=f"`{parser.prog} --help` lists them all."
    )


def resolved(arguments: Sequence[Any]) -> dict[str, Any]:
    """Settings that repeat a run when given to --config: all of this project's, and TRL's that are not the default.

    The precision is left out unless it was asked for: on another GPU it may be another one.
    """
    settings: dict[str, Any] = {}
    for group in arguments:
        if not isinstance(group, TrainingArguments):
            settings |= vars(group)
            continue
        default = TrainingArguments(output_dir=group.output_dir, use_cpu=group.use_cpu).to_dict()
        own = TrainingArguments.__annotations__
        settings |= {
            name: value
            for name, value in group.to_dict().items()
            if name in own or value != default[name]  # tokens are masked in both
        }
    return {name: value for name, value in settings.items() if name != "resume" and value != []}
