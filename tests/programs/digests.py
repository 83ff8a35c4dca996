"""Print the digest of a result that must be the same in every process, whatever Python's hash seed.

python -m tests.programs.digests python_docs MODULE... | invented_domain SEED
"""

import sys
from dataclasses import asdict
from typing import Any

from utils.artifacts import files
from utils.data.domains import invented, python_docs


def of_python_docs(*modules: str) -> Any:
    return [list(python_docs.python_documents(modules)), python_docs.python_qa(modules)]


def of_invented_domain(seed: str) -> Any:
    options: dict[str, Any] = {"towns": 120, "attributes": 4, "dev_share": 0.15, "test_share": 0.25, "shuffled": True}
    return asdict(invented.invented_domain(**options, seed=int(seed)))


if __name__ == "__main__":
    results = {"python_docs": of_python_docs, "invented_domain": of_invented_domain}
    print(files.fingerprint(results[sys.argv[1]](*sys.argv[2:])))
