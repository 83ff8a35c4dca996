"""The block of docs/python_api.md, run as printed but for the preset and the data (toy MiniMax-M2)."""

from __future__ import annotations

import re
import unittest
from pathlib import Path

from tests.support import ROOT, Workspace, run_program


class PythonApi(unittest.TestCase):
    def test_the_block_runs_as_printed(self) -> None:
        place = Workspace()
        block = re.findall(r"```python\n(.*?)```", (ROOT / "docs/python_api.md").read_text(), re.DOTALL)[0]
        flags = dict(zip(place.sources[::2], place.sources[1::2], strict=True))
        block = block.replace("smollm2_135m", "tiny_minimax_m2")
        block = block.replace("my_documents", flags["--data.corpus"]).replace("my_pairs.jsonl", flags["--data.task"])
        paths = f'preset["run"] |= {{"data_dir": "{place.data}", "models_dir": "{place.models}", "trackers": ()}}\n'
        block = block.replace("config = Config", f"{paths}config = Config")
        path = Path(place.root) / "block.py"
        path.write_text(block)
        done = run_program("run_block", str(path))
        self.assertEqual(done.returncode, 0, done.stderr[-3000:])
        loss, rest = done.stdout.strip().splitlines()[-1].split(" ", 1)
        self.assertGreater(float(loss), 0.0)
        self.assertTrue(rest.startswith("[1.0, 1.0]"), rest)


if __name__ == "__main__":
    unittest.main()
