"""The command line: settings from flags and environment, help, and what a script does with errors and its result.

A script needs two lines:

    if __name__ == "__main__":
        cli.run(main, plan, sections=("base", "data", "run"), description=__doc__)
"""

from utils.cli.command_line import resolve, words_as_flags
from utils.cli.script import run

__all__ = ["resolve", "run", "words_as_flags"]
