"""The tests; what they share is in support.py."""

import os
import signal

# read when the libraries are imported, so they are set before; bit-for-bit claims are made for the CPU
os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    OMP_NUM_THREADS="1",
    OMP_WAIT_POLICY="PASSIVE",
    ACCELERATE_USE_CPU="true",
    CUDA_VISIBLE_DEVICES="",
    TOKENIZERS_PARALLELISM="false",
)

# a shell that runs the tests in the background ignores Ctrl-C for them and all that they start
signal.signal(signal.SIGINT, signal.default_int_handler)

# imported by the server that tests and scripts are forked from
PRELOADED = "tests.preloaded"
