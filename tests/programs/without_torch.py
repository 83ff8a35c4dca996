"""Run a script's --help and its dry run with each preset, and fail where that loads a heavy library.

python tests/programs/without_torch.py SCRIPT PRESET,PRESET...
"""

import io
import runpy
import sys
from contextlib import redirect_stdout

HEAVY = {"torch", "transformers", "peft", "accelerate", "datasets", "numpy"}

script, presets = sys.argv[1], sys.argv[2].split(",")
for arguments in [["--help"], *(["--dry-run", "--preset", name] for name in presets)]:
    sys.argv = [script, *arguments]
    out = io.StringIO()
    code = None
    try:
        with redirect_stdout(out):
            runpy.run_path(script, run_name="__main__")
    except SystemExit as stop:
        code = stop.code
    assert code == 0, (arguments, code)
    assert arguments == ["--help"] or arguments[-1] in out.getvalue(), arguments
    assert not HEAVY & set(sys.modules), (arguments, HEAVY & set(sys.modules))
