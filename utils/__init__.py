"""The subjects of the pipeline, each a module; imports go down only.

plumbing   exceptions   what can go wrong, and the exit codes
           logger       a line for people and a JSON line for programs; silent above rank 0
           files        atomic writes, digests, the publish protocol, locks
           runs         run directories, manifests, choosing parents
           progress     a bar on a terminal, plain lines elsewhere
           cli          flags and environment -> Config; exceptions -> message and exit code
pure       composition/ LoRA factors in, LoRA factors out: methods, checks, weight search, interference
           statistics   paired intervals over clusters
           rollout/     the canary as values: gate, controller, simulation
           answers      exact match, token F1, faults of an answer
           corpus/invented   a domain of invented facts and its shuffled twin: the control with a known answer
engines    base_model   fetched or built once, identified by digest, loaded frozen
           toy          real architectures at toy size
           corpus/      documents, labelled pairs, splits, the demo's domain
           prepared     prepared data on disk
           chat         prompt and answer as token ids
           training_data, losses, checkpoints, training     the loop over one adapter
           experts      fused experts: their spellings, and where a checkpoint's tensors sit in the model
           adapter_settings, adapter_files                  adapters on disk: what their settings say, their factors
           adapters, frozen_lora                            adapters on a model: to train, to infer
           lineage, stages                                  how stages find their parents; what training scripts share
           composing, probing, interference, composing_pictures     several adapters as one, checked, chosen, explained
           evaluation, comparison, generation               what a model knows; cells against each other; answers
           shards, fp8, merging, layer_sample, selfcheck    a standalone model, streamed, and checked
           cards, gguf, hub                                 its README; other formats; publishing
           canary/      the canary at the edge: balancer, log, probes, journal, loop, report
           benchmarks/  speed and memory as ratios of one run
"""
