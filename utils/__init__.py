"""The subjects of the pipeline, each a module; imports go down only.

plumbing   exceptions   what can go wrong, and the exit codes
           logger       a line for people and a JSON line for programs; silent above rank 0
           files        atomic writes, digests, the publish protocol, locks
           runs         run directories, manifests, choosing parents
           progress     a bar on a terminal, plain lines elsewhere
           cli          flags and environment -> Config; exceptions -> message and exit code
pure       composition  LoRA factors in, LoRA factors out
           statistics   paired intervals over clusters
engines    base_model   fetched or built once, identified by digest, loaded frozen
           toy          real architectures at toy size
           corpus/      documents, labelled pairs, splits, the demo's domain
           prepared     prepared data on disk
           chat         prompt and answer as token ids
           training_data, losses, checkpoints, training     the loop over one adapter
           adapters     PEFT directories, loaded strictly, activated explicitly
           evaluation, comparison                           what a model knows; cells against each other
           generation, merging, cards                       answers; a standalone model; its README
           stages       how stages find their parents and what both training scripts share
           benchmarks/  speed and memory as ratios of one run
"""
