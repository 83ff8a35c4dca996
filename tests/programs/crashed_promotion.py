"""Publish a candidate and end without a word after one of its operations.

python -m tests.programs.crashed_promotion ROOT OPERATION
"""

import os
import sys
from pathlib import Path

from config import RolloutSection
from utils.rollout.edge.journal import Journal
from utils.rollout.edge.promotion import publish
from utils.rollout.edge.service import Service

service = Service(RolloutSection(), Path(sys.argv[1]))
writer = Journal(service.rollout / "journal.jsonl")
publish(service, service.balancer, writer, lambda name: os._exit(9) if name == sys.argv[2] else None)
