"""`grok1 generate` from a checkout: `python run.py`, or `python run.py --help`."""

import pathlib
import sys

if __name__ == "__main__":
    try:
        from grok1.command.main import main

        here = pathlib.Path(__file__).parent
        sys.exit(main(program="run.py", command="generate", checkpoints=here / "checkpoints"))
    except KeyboardInterrupt:
        sys.exit(130)
