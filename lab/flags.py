"""Types of command-line flags for argparse: every value is checked, and named with its remedy, before anything begins."""

import argparse

import torch


def number(kind: type, low: float, high: float = 10**6, above: bool = False):
    """An argparse type: a number of at least `low` (above: greater than it) and at most `high`, neither infinite nor absurd."""

    def parse(text: str):
        value = kind(text)
        # Every comparison with nan is false, so nan is refused too.
        if not (low < value if above else low <= value) or not value <= high:
            bounds = f"{'greater than' if above else 'of at least'} {low:g} and at most {high:g}"
            raise argparse.ArgumentTypeError(f"{text}: must be a finite number {bounds}")
        return value

    parse.__name__ = kind.__name__  # argparse names it in its message for text that is not a number
    return parse


def name(text: str) -> str:
    """An argparse type: text that is not empty and that can be printed."""
    if not text.strip() or not text.isprintable():
        raise argparse.ArgumentTypeError(f"{text!r}: give a name or a path")
    return text


def available_devices() -> list[str]:
    """The devices on which models can run here: "cpu", and with an accelerator such as "cuda" that one too, with and without number."""
    devices = ["cpu"]
    if torch.accelerator.is_available():
        kind = torch.accelerator.current_accelerator().type
        devices += [kind, *(f"{kind}:{i}" for i in range(torch.accelerator.device_count()))]
    return devices


def given_flags(parser: argparse.ArgumentParser, argv: list[str] | None, args: argparse.Namespace) -> list[str]:
    """The names of the flags that were given on the command line, and not only have their default."""
    # A second reading into a namespace of None, so that no defaults are set.
    read = vars(parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(vars(args)))))
    return [flag for flag, value in read.items() if value is not None]
