"""The tests; what they share is in support.py."""

import os

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

# imported by the server that tests and scripts are forked from
PRELOADED = "tests.preloaded"
